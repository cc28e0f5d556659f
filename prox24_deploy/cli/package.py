"""The command that prepares a finished bundle for those who serve, store or sign it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from prox24_deploy.cli import options as arguments
from prox24_deploy.cli.terminal import print_json, say


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
    vllm: Annotated[
        Path | None,
        typer.Option(
            help="Write a model directory for vLLM, which must not exist.", readable=False
        ),
    ] = None,
    vllm_sparse: Annotated[
        bool,
        typer.Option(
            "--vllm-sparse",
            help="vLLM: declare 2:4 for its sparse kernels, which 0.18.1 has and 0.19.0 refuses.",
        ),
    ] = False,
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
        bool, typer.Option("--force", help="Take a bundle that did not pass.")
    ] = False,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Prepare a bundle that passed: for Triton or vLLM, a bill of materials, hashes to sign."""
    from prox24_deploy.packaging.package import package as write
    from prox24_deploy.packaging.triton import TritonOptions

    found = write(
        bundle,
        triton=triton,
        options=TritonOptions(
            name=name, twin=twin, backend=backend, max_batch=max_batch, instances=instances
        ),
        vllm=vllm,
        vllm_sparse=vllm_sparse,
        sbom=sbom,
        checksums=checksums,
        force=force,
    )
    written = {kind: str(path) for kind, path in found.written.items()}
    if as_json:
        print_json({"written": written, "notes": list(found.notes)})
        return
    for kind, where in written.items():
        say(f"{kind}: {where}")
    for note in found.notes:
        say(f"Note: {note}")
