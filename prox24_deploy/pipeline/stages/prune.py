"""The stage that prunes a model directory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import PRUNED, RECIPE
from prox24_deploy.bundle.stage import Stage, Workspace
from prox24_deploy.config.options import BuildOptions, DeviceChoice, PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.records import PruneResult
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import RunContext, torch_device
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.pruning.masks import MaskFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneInputs:
    """What the pruned model depends on; `masks` are the files that `options` name."""

    source: "ModelDir"
    recipe: Recipe
    calibration: "Samples"
    held_out: "Samples"
    options: PruneOptions
    masks: "MaskFiles | None"
    device: str
    versions: Mapping[str, str]


def prune_inputs(
    context: RunContext, options: PruneOptions, device_choice: DeviceChoice
) -> PruneInputs:
    """The inputs of the stage that prunes."""
    return PruneInputs(
        source=context.source,
        recipe=context.recipe,
        calibration=context.calibration,
        held_out=context.held_out,
        options=options,
        masks=context.masks,
        device=torch_device(device_choice).type,
        versions=numeric_versions(),
    )


def run(
    bundle: Bundle,
    context: RunContext,
    options: BuildOptions,
    progress: Progress,
) -> PruneResult:
    """Prune every target layer into `pruned/`; the bundle is then one of this model."""
    inputs = prune_inputs(context, options.prune, options.device)
    result = bundle.run(STAGE, inputs, progress)
    _describe(bundle, context, options)
    # The same samples may come from another place than when they were pruned on.
    return replace(result, calibration=context.calibration.source, held_out=context.held_out.source)


def _prune(inputs: PruneInputs, work: Workspace, progress: Progress) -> PruneResult:
    import torch

    from prox24_deploy.pruning.prune import prune_directory

    return prune_directory(
        inputs.source,
        inputs.recipe,
        inputs.calibration,
        inputs.held_out,
        inputs.options,
        device=torch.device(inputs.device),
        solved=work.kept,
        out=work.partial / PRUNED,
        progress=progress,
    )


STAGE = Stage(name="prune", result=PruneResult, run=_prune, outputs=(PRUNED,))


def _describe(bundle: Bundle, context: RunContext, options: BuildOptions) -> None:
    """Enter in the manifest what the pruned model in the bundle was made from and by what."""
    from prox24_deploy.model.directory import model_info

    manifest = bundle.manifest
    manifest.model = model_info(context.source, context.recipe, name=context.name)
    manifest.recipe = context.recipe_text
    manifest.options = json.loads(json.dumps(asdict(options), default=str))
    manifest.seed = options.text.seed
    manifest.versions = versions()
    manifest.machine = machine()
    manifest.complete = False
    bundle.write_late(RECIPE, context.recipe_text.encode())
