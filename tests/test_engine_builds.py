"""A whole build for GPUs that are not here, and the options that only TensorRT has."""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import ANY_EMBEDDING, run_cli

from prox24_deploy.bundle.layout import reproduction_of
from prox24_deploy.bundle.manifest import read_manifest
from prox24_deploy.config.options import parse_capabilities
from prox24_deploy.engines.tensorrt import backend as tensorrt
from prox24_deploy.report.schema import load_report

SMALL = (
    "--calibration-tokens", "4096", "--evaluation-tokens", "1024", "--method", "magnitude",
    "--dtype", "float16", "--shapes", "batch=1,2", "sequence=16", *ANY_EMBEDDING,
)  # fmt: skip
RTX = Path("engines") / "tensorrt-rtx"
rtx = pytest.mark.tensorrt_rtx


@pytest.fixture(autouse=True, scope="module")
def no_gpu() -> Iterator[None]:
    """As on a machine without a GPU, also where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "gpu", lambda: {"gpu": "none"})
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    run = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, *SMALL,
        "--backend", "tensorrt-rtx", "--backend", "onnxruntime",
        "--compute-capability", "8.6", "--builder-level", "1", "--workspace-gib", "1",
    )  # fmt: skip
    assert run.code == 0, run.err
    return out


@rtx
def test_a_bundle_for_gpus_that_are_not_here_is_complete(bundle: Path) -> None:
    for twin in ("dense", "sparse"):
        names = {path.name for path in (bundle / RTX / twin).iterdir()}
        assert names == {"engine.plan", "engine.json", "build.log"}
    log = (bundle / RTX / "sparse" / "build.log").read_text(encoding="utf-8")
    assert "| [TF32, SPARSE_WEIGHTS, STRONGLY_TYPED]\n" in log
    assert "[WORKSPACE: 1024.00 MiB," in log
    script = bundle / reproduction_of("tensorrt-rtx")
    assert script.stat().st_mode & 0o111
    assert script.read_text().count("--builder-optimization-level 1 ") == 2
    assert reproduction_of("tensorrt-rtx") in read_manifest(bundle).files
    assert run_cli("verify", bundle).code == 0
    report = load_report(bundle / "report.json")
    assert report.verdict == "pass"
    assert report.environment["tensorrt_rtx"] == version("tensorrt-rtx-cu13")
    assert {row.backend for row in report.latency} == {"onnxruntime"}
    assert [missing.backend for missing in report.not_measured] == ["tensorrt-rtx"]
    assert "engines for SM86 cannot run here" in report.not_measured[0].reason
    assert [engine.backend for engine in report.accuracy.engines] == ["onnxruntime"]
    assert [missing.backend for missing in report.accuracy.engines_not_measured] == ["tensorrt-rtx"]
    assert "Accuracy through backend tensorrt-rtx was not measured" in "".join(report.warnings)
    (evidence,) = [e for e in report.sparsity.engines if e.backend == "tensorrt-rtx"]
    assert (evidence.eligible, evidence.chosen) == (None, None)
    assert evidence.summary.startswith("sparse kernels: unknown")
    assert len(evidence.layers) == report.pruning.totals.pruned
    assert {layer.chosen for layer in evidence.layers} == {None}


@rtx
def test_compile_and_bench_go_on_from_a_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    compiled = run_cli(
        "compile", copy, "--backend", "tensorrt-rtx", "--shapes", "batch=3", "sequence=999"
    )
    assert compiled.code == 0, compiled.err
    assert "sparse kernels: unknown" in compiled.out
    record = json.loads((copy / RTX / "sparse" / "engine.json").read_text(encoding="utf-8"))
    # No longer than the positions that the model has.
    assert record["profile"]["input_ids"] == [[3, 128], [3, 128], [3, 128]]
    assert record["device"] == "SM86, SM89, SM120"
    measured = run_cli("bench", copy)
    assert measured.code == 5
    assert "cannot run here" in measured.err


@rtx
def test_a_build_that_fails_names_its_log_and_keeps_no_engine(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    run = run_cli("compile", copy, "--backend", "tensorrt-rtx", "--strip-weights", "-q")
    assert run.code == 1
    log = copy / RTX / "dense" / "build.log"
    assert str(log) in run.err
    assert len(run.err.strip().splitlines()) == 1
    assert [path for path in (copy / "engines").rglob("*") if path.is_file()] == [log]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refit"], "Options of TensorRT have no effect on backend auto; add --backend tensorrt"),
        (["--backend", "onnxruntime", "--builder-level", "1"], "no effect on backend onnxruntime"),
        (
            ["--backend", "tensorrt", "--compute-capability", "8.6"],
            "--compute-capability has no effect on backend tensorrt",
        ),
        (["--backend", "tensorrt-rtx", "--compute-capability", "new"], "'new' is not understood"),
    ],
)
def test_options_without_effect_are_bad_usage(
    options: list[str], message: str, tmp_path: Path
) -> None:
    for command in ("build", "compile"):
        run = run_cli(command, tmp_path, *options)
        assert run.code == 2
        assert message in run.err


def test_capabilities_are_written_as_numbers_or_names() -> None:
    assert parse_capabilities(["8.6", "12.0", "SM89"]) == ("SM86", "SM120", "SM89")


def test_a_library_that_is_missing_stops_a_build_before_any_work(
    tiny_bert: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    out = tmp_path / "out"
    run = run_cli(
        "build", tiny_bert, "-o", out, "--calibration", prose, *SMALL, "--backend", "tensorrt-rtx"
    )
    assert run.code == 5
    assert "pip install 'prox24-deploy[tensorrt-rtx]'" in run.err
    assert not out.exists()
