"""The command that writes a dense model in a basis in which pruning drops less."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prox24_deploy.cli import options as arguments
from prox24_deploy.cli import tables
from prox24_deploy.cli.hub import local_model
from prox24_deploy.cli.progress import progress as shown
from prox24_deploy.cli.terminal import print_json, say, stderr
from prox24_deploy.config.options import ROTATE_STEPS, BuildOptions, TextOptions


def rotate(
    model_dir: arguments.ModelArg,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Model directory to write; default NAME-rotated.",
            readable=False,
        ),
    ] = None,
    recipe: arguments.RecipeOpt = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to search on; repeatable. Default: CPython's docs.", readable=False
        ),
    ] = None,
    column: arguments.ColumnOpt = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search.")] = ROTATE_STEPS,
    device: arguments.DeviceOpt = "auto",
    memory_limit: arguments.MemoryOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Write a dense decoder that computes the same, of which 2:4 drops less; then build that."""
    from prox24_deploy.packaging.naming import rotated_out
    from prox24_deploy.pipeline.rotate import rotate as run

    options = BuildOptions(
        recipe=recipe,
        text=TextOptions(calibration=tuple(calibration or ()), column=column),
        device=device,
        memory_limit_gib=memory_limit,
    )
    model_dir = local_model(model_dir)
    where = out or rotated_out(model_dir)
    with shown(stderr, where) as progress:
        found = run(model_dir, where, options, steps=steps, progress=progress)
    if as_json:
        print_json(asdict(found))
        return
    for line in tables.rotation_lines(found):
        say(line)
    say(f"The dense model is in {where}; build that: prox24-deploy build {where}")
