"""The stage that asks both models in PyTorch: accuracy of the pruned one against the dense."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import DeviceChoice
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.records import AccuracyStep, EvaluateResult, StepName
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import MEMORY_LIMIT, RunContext, torch_device
from prox24_deploy.pipeline.stages.quantize import quantized_of, tensors_of
from prox24_deploy.pipeline.stages.recover import pruned_before, shipped_of
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from torch import nn

    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateInputs:
    """What the accuracy of both models in PyTorch depends on; `before` is not yet recovered."""

    source: "ModelDir"
    pruned: Artifact
    before: Artifact | None
    quantized: Artifact | None
    held_out: "Samples"
    recipe: Recipe
    device: str
    versions: Mapping[str, str]
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)


def run(
    bundle: Bundle,
    context: RunContext,
    device_choice: DeviceChoice,
    progress: Progress,
    *,
    memory_limit: int | None = None,
) -> EvaluateResult:
    """Compare dense and pruned model on held-out samples."""
    inputs = EvaluateInputs(
        source=context.source,
        pruned=shipped_of(bundle),
        before=pruned_before(bundle),
        quantized=quantized_of(bundle),
        held_out=context.held_out,
        recipe=context.recipe,
        device=torch_device(device_choice).type,
        versions=numeric_versions(),
        memory_limit=memory_limit,
    )
    return replace(bundle.run(STAGE, inputs, progress), evaluation=context.held_out.source)


def _evaluate(inputs: EvaluateInputs, work: Workspace, progress: Progress) -> EvaluateResult:
    from prox24_deploy.model.directory import open_model_dir

    make_folder(work.kept)
    return compare_models(
        inputs.source,
        open_model_dir(inputs.pruned.path),
        inputs.recipe,
        inputs.held_out,
        inputs.device,
        progress,
        before=open_model_dir(inputs.before.path) if inputs.before else None,
        tensors=tensors_of(inputs.quantized),
        memory_limit=inputs.memory_limit,
        scratch=work.kept,
    )


def compare_models(
    source: "ModelDir",
    sparse: "ModelDir",
    recipe: Recipe,
    held_out: "Samples",
    device: str,
    progress: Progress,
    *,
    before: "ModelDir | None" = None,
    tensors: Path | None = None,
    memory_limit: int | None = None,
    scratch: Path | None = None,
) -> EvaluateResult:
    """Load the models of two directories, which one recipe fits, and compare them.

    The model as it was `before` it was recovered is compared first, if it is given. With `tensors`,
    the sparse one is compared once more, quantised as they say. Where two models do not fit into
    memory, or into `memory_limit` bytes, they are kept as `Memory` says.
    """
    import torch

    from prox24_deploy.evaluation.evaluate import evaluate_models
    from prox24_deploy.model.mapped import Memory

    place = torch.device(device)
    with TemporaryDirectory(dir=scratch) as folder:
        memory = Memory(folder=Path(folder), limit=memory_limit, models=2, samples=held_out.batches)

        def opened(directory: "ModelDir", *, changes: bool = False) -> "nn.Module":
            return memory.load(directory, recipe, place, changes=changes)

        dense = opened(source)
        found = [
            (name, evaluate_models(dense, model, recipe.task, held_out, source.path, progress))
            for name, model in _steps(opened, sparse, before, tensors)
        ]
    return replace(
        found[-1][1],
        seconds=sum(result.seconds for _, result in found),
        steps=tuple(AccuracyStep(name=name, metrics=r.metrics) for name, r in found[:-1]),
    )


def _steps(
    opened: "Callable[..., nn.Module]",
    sparse: "ModelDir",
    before: "ModelDir | None",
    tensors: Path | None,
) -> "Iterator[tuple[StepName, nn.Module]]":
    """What the sparse model was after each step; a model may change once the next is asked for."""
    from prox24_deploy.quantization.quantize import apply_quantized

    if before is not None:
        yield "pruned", opened(before)
    # What is quantised is written into the weights of the model.
    model = opened(sparse, changes=tensors is not None)
    yield "recovered" if before else "pruned", model
    if tensors is not None:
        apply_quantized(model, tensors)
        yield "quantized", model


STAGE = Stage(name="evaluate", result=EvaluateResult, run=_evaluate)
