"""The stage that asks the engines what the PyTorch models were asked."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from prox24_deploy.accuracy import EngineAccuracy, EngineAccuracyResult
from prox24_deploy.artifacts import CompileResult, NotMeasured, PruneResult
from prox24_deploy.engines.base import Backend
from prox24_deploy.errors import BackendMissingError, EngineError
from prox24_deploy.options import BuildOptions, EngineOptions
from prox24_deploy.release.bundle import Bundle
from prox24_deploy.release.environment import machine, versions
from prox24_deploy.subject import Subject, fitted_shapes, torch_device

if TYPE_CHECKING:
    from prox24_deploy.engines.accuracy import Question

Progress = Callable[[str, int, int], None]

STAGE = "accuracy"


def measure(
    bundle: Bundle,
    subject: Subject,
    compiled: CompileResult,
    backends: Sequence[Backend],
    options: BuildOptions,
    progress: Progress,
) -> EngineAccuracyResult:
    """Measure accuracy through the engines of every backend, and how far they are from PyTorch.

    A backend whose engines cannot run here is named with the reason, and so is one whose engines
    fail, which fails the release.
    """
    fitted = fitted_shapes(options.engine, subject.directory.config, subject.recipe)
    inputs = {
        "model": subject.directory.sha256,
        "pruned": bundle.load("prune", PruneResult).state_sha256,
        "engines": [asdict(engine) for engine in compiled.engines],
        "evaluation": asdict(subject.held_out.source),
        "tokens": options.engine.accuracy_tokens,
        "shapes": [list(fitted.batches), list(fitted.sequences)],
        "device": torch_device(options.device).type,
        "machine": machine(),
        "versions": versions(),
    }

    def run() -> EngineAccuracyResult:
        from prox24_deploy.engines.accuracy import measure_accuracy

        began = time.perf_counter()
        question = _question(bundle, subject, options, fitted)
        least = min(fitted.batches)
        found: list[EngineAccuracy] = []
        missing: list[NotMeasured] = []
        failed: list[NotMeasured] = []
        for backend in backends:
            own = [engine for engine in compiled.engines if engine.backend == backend.name]
            try:
                found.append(measure_accuracy(backend, bundle.root, own, question, least, progress))
            except BackendMissingError as error:
                missing.append(NotMeasured(backend.name, str(error)))
            except EngineError as error:
                failed.append(NotMeasured(backend.name, str(error)))
        seconds = time.perf_counter() - began
        return EngineAccuracyResult(tuple(found), tuple(missing), tuple(failed), seconds)

    return bundle.stage(STAGE, EngineAccuracyResult, inputs, [], run)


def _question(
    bundle: Bundle, subject: Subject, options: BuildOptions, fitted: EngineOptions
) -> "Question":
    """How to open the PyTorch models, and the samples, in shapes that engines were compiled for."""
    from prox24_deploy.engines.accuracy import Question
    from prox24_deploy.model.directory import load_model, open_model_dir
    from prox24_deploy.model.subset import Shapes

    directories = {"dense": subject.directory, "sparse": open_model_dir(bundle.root / "pruned")}
    device = torch_device(options.device)
    return Question(
        recipe=subject.recipe,
        load=lambda twin: load_model(directories[twin], subject.recipe, device),
        directory=subject.directory.path,
        held_out=subject.held_out,
        tokens=options.engine.accuracy_tokens,
        shapes=Shapes(
            rows=max(fitted.batches),
            # A graph with a cache also decodes, so that it takes any number of tokens.
            least=1 if subject.recipe.cache else min(fitted.sequences),
            longest=max(fitted.sequences),
        ),
    )
