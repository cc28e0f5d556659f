"""Hand a finished bundle over: to Triton or vLLM, as a list of hashes or an SBOM.

Nothing is handed over that does not verify. The bundle itself is only read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prox24_deploy.bundle.layout import ONNX, REPORT_FILE
from prox24_deploy.bundle.manifest import FileEntry, Manifest, checksum_list, read_manifest, verify
from prox24_deploy.config.recipe import GraphTensor
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.core.records import CompileResult, Engine, PruneResult
from prox24_deploy.packaging import triton as serving
from prox24_deploy.packaging.source import entry_of, read_record, require_file, require_outside
from prox24_deploy.packaging.triton import TritonOptions
from prox24_deploy.report.schema import load_report


@dataclass(frozen=True, slots=True)
class Served:
    """What Triton is to load: files by their names in its version folder, and what to know."""

    files: dict[str, tuple[Path, FileEntry]]
    notes: tuple[str, ...]
    largest_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """What was written, by kind, and sentences that whoever gets it must know."""

    written: Mapping[str, Path]
    notes: tuple[str, ...]


def package(
    bundle: Path,
    *,
    triton: Path | None = None,
    options: TritonOptions | None = None,
    vllm: Path | None = None,
    vllm_sparse: bool = False,
    sbom: Path | None = None,
    checksums: Path | None = None,
    force: bool = False,
) -> Packaged:
    """Write what was asked for from a bundle that verifies and that passed.

    Args:
        bundle: OUT of a build.
        triton: model repository to write the model into.
        options: what is served there, and how.
        vllm: model directory to write for vLLM.
        vllm_sparse: declare 2:4 there, as old versions read it and new ones refuse it.
        sbom: file for the bill of materials.
        checksums: file for the list of hashes.
        force: take a release that did not pass; one that does not verify is never taken.

    Raises:
        BundleError: it may not be handed over, or lacks what was asked for.
        UsageError: there is nothing to write, or an option would have no effect.
        BackendMissingError: the extra `sbom` is not installed.
    """
    if triton is vllm is sbom is checksums is None:
        raise UsageError(
            "Nothing to write: pass --triton OUT, --vllm OUT, --sbom FILE or --checksums FILE."
        )
    _require_effect(triton, options, vllm, vllm_sparse=vllm_sparse)
    manifest = open_finished(bundle, force=force)
    written = _write_files(bundle, manifest, sbom, checksums)
    notes = _verdict_notes(bundle, manifest)
    # Last, because they alone are not written again where they are there.
    if vllm is not None:
        # It reads and proves weight files, for which it imports ONNX.
        from prox24_deploy.packaging.vllm import vllm_directory

        written["vllm"], said = vllm_directory(bundle, manifest, vllm, sparse=vllm_sparse)
        notes += said
    if triton is not None:
        path, said = triton_repository(bundle, manifest, triton, options or TritonOptions())
        notes += said
        written["triton"] = path
    return Packaged(written=written, notes=notes)


def _require_effect(
    triton: Path | None, options: TritonOptions | None, vllm: Path | None, *, vllm_sparse: bool
) -> None:
    """Refuse options of what is not written."""
    if triton is None and options not in (None, TritonOptions()):
        raise UsageError(
            "--name, --twin, --backend, --max-batch and --instances have no effect without "
            "--triton; add it, or leave them out."
        )
    if vllm is None and vllm_sparse:
        raise UsageError("--vllm-sparse has no effect without --vllm; add it, or leave it out.")


def _write_files(
    bundle: Path, manifest: Manifest, sbom: Path | None, checksums: Path | None
) -> dict[str, Path]:
    written: dict[str, Path] = {}
    if sbom is not None:
        write_sbom(bundle, manifest, sbom)
        written["sbom"] = sbom
    if checksums is not None:
        write_checksums(bundle, manifest, checksums)
        written["checksums"] = checksums
    return written


def _verdict_notes(bundle: Path, manifest: Manifest) -> tuple[str, ...]:
    if manifest.verdict == "pass":
        return ()
    return (f"Handed over although it did not pass. {said_of(bundle)}.",)


def open_finished(bundle: Path, *, force: bool) -> Manifest:
    """The manifest of a bundle that verifies and that passed.

    Args:
        bundle: OUT of a build.
        force: hand over a release that did not; one that does not verify is never handed over.

    Raises:
        BundleError: it may not be handed over.
    """
    faults = verify(bundle)
    if faults:
        raise BundleError(
            f"Bundle {bundle} does not verify and is not handed over: {faults[0]} Build it again."
        )
    manifest = read_manifest(bundle)
    if manifest.verdict != "pass" and not force:
        raise BundleError(
            f"Bundle {bundle} did not pass and is not handed over. {said_of(bundle)}. See "
            f"{bundle / 'report.html'}; pass --force to hand it over all the same."
        )
    return manifest


def said_of(bundle: Path) -> str:
    """The first line of the report of a bundle that verifies."""
    return load_report(bundle / REPORT_FILE).sentence


def triton_repository(
    bundle: Path, manifest: Manifest, out: Path, options: TritonOptions
) -> tuple[Path, tuple[str, ...]]:
    """Write OUT/NAME for Triton from a bundle that `open_finished` gave.

    Returns:
        The folder of the model, and sentences that whoever serves it must know.

    Raises:
        BundleError: the bundle has no such engine, or the model is there already.
        UsageError: the graph cannot be served as asked for.
    """
    from prox24_deploy.graph.check.interface import read_interface

    require_outside(bundle, out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"Output {out} is a file, expected a folder for models; pass another.")
    onnx = f"{ONNX}/{options.twin}/model.onnx"
    inputs, outputs = read_interface(bundle / onnx)
    tensors = (*inputs, *outputs)
    if options.backend == "onnxruntime":
        served = _onnx_files(bundle, manifest, onnx, options.twin)
    else:
        served = _engine_files(bundle, manifest, options.twin, inputs)
    name = serving.model_name(options.name, manifest.model.title if manifest.model else "")
    max_batch = options.max_batch
    if max_batch is None:
        max_batch = served.largest_batch if serving.batches(tensors) else 0
    if options.backend == "tensorrt" and max_batch > served.largest_batch:
        raise UsageError(
            f"--max-batch {max_batch} is more than the {served.largest_batch} that the TensorRT "
            f"engine of {bundle} was built for; pass less, or build with larger --shapes."
        )
    config = serving.model_config(
        name,
        options.backend,
        inputs,
        outputs,
        max_batch=max_batch,
        instances=options.instances,
        comments=(*_origin(manifest, options.twin), *served.notes),
    )
    return serving.write_repository(out, name, config, served.files), served.notes


def write_sbom(bundle: Path, manifest: Manifest, file: Path) -> None:
    """Write the bill of materials of a bundle that `open_finished` gave.

    Raises:
        BackendMissingError: the extra `sbom` is not installed.
    """
    from prox24_deploy.packaging.sbom import render_sbom

    require_file(bundle, file)
    pruned = read_record(bundle, "prune", PruneResult)
    engines = read_record(bundle, "compile", CompileResult).engines
    built_with = {name: text for engine in engines for name, text in engine.versions.items()}
    write_atomic(file, render_sbom(manifest, pruned, built_with).encode())


def write_checksums(bundle: Path, manifest: Manifest, file: Path) -> None:
    """Write the hashes of a bundle that `open_finished` gave, for `sha256sum -c` within it."""
    require_file(bundle, file)
    write_atomic(file, checksum_list(bundle, manifest).encode())


def _origin(manifest: Manifest, twin: str) -> tuple[str, ...]:
    return (
        f"Written by prox24-deploy {manifest.tool_version}: {twin} twin, verdict "
        f"{manifest.verdict}, manifest {manifest.self_sha256}.",
    )


def _onnx_files(bundle: Path, manifest: Manifest, onnx: str, twin: str) -> Served:
    """The graph and, under the names that it refers to, the files of its weights."""
    from prox24_deploy.graph.check.interface import external_files

    folder = Path(onnx).parent
    files = {serving.MODEL_FILES["onnxruntime"]: entry_of(bundle, manifest, onnx)}
    for name in external_files(bundle / onnx):
        if Path(name).name != name:
            raise BundleError(
                f"File {bundle / onnx} keeps weights in {name!r}, expected a file beside it; "
                "export it again."
            )
        files[name] = entry_of(bundle, manifest, (folder / name).as_posix())
    notes = ("ONNX Runtime has no sparse kernels: the 2:4 weights run as dense ones.",)
    return Served(files, notes if twin == "sparse" else (), _largest_batch(manifest.options))


def _engine_files(
    bundle: Path, manifest: Manifest, twin: str, inputs: tuple[GraphTensor, ...]
) -> Served:
    """The plan of TensorRT; engines of TensorRT-RTX are of another library."""
    from prox24_deploy.engines.tensorrt.record import read_build_record

    engine = _engine(bundle, twin)
    record = read_build_record(bundle / engine.path, engine)
    if "STRIP_PLAN" in record.flags:
        raise BundleError(
            f"Engine {bundle / engine.path} holds no weights, and Triton cannot refit it; build "
            "without --strip-weights."
        )
    ranges = [record.batches[tensor.name] for tensor in inputs if tensor.name in record.batches]
    if not ranges:
        raise BundleError(
            f"Engine {bundle / engine.path} has no record of its shapes; build it again."
        )
    least, largest = max(low for low, _ in ranges), min(high for _, high in ranges)
    versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
    notes = [
        f"The engine was built on {engine.device} with {versions}; Triton must have that TensorRT."
    ]
    if "VERSION_COMPATIBLE" in record.flags:
        notes = [
            f"The engine was built on {engine.device} with {versions}; start Triton with "
            "--backend-config=tensorrt,version-compatible=true."
        ]
    if least > 1:
        notes.append(f"The engine takes no batch below {least}.")
    plan = serving.MODEL_FILES["tensorrt"]
    return Served({plan: entry_of(bundle, manifest, engine.path)}, tuple(notes), largest)


def _engine(bundle: Path, twin: str) -> Engine:
    engines = read_record(bundle, "compile", CompileResult).engines
    for engine in engines:
        if (engine.backend, engine.twin) == ("tensorrt", twin):
            return engine
    found = ", ".join(sorted({engine.backend for engine in engines})) or "no backend"
    raise BundleError(
        f"Bundle {bundle} has no TensorRT engine, it was built for {found}; build it with "
        "--backend tensorrt, or pass --backend onnxruntime."
    )


def _largest_batch(options: dict[str, Any]) -> int:
    """The largest batch that was measured."""
    engine = options.get("engine")
    batches = engine.get("batches") if isinstance(engine, dict) else None
    known = [batch for batch in batches if type(batch) is int] if isinstance(batches, list) else []
    return max(known, default=1)
