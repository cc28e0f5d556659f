"""The functions of the Python API: the commands, for programs.

Paths are str or Path, defaults are those of the command line, results are the records that its
`--json` prints. Nothing is printed, and errors are `Prox24Error`s. As on the command line, models
are opened as local files only, and ONNX Runtime sends no telemetry unless the environment says so.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.manifest import verify as faults_of
from prox24_deploy.config.options import (
    ROTATE_STEPS,
    BenchOptions,
    BuildOptions,
    DeviceChoice,
    EngineOptions,
    RecoverOptions,
    parse_dtype,
)
from prox24_deploy.core.accuracy import EngineAccuracyResult
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
)
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.rotation import RotateResult
from prox24_deploy.core.types import DType, Progress, Quantize, silent
from prox24_deploy.engines.cusparselt.profile import read_profile
from prox24_deploy.packaging import package as packaging
from prox24_deploy.packaging.naming import default_out, rotated_out
from prox24_deploy.packaging.package import Packaged
from prox24_deploy.packaging.triton import TritonOptions
from prox24_deploy.pipeline import finish, run
from prox24_deploy.pipeline.rotate import rotate as run_rotate
from prox24_deploy.regression.compare import compare_files
from prox24_deploy.report.schema import Comparison, Report

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.planning import Plan
    from prox24_deploy.graph.check.judgement import CheckReport

StrPath = str | os.PathLike[str]

_PRIVATE = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}


def build(
    model_dir: StrPath,
    out: StrPath | None = None,
    options: BuildOptions | None = None,
    *,
    fresh: bool = False,
    progress: Progress = silent,
) -> Report:
    """Prune, export, prove, compile, measure and report: everything, into one bundle.

    Args:
        model_dir: a Hugging Face model directory.
        out: the bundle; by default MODEL_DIR's name with `-prox24`, in the working directory.
        options: everything else that the command can be told.
        fresh: whether to run finished stages again.
        progress: called with (label, done, total).

    Returns:
        The report. Its verdict is "pass", "fail" or "inconclusive"; a regression is no error.

    Raises:
        Prox24Error: any of its kinds; the stages finished until then are kept.
    """
    _keep_private()
    root = _bundle_of(model_dir, out)
    return run.build(
        Path(model_dir), root, options or BuildOptions(), fresh=fresh, progress=progress
    )


def prune(
    model_dir: StrPath,
    out: StrPath | None = None,
    options: BuildOptions | None = None,
    *,
    fresh: bool = False,
    progress: Progress = silent,
) -> PruneResult:
    """Prune only: `out` becomes a bundle with the pruned model in `pruned/`.

    Takes what `build` takes.

    Raises:
        Prox24Error: the model, its recipe or the text cannot be used.
    """
    _keep_private()
    root = _bundle_of(model_dir, out)
    return run.prune(
        Path(model_dir), root, options or BuildOptions(), fresh=fresh, progress=progress
    )


def rotate(
    model_dir: StrPath,
    out: StrPath | None = None,
    options: BuildOptions | None = None,
    *,
    steps: int = ROTATE_STEPS,
    progress: Progress = silent,
) -> RotateResult:
    """Write a dense decoder that computes what another does, of which 2:4 drops less.

    Args:
        model_dir: the dense model directory.
        out: the model directory to write; by default MODEL_DIR's name with `-rotated`.
        options: recipe, text to search on, device and memory.
        steps: of the search.
        progress: called with (label, done, total).

    Raises:
        Prox24Error: the model, its recipe or the text cannot be used, or `out` is there.
    """
    _keep_private()
    where = rotated_out(Path(model_dir)) if out is None else Path(out)
    return run_rotate(
        Path(model_dir), where, options or BuildOptions(), steps=steps, progress=progress
    )


def recover(
    pruned: StrPath,
    teacher: StrPath,
    out: StrPath | None = None,
    options: BuildOptions | None = None,
    *,
    progress: Progress = silent,
) -> RecoverResult:
    """Recover only: train the kept weights of a pruned model against the dense one, masks fixed.

    Args:
        pruned: a bundle, or a model directory that is 2:4 already.
        teacher: the dense model directory that it was pruned from.
        out: the bundle that gets the model in `recovered/`; by default the bundle `pruned`.
        options: `recover`, five minutes by default; recipe, text and device. Without calibration
            the bundle `pruned`, if nothing else is written, is recovered on its own text.
        progress: called with (label, done, total).

    Raises:
        Prox24Error: any of its kinds; a run that diverges is none, its record has a warning.
    """
    _keep_private()
    asked = options or BuildOptions()
    if asked.recover is None:
        asked = replace(asked, recover=RecoverOptions(minutes=5))
    where = None if out is None else Path(out)
    return run.recover(Path(pruned), Path(teacher), where, asked, progress=progress)


def export(
    bundle: StrPath,
    *,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Export dense and sparse ONNX twins of a pruned bundle and prove 2:4 on the files.

    Args:
        bundle: what `prune` made.
        dtype: of the files; None means the checkpoint's own.
        quantize: quantise the model before, or "none" any longer; None leaves that as it is.
        progress: called with (label, done, total).

    Raises:
        ExportError: the model cannot be exported.
        SparsityLostError: a pruned weight is not 2:4 in the file.
        BundleError: the bundle holds no pruned model.
    """
    _keep_private()
    settled = dtype and parse_dtype(dtype)
    return run.export(Path(bundle), settled, quantize=quantize, progress=progress)


def compile(
    bundle: StrPath,
    options: EngineOptions | None = None,
    *,
    quantize: Quantize | None = None,
    progress: Progress = silent,
) -> CompileResult:
    """Compile engines from the ONNX twins of a bundle; with `quantize` export it anew before.

    Raises:
        BackendMissingError: a backend is not available here.
        EngineError: an engine cannot be built.
        BundleError: the bundle holds no exported models.
    """
    _keep_private()
    asked = options or EngineOptions()
    return run.compile_engines(Path(bundle), asked, quantize=quantize, progress=progress)


def bench(
    bundle: StrPath,
    options: EngineOptions | None = None,
    *,
    timing: BenchOptions | None = None,
    progress: Progress = silent,
) -> BenchResult:
    """Time the dense against the sparse engines of a bundle, in turns; always anew.

    Of the options only the shapes count; `timing` says for how long. Latencies are in milliseconds,
    speed-ups are dense / sparse with a 95 % interval.

    Raises:
        BackendMissingError: no engine of the bundle can run on this machine.
    """
    _keep_private()
    return run.bench(
        Path(bundle),
        options or EngineOptions(),
        timing=timing or BenchOptions(),
        progress=progress,
    )


def evaluate(
    dense: StrPath,
    pruned: StrPath,
    options: BuildOptions | None = None,
    *,
    progress: Progress = silent,
) -> EvaluateResult:
    """Compare a pruned model with its dense one in PyTorch, on evaluation samples.

    Args:
        dense: a Hugging Face model directory.
        pruned: a directory of the same architecture, or a bundle.
        options: text, recipe and device.
        progress: called with (label, done, total).

    Returns:
        The metrics of the task, each with its standard error.

    Raises:
        Prox24Error: a model, its recipe or the text cannot be used.
    """
    _keep_private()
    return run.evaluate(Path(dense), Path(pruned), options or BuildOptions(), progress=progress)


def evaluate_bundle(
    bundle: StrPath,
    *,
    evaluation: Sequence[StrPath] = (),
    column: str | None = None,
    target_column: str | None = None,
    evaluation_tokens: int | None = None,
    engine_tokens: int | None = None,
    device: DeviceChoice = "auto",
    model: StrPath | None = None,
    progress: Progress = silent,
) -> tuple[EvaluateResult, EngineAccuracyResult]:
    """Measure the accuracy of a bundle against its dense model, in PyTorch and by its engines.

    Args:
        bundle: what `prune`, `export` and `compile` made.
        evaluation: samples; by default those that it was pruned with.
        column: of records, with their texts; as when pruned unless told.
        target_column: of records, with what a decoder should write; likewise.
        evaluation_tokens: of them, as when pruned unless told.
        engine_tokens: of these, to run through each engine, as when pruned unless told.
        device: where PyTorch runs.
        model: where the dense model lies, if not where it was.
        progress: called with (label, done, total).

    Raises:
        BundleError: it was not pruned and compiled, or the model that it is of has changed.
    """
    _keep_private()
    asked = finish.EvaluationAsked(
        evaluation=tuple(map(Path, evaluation)),
        column=column,
        target_column=target_column,
        evaluation_tokens=evaluation_tokens,
        engine_tokens=engine_tokens,
        device=device,
        model=None if model is None else Path(model),
    )
    return finish.evaluate(Path(bundle), asked, progress=progress)


def report_bundle(
    bundle: StrPath, options: BuildOptions | None = None, *, model: StrPath | None = None
) -> Report:
    """Report what the single stages of a bundle found, with its verdict, and seal it.

    Of the options only `baseline`, `limits_file`, `accept_loss` and `allow` count. `model` is where
    the dense model lies, if not where it was.

    Raises:
        BundleError: a stage has not been run, or the model that it is of has changed.
        UsageError: a limit names no figure.
    """
    where = None if model is None else Path(model)
    return finish.report(Path(bundle), options or BuildOptions(), where)


def plan(
    model_dir: StrPath,
    options: BuildOptions | None = None,
    *,
    gpu_profile: StrPath | None = None,
    sensitivity: bool = True,
    quantize: Quantize | None = None,
    progress: Progress = silent,
) -> "Plan":
    """Say which layers are worth pruning for a GPU.

    Args:
        model_dir: a Hugging Face model directory.
        options: shapes, dtype and budget; the text for the sensitivity.
        gpu_profile: saved timings of another GPU; None times the one at hand.
        sensitivity: whether to measure what each layer that pays would cost.
        quantize: the 8-bit format that layers may use besides the dtype; None means that of the
            options.
        progress: called with (label, done, total).

    Raises:
        BackendMissingError: there is no GPU and no saved profile.
    """
    _keep_private()
    # Loads torch, which a program that looks at reports does without.
    from prox24_deploy.pipeline import plan as planner

    saved = read_profile(Path(gpu_profile)) if gpu_profile is not None else None
    asked = options or BuildOptions()
    return planner.plan(
        Path(model_dir),
        asked,
        saved=saved,
        sensitivity=sensitivity,
        progress=progress,
        quantize=quantize or asked.quantize or "none",
    )


def check(
    path: StrPath, *, ignore: Sequence[str] = (), axes: Mapping[str, int] | None = None
) -> "CheckReport":
    """Check the 2:4 pattern of every weight of an ONNX or safetensors file, or folder of either.

    Args:
        path: the file or folder.
        ignore: globs over weights that may be dense.
        axes: globs over tensors of safetensors files, to the axis of their groups, where neither
            the file nor its config.json tells.

    Returns:
        What was found of each weight: `proven`, `violations` and `unproven`.

    Raises:
        UsageError: the path holds no weights that can be read.
    """
    # Loads ONNX.
    from prox24_deploy.graph.check.check import check_path

    return check_path(Path(path), ignore, axes)


def verify(bundle: StrPath) -> tuple[str, ...]:
    """Hash every file of a bundle again; a sentence for each that is not as its manifest lists.

    Raises:
        BundleError: there is no manifest, or it cannot be read.
    """
    return tuple(faults_of(Path(bundle)))


def compare(
    report: StrPath,
    baseline: StrPath,
    *,
    limits: StrPath | None = None,
    allow: Sequence[str] = (),
) -> Comparison:
    """Compare a release with an accepted one, and judge each figure by its limit.

    Args:
        report: the new release, a report.json or a bundle.
        baseline: a baseline file, a report.json or a bundle.
        limits: a TOML file of limits, which come before those of the recipe.
        allow: what may differ between the two, by name: "gpu", "tool", ...

    Raises:
        BundleError: a file cannot be read, or the two differ in what `allow` does not name.
        UsageError: the limits file cannot be used.
    """
    return compare_files(Path(report), Path(baseline), limits=_path(limits), allow=allow)


def package(
    bundle: StrPath,
    *,
    triton: StrPath | None = None,
    triton_options: TritonOptions | None = None,
    vllm: StrPath | None = None,
    vllm_sparse: bool = False,
    sbom: StrPath | None = None,
    checksums: StrPath | None = None,
    force: bool = False,
) -> Packaged:
    """Prepare a bundle that verifies and that passed for those who serve, store or sign it.

    Args:
        bundle: what `build` made.
        triton: a Triton model repository to write the model into.
        triton_options: what is served there, and how.
        vllm: a model directory to write for vLLM.
        vllm_sparse: whether to declare 2:4 there for vLLM 0.18.1, which later versions refuse.
        sbom: a file for the bill of materials, CycloneDX JSON.
        checksums: a file for the list of hashes, for `sha256sum -c`.
        force: whether to take a bundle that did not pass.

    Raises:
        BundleError: the bundle does not verify, or did not pass.
        UsageError: there is nothing to write, or it would lie in the bundle.
    """
    return packaging.package(
        Path(bundle),
        triton=_path(triton),
        options=triton_options,
        vllm=_path(vllm),
        vllm_sparse=vllm_sparse,
        sbom=_path(sbom),
        checksums=_path(checksums),
        force=force,
    )


def _path(value: StrPath | None) -> Path | None:
    return None if value is None else Path(value)


def _bundle_of(model_dir: StrPath, out: StrPath | None) -> Path:
    return Path(out) if out is not None else default_out(Path(model_dir))


def _keep_private() -> None:
    for name, value in _PRIVATE.items():
        os.environ.setdefault(name, value)
