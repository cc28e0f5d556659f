"""The stage that asks both models in PyTorch: accuracy of the pruned one against the dense."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import PRUNED
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import DeviceChoice
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.records import AccuracyStep, EvaluateResult
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import RunContext, torch_device
from prox24_deploy.pipeline.stages.quantize import quantized_of, tensors_of
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateInputs:
    """What the accuracy of both models in PyTorch depends on."""

    source: "ModelDir"
    pruned: Artifact
    quantized: Artifact | None
    held_out: "Samples"
    recipe: Recipe
    device: str
    versions: Mapping[str, str]


def run(
    bundle: Bundle, context: RunContext, device_choice: DeviceChoice, progress: Progress
) -> EvaluateResult:
    """Compare dense and pruned model on held-out samples."""
    inputs = EvaluateInputs(
        source=context.source,
        pruned=bundle.artifact(PRUNED),
        quantized=quantized_of(bundle),
        held_out=context.held_out,
        recipe=context.recipe,
        device=torch_device(device_choice).type,
        versions=numeric_versions(),
    )
    return replace(bundle.run(STAGE, inputs, progress), evaluation=context.held_out.source)


def _evaluate(inputs: EvaluateInputs, _: Workspace, progress: Progress) -> EvaluateResult:
    from prox24_deploy.model.directory import open_model_dir

    return compare_models(
        inputs.source,
        open_model_dir(inputs.pruned.path),
        inputs.recipe,
        inputs.held_out,
        inputs.device,
        progress,
        tensors=tensors_of(inputs.quantized),
    )


def compare_models(
    source: "ModelDir",
    sparse: "ModelDir",
    recipe: Recipe,
    held_out: "Samples",
    device: str,
    progress: Progress,
    *,
    tensors: Path | None = None,
) -> EvaluateResult:
    """Load the models of two directories, which one recipe fits, and compare them.

    With `tensors`, the second is compared once more, quantised as they say.
    """
    import torch

    from prox24_deploy.evaluation.evaluate import evaluate_models
    from prox24_deploy.model.directory import load_model
    from prox24_deploy.quantization.quantize import apply_quantized

    dense_model, model = (
        load_model(each, recipe, torch.device(device)) for each in (source, sparse)
    )

    def compared() -> EvaluateResult:
        return evaluate_models(dense_model, model, recipe.task, held_out, source.path, progress)

    pruned = compared()
    if tensors is None:
        return pruned
    apply_quantized(model, tensors)
    last = compared()
    return replace(
        last,
        seconds=pruned.seconds + last.seconds,
        steps=(AccuracyStep(name="pruned", metrics=pruned.metrics),),
    )


STAGE = Stage(name="evaluate", result=EvaluateResult, run=_evaluate)
