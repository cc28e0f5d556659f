"""The stage that measures accuracy through the engines, and their distance from PyTorch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import ENGINES, ONNX
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import BuildOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.accuracy import EngineAccuracy, EngineAccuracyResult
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.records import CompileResult, Engine, NotMeasured
from prox24_deploy.core.types import Progress
from prox24_deploy.engines.base import Backend
from prox24_deploy.pipeline.context import MEMORY_LIMIT, RunContext, fitted_shapes, torch_device
from prox24_deploy.pipeline.stages.quantize import quantized_of, tensors_of
from prox24_deploy.pipeline.stages.recover import shipped_of

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.pipeline.stages.engine_metrics import EvaluationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAccuracyInputs:
    """What the accuracy through engines, and their distance from PyTorch, depend on."""

    source: "ModelDir"
    pruned: Artifact
    quantized: Artifact | None
    onnx: Artifact
    compiled: Artifact
    engines: tuple[Engine, ...]
    backends: tuple[Backend, ...]
    held_out: "Samples"
    recipe: Recipe
    tokens: int
    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    decodes: bool
    device: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)


def run(
    bundle: Bundle,
    context: RunContext,
    compiled: CompileResult,
    backends: Sequence[Backend],
    options: BuildOptions,
    progress: Progress,
) -> EngineAccuracyResult:
    """Measure accuracy through the engines of every backend, and how far they are from PyTorch.

    A backend whose engines cannot run here is named with the reason, and so is one whose engines
    fail, which fails the release.
    """
    fitted = fitted_shapes(options.engine, context.source.config, context.recipe)
    inputs = EngineAccuracyInputs(
        source=context.source,
        pruned=shipped_of(bundle),
        quantized=quantized_of(bundle),
        onnx=bundle.artifact(ONNX),
        compiled=bundle.artifact(ENGINES),
        engines=compiled.engines,
        backends=tuple(backends),
        held_out=context.held_out,
        recipe=context.recipe,
        tokens=options.engine_tokens,
        batches=fitted.batches,
        sequences=fitted.sequences,
        decodes=bool(fitted.pasts),
        device=torch_device(options.device).type,
        machine=machine(),
        versions=versions(),
        memory_limit=options.memory_limit,
    )
    return bundle.run(STAGE, inputs, progress)


def _measure(
    inputs: EngineAccuracyInputs, work: Workspace, progress: Progress
) -> EngineAccuracyResult:
    from prox24_deploy.pipeline.stages.engine_metrics import measure_accuracy

    began = time.perf_counter()
    make_folder(work.kept)
    request = _request(inputs, work.kept)
    least = min(inputs.batches)
    found: list[EngineAccuracy] = []
    missing: list[NotMeasured] = []
    failed: list[NotMeasured] = []
    for backend in inputs.backends:
        own = [engine for engine in inputs.engines if engine.backend == backend.name]
        try:
            found.append(measure_accuracy(backend, work.root, own, request, least, progress))
        except BackendMissingError as error:
            missing.append(NotMeasured(backend=backend.name, reason=str(error)))
        except EngineError as error:
            failed.append(NotMeasured(backend=backend.name, reason=str(error)))
    seconds = time.perf_counter() - began
    return EngineAccuracyResult(
        engines=tuple(found), not_measured=tuple(missing), failed=tuple(failed), seconds=seconds
    )


STAGE = Stage(name="accuracy", result=EngineAccuracyResult, run=_measure)


def _request(inputs: EngineAccuracyInputs, scratch: Path) -> "EvaluationRequest":
    """How to open the PyTorch models, and the samples, in shapes that engines were compiled for."""
    import torch

    from prox24_deploy.evaluation.subset import EngineShapes
    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.model.mapped import Memory
    from prox24_deploy.pipeline.stages.engine_metrics import EvaluationRequest
    from prox24_deploy.quantization.quantize import load_quantized

    tensors = {"dense": None, "sparse": tensors_of(inputs.quantized)}
    directories = {"dense": inputs.source, "sparse": open_model_dir(inputs.pruned.path)}
    device = torch.device(inputs.device)
    # The engine on a CPU has the weights once more.
    memory = Memory(
        folder=scratch, limit=inputs.memory_limit, models=2, samples=inputs.held_out.batches
    )
    return EvaluationRequest(
        recipe=inputs.recipe,
        load=lambda twin: load_quantized(
            directories[twin], inputs.recipe, device, tensors[twin], memory
        ),
        directory=inputs.source.path,
        held_out=inputs.held_out,
        tokens=inputs.tokens,
        shapes=EngineShapes(
            rows=max(inputs.batches),
            # A graph with a cache also decodes, so that it takes any number of tokens.
            least=1 if inputs.recipe.cache else min(inputs.sequences),
            longest=max(inputs.sequences),
        ),
        decodes=inputs.decodes,
        scratch=scratch,
    )
