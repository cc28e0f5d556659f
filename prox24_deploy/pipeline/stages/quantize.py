"""The stage that quantises the pruned model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import QUANTIZATION_FILE, QUANTIZED, QUANTIZED_TENSORS
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import BuildOptions, RecoverOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import PruneResult
from prox24_deploy.core.types import Progress, QuantizedFormat
from prox24_deploy.engines.base import Backend, Quantizing
from prox24_deploy.pipeline.context import MEMORY_LIMIT, RunContext, torch_device
from prox24_deploy.pipeline.stages.recover import shipped_of
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.quantization.aware import Through

_RECORD = TypeAdapter(QuantizeResult)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeInputs:
    """What the quantised model depends on; `layers` are 2:4.

    `training` says how numbers are trained against the model `source`; None for not at all.
    """

    pruned: Artifact
    layers: tuple[str, ...]
    recipe: Recipe
    calibration: "Samples"
    format: QuantizedFormat
    device: str
    versions: Mapping[str, str]
    training: RecoverOptions | None = None
    source: "ModelDir | None" = None
    seed: int | None = None
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)


def require_usable(options: BuildOptions, context: RunContext, backends: Sequence[Backend]) -> None:
    """Refuse what can be seen to be wrong before any work.

    Raises:
        CalibrationError: there are too few calibration samples for ranges.
        UsageError: a backend cannot run quantised models, or there is nothing to do.
    """
    require_effect(options)
    if options.quantize is not None:
        from prox24_deploy.quantization.quantize import require_samples

        require_backends(options, backends)
        require_samples(context.calibration)


def require_effect(options: BuildOptions) -> None:
    """Refuse options that leave the model as it is, or one of them.

    Raises:
        UsageError: names the option.
    """
    if options.quantize is None and options.prune.method == "none":
        raise UsageError(
            "--method none leaves the model as it is; add --quantize fp8 or int8, or leave it out."
        )
    if options.quantize is None and options.recover and options.recover.quantized is not None:
        raise UsageError(
            "--recover-quantized has no effect without --quantize; add --quantize int8."
        )


def require_backends(options: BuildOptions, backends: Sequence[Backend]) -> None:
    """Refuse a backend whose GPU has no kernels for the format.

    Raises:
        UsageError: names it, and what its GPU lacks.
    """
    for backend in backends:
        if not isinstance(backend, Quantizing) or options.quantize is None:
            continue
        if why := backend.quantize_obstacle(options.quantize):
            raise UsageError(
                f"Backend {backend.name} cannot run --quantize {options.quantize}: {why}."
            )


def run(
    bundle: Bundle,
    context: RunContext,
    pruned: PruneResult,
    options: BuildOptions,
    progress: Progress,
) -> QuantizeResult | None:
    """Quantise the pruned model into `quantized/`; None where that was not asked for."""
    if options.quantize is None:
        if STAGE.name in bundle.manifest.stages:
            bundle.forget(STAGE.name)
        return None
    training = _training(options.recover)
    inputs = QuantizeInputs(
        pruned=shipped_of(bundle),
        layers=tuple(layer.name for layer in pruned.layers if layer.status == "pruned"),
        recipe=context.recipe,
        calibration=context.calibration,
        format=options.quantize,
        device=torch_device(options.device).type,
        versions=numeric_versions(),
        training=training,
        source=context.source if training else None,
        seed=options.text.seed if training else None,
        memory_limit=options.memory_limit,
    )
    result = bundle.run(STAGE, inputs, progress)
    # The same samples may come from another place than when ranges were found on them.
    return replace(result, calibration=context.calibration.source)


def _training(recover: RecoverOptions | None) -> RecoverOptions | None:
    """How numbers are trained: as weights were, for steps of their own."""
    if recover is None or recover.quantized is None:
        return None
    own = replace(recover, steps=recover.quantized, minutes=None, embeddings=False)
    return replace(own, quantized=None, processes=1)


def _through(inputs: QuantizeInputs, directory: "ModelDir", kept: Path) -> "Through | None":
    if inputs.training is None or inputs.source is None:
        return None
    import torch

    from prox24_deploy.quantization.aware import Through
    from prox24_deploy.recovery.recover import Recovery

    asked = Recovery(
        dense=inputs.source,
        pruned=directory,
        recipe=inputs.recipe,
        calibration=inputs.calibration,
        options=inputs.training,
        seed=inputs.seed or 0,
        device=torch.device(inputs.device),
    )
    return Through(asked=asked, kept=kept)


def quantized_of(bundle: Bundle) -> Artifact | None:
    """What this stage left in a bundle; None where it has not been run there."""
    return bundle.artifact(QUANTIZED) if STAGE.name in bundle.manifest.stages else None


def tensors_of(quantized: Artifact | None) -> Path | None:
    """The file with the numbers and scales."""
    return None if quantized is None else quantized.snapshot.root / QUANTIZED_TENSORS


def _quantize(inputs: QuantizeInputs, work: Workspace, progress: Progress) -> QuantizeResult:
    import torch

    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.model.mapped import Memory
    from prox24_deploy.quantization.quantize import quantize_directory

    directory = open_model_dir(inputs.pruned.path)
    result = quantize_directory(
        directory,
        inputs.recipe,
        inputs.calibration,
        inputs.format,
        sparse=inputs.layers,
        device=torch.device(inputs.device),
        out=work.partial / QUANTIZED_TENSORS,
        progress=progress,
        training=_through(inputs, directory, work.kept),
        memory=Memory(folder=work.kept, limit=inputs.memory_limit, models=1),
    )
    write_atomic(work.partial / QUANTIZATION_FILE, _RECORD.dump_json(result, indent=1) + b"\n")
    return result


STAGE = Stage(name="quantize", result=QuantizeResult, run=_quantize, outputs=(QUANTIZED,))
