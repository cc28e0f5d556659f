"""The stage that trains the kept weights of the pruned model against the dense one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import (
    MANIFEST_FILE,
    PRUNED,
    RECOVERED,
    RECOVERED_RECIPE,
    shipped_folder,
)
from prox24_deploy.bundle.manifest import Manifest, read_manifest, unpruned
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import BuildOptions, RecoverOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import BundleError, ModelDirError, UsageError
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.core.types import Progress
from prox24_deploy.model.config_file import has_one_score
from prox24_deploy.pipeline.context import RunContext, require_apart, torch_device
from prox24_deploy.pipeline.stages import prune
from prox24_deploy.pipeline.stages.versions import numeric_versions

if TYPE_CHECKING:
    import torch

    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverInputs:
    """What the recovered model depends on; `pruned` is of this bundle or any directory."""

    source: "ModelDir"
    pruned: "Artifact | ModelDir"
    recipe: Recipe
    calibration: "Samples"
    options: RecoverOptions
    seed: int
    device: str
    versions: Mapping[str, str]


def require_usable(options: BuildOptions, context: RunContext) -> None:
    """Refuse what can be seen to be wrong before any work.

    Raises:
        CalibrationError: there are too few calibration samples to withhold some.
        UsageError: an option means nothing, or nothing is pruned that could be recovered.
    """
    require_effect(options)
    if options.recover is None:
        return
    device = torch_device(options.device)
    _require_logits(options.recover, context)
    from prox24_deploy.recovery.schedule import require_samples

    require_samples(context.calibration)
    _need(context, options.recover, device, options.memory_limit)


def require_effect(options: BuildOptions) -> None:
    """Refuse a recovery of nothing, or one that is none.

    Raises:
        UsageError: says what was asked for.
    """
    if options.recover is None:
        return
    options.recover.require_usable()
    if options.prune.method == "none":
        raise UsageError(
            "--method none prunes nothing that --recover could recover; leave one of them out."
        )


def _require_logits(options: RecoverOptions, context: RunContext) -> None:
    """Refuse options of the comparison of logits for a model that gives none, or but one."""
    task = context.recipe.task
    one = has_one_score(task, context.source.config)
    if TASKS[task].judged_by != "embeddings" and not one:
        return
    idle = [f"--recover-top-k {options.top_k}"] if options.top_k is not None else []
    if options.temperature != 1:
        idle.append(f"--recover-temperature {options.temperature:g}")
    if idle:
        raise UsageError(
            f"{idle[0]} has no effect on a model for {task}, which gives "
            f"{'one score and no classes' if one else 'no logits'}; leave it out."
        )


def _need(
    context: RunContext, options: RecoverOptions, device: "torch.device", limit: int | None
) -> int:
    """Bytes that the recovery takes, which are there, as are the processes.

    Raises:
        BackendMissingError: what several processes need is not installed.
        UsageError: there is too little memory, or there are too few GPUs.
    """
    from prox24_deploy.recovery.memory import require_memory
    from prox24_deploy.recovery.processes import require_processes

    require_processes(options.processes, device)
    need = require_memory(context.source, context.recipe, options, device, limit)
    log.info("recovery takes %s before activations", need)
    return need.total


def run(
    bundle: Bundle, context: RunContext, options: BuildOptions, progress: Progress
) -> RecoverResult | None:
    """Recover the pruned model into `recovered/`; None where that was not asked for."""
    if options.recover is None:
        if STAGE.name in bundle.manifest.stages:
            bundle.forget(STAGE.name)
        return None
    return run_on(bundle, bundle.artifact(PRUNED), context, options, options.recover, progress)


def run_on(
    bundle: Bundle,
    pruned: "Artifact | ModelDir",
    context: RunContext,
    options: BuildOptions,
    recover: RecoverOptions,
    progress: Progress,
) -> RecoverResult:
    """Recover a pruned model into `recovered/` of a bundle."""
    inputs = RecoverInputs(
        source=context.source,
        pruned=pruned,
        recipe=context.recipe,
        calibration=context.calibration,
        # What comes after quantisation changes nothing here.
        options=replace(recover, quantized=None),
        seed=options.text.seed,
        device=torch_device(options.device).type,
        versions=numeric_versions(),
    )
    result = bundle.run(STAGE, inputs, progress)
    _forget_stale(bundle)
    bundle.write_late(RECOVERED_RECIPE, context.recipe_text.encode())
    # The same samples may come from another place than when they were trained on.
    return replace(result, calibration=context.calibration.source)


def note_options(bundle: Bundle, recover: RecoverOptions) -> None:
    """Enter in the manifest what a bundle was recovered by, as that of one build would have it."""
    asked = json.loads(json.dumps(asdict(recover)))
    bundle.manifest.options = {**bundle.manifest.options, "recover": asked}
    bundle.save()


def _forget_stale(bundle: Bundle) -> None:
    """Remove what was made of the pruned model while that was the one to ship."""
    stages = dict(bundle.manifest.stages)
    for name, entry in stages.items():
        stale = PRUNED in entry.reads and RECOVERED not in entry.reads and name != STAGE.name
        if stale and name in bundle.manifest.stages:
            bundle.forget(name)


def is_own(pruned: Path, out: Path | None) -> bool:
    """Whether what is recovered belongs to the bundle that it goes to; else `out` is another.

    Raises:
        BundleError: `out` holds a model that was pruned there, which the recovered one is not of,
            or lies in `pruned`.
        ModelDirError: there is no `pruned`.
        UsageError: there is nowhere to write.
    """
    if not pruned.is_dir():
        kind = "is a file" if pruned.exists() else "does not exist"
        raise ModelDirError(f"{pruned} {kind}; pass a bundle or a model directory that is 2:4.")
    is_bundle = (pruned / MANIFEST_FILE).is_file()
    if is_bundle and (out is None or out.resolve() == pruned.resolve()):
        require_pruned_here(pruned, read_manifest(pruned))
        return True
    if out is None:
        raise UsageError(
            f"{pruned} is not a bundle that the recovered model could go to; pass another folder "
            "with -o."
        )
    if (out / MANIFEST_FILE).is_file() and prune.STAGE.name in read_manifest(out).stages:
        raise BundleError(
            f"Output {out} holds a model that was pruned there, and {pruned} is another; pass a "
            f"new folder with -o, or recover {out} itself."
        )
    require_apart(out, pruned, "what is recovered,")
    return False


def require_teacher(root: Path, teacher: "ModelDir") -> None:
    """Refuse a teacher with other weights than the model that a bundle was pruned from.

    Raises:
        ModelDirError: what is reported of the bundle would be held against another model.
    """
    entry = read_manifest(root).stages[prune.STAGE.name]
    if _weights(entry.inputs["source"]) != _weights(teacher.fingerprint()):
        raise ModelDirError(
            f"Bundle {root} was pruned from other weights than those of the teacher "
            f"{teacher.path}; pass the model that it was pruned from as --teacher, or recover "
            f"{root / PRUNED} into a bundle of its own with -o."
        )


def _weights(fingerprint: Any) -> set[str]:
    """Hashes of the weight files that the fingerprint of a model directory names."""
    return {digest for name, digest in fingerprint.items() if name.endswith(".safetensors")}


def require_pruned_here(root: Path, manifest: Manifest) -> None:
    """Refuse a bundle that holds but the recovered model of one that was pruned elsewhere.

    Raises:
        BundleError: says what to do with it.
    """
    if why := unpruned(manifest):
        raise BundleError(f"Nothing can be made of bundle {root}: {why}.")


def forget_foreign(bundle: Bundle) -> None:
    """Remove a model that was recovered from another pruned one than that of the bundle."""
    entry = bundle.manifest.stages.get(STAGE.name)
    if entry is not None and PRUNED not in entry.reads:
        bundle.forget(STAGE.name)


def shipped_of(bundle: Bundle) -> Artifact:
    """The sparse model that everything later is made of: recovered, or as it was pruned."""
    return bundle.artifact(shipped_folder(bundle.manifest.files))


def pruned_before(bundle: Bundle) -> Artifact | None:
    """The pruned model where that is not what is shipped."""
    return bundle.artifact(PRUNED) if STAGE.name in bundle.manifest.stages else None


def _recover(inputs: RecoverInputs, work: Workspace, progress: Progress) -> RecoverResult:
    import torch

    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.recovery.memory import estimated
    from prox24_deploy.recovery.recover import Recovery, recover_directory

    pruned = inputs.pruned
    asked = Recovery(
        dense=inputs.source,
        pruned=open_model_dir(pruned.path) if isinstance(pruned, Artifact) else pruned,
        recipe=inputs.recipe,
        calibration=inputs.calibration,
        options=inputs.options,
        seed=inputs.seed,
        device=torch.device(inputs.device),
        needed=estimated(inputs.source, inputs.recipe, inputs.options, inputs.device),
        texts=work.shared,
    )
    return recover_directory(asked, kept=work.kept, out=work.partial / RECOVERED, progress=progress)


STAGE = Stage(name="recover", result=RecoverResult, run=_recover, outputs=(RECOVERED,))
