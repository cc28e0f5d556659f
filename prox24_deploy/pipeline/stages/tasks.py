"""The stage that runs tasks of the lm-evaluation-harness on both models."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import versions
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import BuildOptions, HarnessOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.accuracy import TaskScores
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.snapshot import Snapshot, take_snapshot
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import MEMORY_LIMIT, RunContext, torch_device
from prox24_deploy.pipeline.stages.quantize import quantized_of, tensors_of
from prox24_deploy.pipeline.stages.recover import shipped_of

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir


@dataclass(frozen=True, slots=True)
class TaskData:
    """The folder with the data of tasks, every file of it hashed."""

    snapshot: Snapshot

    def fingerprint(self) -> dict[str, JsonValue]:
        """Hash of each file."""
        return {name: state.sha256 for name, state in self.snapshot.files.items()}

    def require_unchanged(self) -> None:
        """Refuse data that was written since.

        Raises:
            UsageError: names the first file.
        """
        if (name := self.snapshot.changed()) is not None:
            raise UsageError(
                f"{self.snapshot.root / name} was changed while tasks were run on it, so that "
                "their scores are not kept; run the same command again."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInputs:
    """What the scores of both models on tasks depend on."""

    source: "ModelDir"
    pruned: Artifact
    quantized: Artifact | None
    tasks: tuple[str, ...]
    data: TaskData | None
    limit: int | None
    recipe: Recipe
    device: str
    harness: str
    versions: Mapping[str, str]
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)

    @property
    def options(self) -> HarnessOptions:
        """The tasks as they were asked for."""
        folder = self.data.snapshot.root if self.data else None
        return HarnessOptions(tasks=self.tasks, data=folder, limit=self.limit)


def require_usable(options: HarnessOptions, recipe: Recipe) -> None:
    """Refuse what can be seen to be wrong before any work.

    Raises:
        BackendMissingError: the harness is not installed.
        UsageError: an option has no effect, or the model does not generate text.
    """
    if not options.tasks:
        if options.data is not None or options.limit is not None:
            raise UsageError(
                "--lm-eval-data and --lm-eval-limit have no effect without a task; add --lm-eval "
                "TASK."
            )
        return
    if not recipe.kind.decoder_alone:
        raise UsageError(
            f"--lm-eval {options.tasks[0]} is for models of the task text-generation, and those of "
            f"recipe {recipe.family} are for {recipe.task}; leave it out."
        )
    from prox24_deploy.evaluation.harness import require_harness

    require_harness()


def verify(bundle: Bundle, options: HarnessOptions) -> None:
    """Load every task once, so that what is missing is said before hours of work.

    Raises:
        UsageError: a task is unknown, or its data is not here.
    """
    if options.tasks:
        from prox24_deploy.evaluation.harness import open_tasks

        with open_tasks(options, bundle.partial / "lm-eval"):
            pass


def run(
    bundle: Bundle, context: RunContext, options: BuildOptions, progress: Progress
) -> TaskScores | None:
    """Score both models on the same documents; None where no task was asked for."""
    asked = options.harness
    if not asked.tasks:
        if STAGE.name in bundle.manifest.stages:
            bundle.forget(STAGE.name)
        return None
    from prox24_deploy.evaluation.harness import harness_version

    inputs = TaskInputs(
        source=context.source,
        pruned=shipped_of(bundle),
        quantized=quantized_of(bundle),
        tasks=asked.tasks,
        data=TaskData(take_snapshot(asked.data, _files_below)) if asked.data else None,
        limit=asked.limit,
        recipe=context.recipe,
        device=torch_device(options.device).type,
        harness=harness_version(),
        versions=versions(),
        memory_limit=options.memory_limit,
    )
    return bundle.run(STAGE, inputs, progress)


def _score(inputs: TaskInputs, work: Workspace, progress: Progress) -> TaskScores:
    import torch

    from prox24_deploy.evaluation.harness import open_tasks, run_tasks, task_metrics
    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.model.mapped import Memory
    from prox24_deploy.model.processors import load_tokenizer
    from prox24_deploy.quantization.quantize import load_quantized

    began = time.perf_counter()
    tokenizer = load_tokenizer(inputs.source)
    device = torch.device(inputs.device)
    memory = Memory(folder=work.kept, limit=inputs.memory_limit, models=1)
    results: list[Mapping[str, Any]] = []
    with open_tasks(inputs.options, work.partial / "lm-eval") as load:
        twins = (
            (inputs.source, None),
            (open_model_dir(inputs.pruned.path), tensors_of(inputs.quantized)),
        )
        for directory, tensors in twins:
            progress(STAGE.name, len(results), 2)
            # The harness moves a model as a whole.
            model = load_quantized(directory, inputs.recipe, device, tensors, memory, changes=True)
            results.append(run_tasks(model, tokenizer, load(), inputs.limit))
            del model
    progress(STAGE.name, 2, 2)
    metrics, left_out, documents = task_metrics(*results)
    seconds = time.perf_counter() - began
    return TaskScores(
        version=inputs.harness,
        limit=inputs.limit,
        documents=documents,
        metrics=metrics,
        left_out=left_out,
        seconds=seconds,
    )


STAGE = Stage(name="tasks", result=TaskScores, run=_score)


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
