"""The command that hands a finished bundle over to whoever serves, stores or signs it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from prox24_deploy.cli import options as arguments
from prox24_deploy.cli.terminal import print_json, say
from prox24_deploy.core.errors import UsageError


def package(
    bundle: arguments.BundleArg,
    *,
    triton: Annotated[
        Path | None,
        typer.Option(help="Write the model into this Triton model repository.", readable=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Triton: name of the model; default: the source model's.")
    ] = None,
    twin: Annotated[
        Literal["sparse", "dense"], typer.Option(help="Triton: which of the two models.")
    ] = "sparse",
    backend: Annotated[
        Literal["onnxruntime", "tensorrt"], typer.Option(help="Triton: backend that runs it.")
    ] = "onnxruntime",
    max_batch: Annotated[
        int | None,
        typer.Option(min=0, help="Triton: join up to N requests; default: the largest measured."),
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Triton: copies of the model on every device.")
    ] = None,
    sbom: Annotated[
        Path | None,
        typer.Option(
            help="Write a bill of materials to this file, CycloneDX JSON.", readable=False
        ),
    ] = None,
    checksums: Annotated[
        Path | None,
        typer.Option(help="Write a list of hashes to this file, for sha256sum -c.", readable=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Hand over a bundle that did not pass.")
    ] = False,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Hand a bundle over that verifies: to Triton, with a bill of materials, to be signed."""
    from prox24_deploy.packaging import package as handover
    from prox24_deploy.packaging.triton import TritonOptions

    if triton is sbom is checksums is None:
        raise UsageError("Nothing to write: pass --triton OUT, --sbom FILE or --checksums FILE.")
    options = TritonOptions(
        name=name, twin=twin, backend=backend, max_batch=max_batch, instances=instances
    )
    if triton is None and options != TritonOptions():
        raise UsageError(
            "--name, --twin, --backend, --max-batch and --instances have no effect without "
            "--triton; add it, or leave them out."
        )
    manifest = handover.open_finished(bundle, force=force)
    written: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    if manifest.verdict != "pass":
        notes = (f"Handed over although it did not pass. {handover.said_of(bundle)}.",)
    if sbom is not None:
        handover.write_sbom(bundle, manifest, sbom)
        written["sbom"] = str(sbom)
    if checksums is not None:
        handover.write_checksums(bundle, manifest, checksums)
        written["checksums"] = str(checksums)
    # Last, because it alone is not written again where it is there.
    if triton is not None:
        path, served = handover.triton_repository(bundle, manifest, triton, options)
        notes += served
        written["triton"] = str(path)
    if as_json:
        print_json({"written": written, "notes": list(notes)})
        return
    for kind, where in written.items():
        say(f"{kind}: {where}")
    for note in notes:
        say(f"Note: {note}")
