"""The command before all others: a dense model in a basis in which pruning drops less."""

from pathlib import Path

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core.atomic import require_absent
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.rotation import RotateResult
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import read_context, torch_device
from prox24_deploy.pipeline.room import require_room_for_copy


def rotate(
    model_dir: Path, out: Path, options: BuildOptions, *, steps: int, progress: Progress
) -> RotateResult:
    """Write a dense model directory `out` that computes what another does; see `rotate_directory`.

    Raises:
        UsageError: `out` is there, or `steps` is no positive number.
        Prox24Error: what `prune` raises for the same model and text, and `rotate_directory`.
    """
    if steps < 1:
        raise UsageError(f"A search takes 1 step or more, got {steps}.")
    require_absent(out)
    context = read_context(model_dir, out, options, progress)
    require_room_for_copy(out, context.source)
    from prox24_deploy.rotation.rotate import rotate_directory

    return rotate_directory(
        context.source,
        context.recipe,
        context.calibration,
        out,
        device=torch_device(options.device),
        memory_limit=options.memory_limit,
        steps=steps,
        progress=progress,
    )
