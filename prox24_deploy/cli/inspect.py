"""Commands that look at a model, a file, a bundle or this machine, and make nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prox24_deploy.bundle.layout import MANIFEST_FILE
from prox24_deploy.cli import options as arguments
from prox24_deploy.cli import tables
from prox24_deploy.cli.hub import local_model, without_address
from prox24_deploy.cli.progress import progress as shown
from prox24_deploy.cli.terminal import print_json, print_table, say, stderr
from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.core.errors import BundleError

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.planning import Plan
    from prox24_deploy.graph.check.judgement import CheckReport

_TEXT = TextOptions()
# Of a line that is rather read than searched.
_READ_WIDTH = 100


def plan(
    model_dir: arguments.ModelArg,
    *,
    out: arguments.PlanOutOpt = None,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.CalibrationOpt = None,
    column: arguments.ColumnOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    shapes: arguments.ShapesOpt = None,
    eager: arguments.EagerOpt = False,
    dtype: arguments.PlanDTypeOpt = None,
    quantize: arguments.PlanQuantizeOpt = "none",
    max_loss: arguments.MaxLossOpt = None,
    layers: arguments.LayersOpt = None,
    sensitivity: arguments.SensitivityOpt = True,
    gpu_profile: arguments.ProfileOpt = None,
    save_profile: arguments.SaveProfileOpt = None,
    device: arguments.DeviceOpt = "auto",
    memory_limit: arguments.MemoryOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Time dense against sparse GEMMs on this GPU and say which layers are worth pruning."""
    from prox24_deploy.engines.cusparselt.planning import write_plan
    from prox24_deploy.engines.cusparselt.profile import read_profile, write_profile
    from prox24_deploy.pipeline import plan as planner

    options = BuildOptions(
        recipe=recipe,
        text=TextOptions(
            calibration=tuple(calibration or ()),
            column=column,
            calibration_tokens=calibration_tokens,
        ),
        prune=PruneOptions(max_loss=max_loss, max_layers=layers),
        device=device,
        memory_limit_gib=memory_limit,
        dtype=dtype,
        engine=arguments.engine_options(backends=["cusparselt"], shapes=shapes, eager=eager),
    )
    saved = read_profile(gpu_profile) if gpu_profile else None
    with shown(stderr) as progress:
        found = planner.plan(
            local_model(model_dir),
            options,
            saved=saved,
            sensitivity=sensitivity,
            progress=progress,
            quantize=quantize,
        )
    if out:
        write_plan(found, out)
    if save_profile:
        write_profile(found.profile, save_profile)
    _show_plan(found, as_json=as_json)


def _show_plan(found: "Plan", *, as_json: bool) -> None:
    # Loads torch, as what made the plan did.
    from prox24_deploy.engines.cusparselt.planning import plan_json

    if as_json:
        print_json(plan_json(found))
        return
    print_table(tables.plan_layers(found))
    if len(found.profile.formats) > 1:
        print_table(tables.plan_ways(found))
    print_table(tables.plan_shapes(found))
    for sentence in tables.plan_sentences(found):
        say(sentence)


def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Bundle, model directory, safetensors or ONNX file.",
            readable=False,
            callback=without_address,
        ),
    ],
    *,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="GLOB", help="Weights that may be dense, as globs; repeatable."
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            "--axis",
            metavar="GLOB=AXIS",
            help="Axis along which tensors of a safetensors file are summed, where "
            "neither the file nor its config.json tells; repeatable.",
        ),
    ] = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Check the 2:4 pattern of every weight along its reduction axis.

    A file that declares its 2:4 weights is held to that; in any other file every weight that no
    --ignore matches must be 2:4. Of a bundle the pruned model and the sparse twin must be. Ends
    with 4 if a weight is not 2:4, and with 5 if one cannot be proven or there is none to prove.
    """
    axes = arguments.tensor_axes(axis or ())
    path = local_model(path)
    checked = _check_bundle if (path / MANIFEST_FILE).is_file() else _check_files
    conclusion = checked(path, ignore or (), axes, as_json=as_json)
    if not as_json:
        say(conclusion)


def _check_files(
    path: Path, ignore: Sequence[str], axes: Mapping[str, int], *, as_json: bool
) -> str:
    from prox24_deploy.graph.check.check import check_path, require_24

    report = check_path(path, ignore, axes)
    if as_json:
        print_json(asdict(report))
    else:
        _show_check(report)
    require_24(report)
    return report.conclusion


def _check_bundle(
    root: Path, ignore: Sequence[str], axes: Mapping[str, int], *, as_json: bool
) -> str:
    from prox24_deploy.pipeline.bundle_check import check_bundle, require_proven

    found = check_bundle(root, ignore, axes)
    if as_json:
        print_json(asdict(found))
    else:
        for name, part in found.parts.items():
            say(tables.part_title(name))
            _show_check(part)
    require_proven(found)
    return found.conclusion


def _show_check(report: "CheckReport") -> None:
    print_table(tables.checks(report.tensors))
    for sentence in tables.check_sentences(report):
        say(sentence)


def verify(bundle: arguments.BundleArg, *, as_json: arguments.JsonOpt = False) -> None:
    """Re-hash every file of a bundle against its manifest."""
    from prox24_deploy.bundle.manifest import contents_sha256, read_manifest
    from prox24_deploy.bundle.manifest import verify as faults_of

    faults = faults_of(bundle)
    if as_json:
        print_json({"bundle": str(bundle), "sound": not faults, "faults": faults})
    if faults:
        for fault in faults[1:]:
            say(fault, to=stderr)
        raise BundleError(f"Bundle {bundle} does not verify: {faults[0]}")
    if not as_json:
        manifest = read_manifest(bundle)
        say(
            f"{bundle}: {len(manifest.files)} files match their hashes; contents sha256 "
            f"{contents_sha256(manifest)}."
        )


def doctor(*, as_json: arguments.JsonOpt = False) -> None:
    """Say what this machine can do, and how to get what is missing."""
    from prox24_deploy.bundle.environment import abilities, diagnose

    findings = diagnose()
    can = abilities(findings)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], "conclusion": can})
        return
    print_table(tables.findings(findings), piped=_READ_WIDTH)
    say(can)
