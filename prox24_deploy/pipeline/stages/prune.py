"""The stage that prunes a model directory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import PRUNED, RECIPE
from prox24_deploy.bundle.stage import Stage, Workspace
from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.records import PruneResult
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.alike import require_alike
from prox24_deploy.pipeline.context import MEMORY_LIMIT, RunContext, torch_device
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.pruning.masks import MaskFiles
    from prox24_deploy.pruning.ranks import Ranks


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
    memory_limit: int | None = field(default=None, metadata=MEMORY_LIMIT)
    ranks: "Ranks | None" = field(
        default=None, metadata=unkeyed("says who takes part, not what comes of it")
    )
    text: TextOptions | None = field(
        default=None, metadata=unkeyed("names what differs; the samples are what comes of it")
    )


def require_usable(context: RunContext, asked: BuildOptions) -> None:
    """Before any work, refuse a choice of layers that leaves none, or names none of the model's.

    Raises:
        CalibrationError: there is too little text of the user's.
        UsageError: a glob matches no target, all targets are left dense, or the plan is of another
            model.
    """
    options = asked.prune
    if asked.text.calibration:
        from prox24_deploy.pruning.prune import require_enough

        # What the model writes itself is there only later, and is then held to the same.
        require_enough(options, len(context.calibration.batches))
    if not (options.include or options.exclude or options.planned_dense):
        return
    from prox24_deploy.model.directory import structure_of
    from prox24_deploy.pruning.selection import left_dense, target_paths

    recipe, model = context.recipe, structure_of(context.source, context.recipe)
    dense = left_dense(recipe, model, options)
    paths = target_paths(recipe, model)
    if dense.keys() >= set(paths):
        raise UsageError(
            f"All target layers of recipe {recipe.family} are left dense, first {paths[0]}: "
            f"{dense[paths[0]]}; leave one to prune."
        )


def prune_inputs(
    context: RunContext, options: BuildOptions, ranks: "Ranks | None" = None
) -> PruneInputs:
    """The inputs of the stage that prunes."""
    return PruneInputs(
        source=context.source,
        recipe=context.recipe,
        calibration=context.calibration,
        held_out=context.held_out,
        options=options.prune,
        masks=context.masks,
        device=torch_device(options.device).type,
        versions=numeric_versions(),
        memory_limit=options.memory_limit,
        ranks=ranks,
        text=options.text,
    )


def run(
    bundle: Bundle,
    context: RunContext,
    options: BuildOptions,
    progress: Progress,
    ranks: "Ranks | None" = None,
) -> PruneResult:
    """Prune every target layer into `pruned/`; the bundle is then one of this model.

    Where other processes share the run they are in `help_with` meanwhile.
    """
    inputs = prune_inputs(context, options, ranks)
    result = bundle.run(STAGE, inputs, progress)
    if ranks is not None:
        ranks.told(_DONE)
    _describe(bundle, context, options)
    # The same samples may come from another place than when they were pruned on.
    return replace(result, calibration=context.calibration.source, held_out=context.held_out.source)


_BEGIN, _DONE = "begin", "done"


def help_with(context: RunContext, options: BuildOptions, ranks: "Ranks") -> None:
    """Take part in pruning, if process 0 has to, and write nothing.

    Raises:
        RankError: this process has other inputs than process 0, or another one is gone.
        Prox24Error: what pruning raises.
    """
    import torch

    from prox24_deploy.pruning.directory import help_to_prune

    while ranks.told("") == _BEGIN:
        inputs = prune_inputs(context, options, ranks)
        if (written := ranks.told(inputs.calibration)).source.kind == "written":
            # What the model writes lies in the bundle.
            inputs = replace(inputs, calibration=written)
        require_alike(inputs, inputs.text, ranks)
        help_to_prune(
            inputs.source,
            inputs.recipe,
            inputs.calibration,
            inputs.held_out,
            inputs.options,
            device=torch.device(inputs.device),
            memory_limit=inputs.memory_limit,
            ranks=ranks,
        )


def _prune(inputs: PruneInputs, work: Workspace, progress: Progress) -> PruneResult:
    import torch

    from prox24_deploy.pruning.directory import prune_directory
    from prox24_deploy.pruning.ranks import ALONE

    if inputs.ranks is not None:
        inputs.ranks.told(_BEGIN)
        inputs.ranks.told(inputs.calibration)
        require_alike(inputs, inputs.text, inputs.ranks)
    return prune_directory(
        inputs.source,
        inputs.recipe,
        inputs.calibration,
        inputs.held_out,
        inputs.options,
        device=torch.device(inputs.device),
        memory_limit=inputs.memory_limit,
        ranks=inputs.ranks or ALONE,
        solved=work.kept,
        out=work.partial / PRUNED,
        begin=work.begin,
        progress=progress,
    )


STAGE = Stage(name="prune", result=PruneResult, run=_prune, outputs=(PRUNED,), refuses=True)


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
