"""The real TensorRT-RTX, on a machine without a GPU: what compiles, and what is said where not."""

import json
from pathlib import Path

import pytest
from tensorrt_models import write_model

from prox24_deploy.config.options import EngineOptions, TensorRtOptions
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.engines.tensorrt import backend as tensorrt
from prox24_deploy.engines.tensorrt.backend import TensorRt, open_tensorrt
from prox24_deploy.engines.tensorrt.job import run_job

pytestmark = pytest.mark.tensorrt_rtx
OUT = Path("engines/tensorrt-rtx/sparse")
SHAPES = EngineOptions(batches=(2, 6), sequences=(3, 5))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    """As on a machine without a GPU, also where there is one."""
    monkeypatch.setattr(tensorrt, "gpu", lambda: {"gpu": "none"})
    return open_tensorrt("tensorrt_rtx", SHAPES)


def test_one_plan_for_gpus_that_are_not_here(backend: TensorRt, tmp_path: Path) -> None:
    engine = backend.build(tmp_path, write_model(tmp_path), OUT, twin="sparse")
    assert (engine.path, engine.device) == (f"{OUT}/engine.plan", "SM86, SM89, SM120")
    assert engine.size_bytes == (tmp_path / engine.path).stat().st_size > 64 * 64
    assert {path.name for path in (tmp_path / OUT).iterdir()} == {
        "engine.plan", "engine.json", "build.log",
    }  # fmt: skip
    log = (tmp_path / OUT / "build.log").read_text(encoding="utf-8")
    assert "Flags                  | [TF32, SPARSE_WEIGHTS, STRONGLY_TYPED]\n" in log
    # In its own words: three targets, and the profile.
    assert "Number of target compute capabilities: 3" in log
    bounds = "MinShape: [2,3,64], OptShape: [6,5,64], MaxShape: [6,5,64]"
    assert bounds in log
    record = json.loads((tmp_path / OUT / "engine.json").read_text(encoding="utf-8"))
    assert record["profile"] == {"x": [[2, 3, 64], [6, 5, 64], [6, 5, 64]]}


def test_the_dense_twin_has_no_flag(backend: TensorRt, tmp_path: Path) -> None:
    backend.build(tmp_path, write_model(tmp_path), OUT, twin="dense")
    assert "| [TF32, STRONGLY_TYPED]\n" in (tmp_path / OUT / "build.log").read_text(
        encoding="utf-8"
    )


def test_its_sparse_kernels_are_unknown_and_its_engines_do_not_open(
    backend: TensorRt, tmp_path: Path
) -> None:
    engine = backend.build(tmp_path, write_model(tmp_path), OUT, twin="sparse")
    check = TensorCheck(
        tensor="w",
        module="layer",
        node="node_linear",
        op_type="MatMul",
        dtype="float16",
        shape=(64, 64),
        axis=0,
        density=0.5,
        is_24=True,
        expected=True,
        first_violation=None,
        reason="",
        part="",
        eligible=True,
        ineligible_reason="",
    )
    evidence = backend.evidence(tmp_path, engine, (check,))
    assert (evidence.eligible, evidence.chosen) == (None, None)
    assert evidence.summary.startswith("sparse kernels: unknown, TensorRT-RTX chooses kernels on")
    (layer,) = evidence.layers
    assert (layer.eligible, layer.chosen) == (None, None)
    assert layer.reason.startswith("unknown: TensorRT-RTX chooses")
    with pytest.raises(BackendMissingError, match="for SM86, SM89, SM120 cannot run here"):
        backend.open(tmp_path, engine).__enter__()


def test_a_file_that_does_not_parse_leaves_its_log_alone(backend: TensorRt, tmp_path: Path) -> None:
    model = write_model(tmp_path, op_type="Unheard", domain="custom")
    message = (
        r"\.onnx for SM86, SM89, SM120: In node 0 with name: node_linear and operator: Unheard .*;"
        " the whole log"
    )
    with pytest.raises(EngineError, match=message) as caught:
        backend.build(tmp_path, model, OUT, twin="sparse")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / OUT).iterdir()] == ["build.log"]
    assert [path.name for path in (tmp_path / OUT.parent).iterdir()] == ["sparse"]


def test_what_needs_a_gpu_is_refused_by_the_library_itself(tmp_path: Path) -> None:
    """Weights cannot be stripped ahead of time; no fallback keeps them quietly."""
    options = EngineOptions(tensorrt=TensorRtOptions(strip_weights=True))
    backend = open_tensorrt("tensorrt_rtx", options)
    if getattr(backend, "card", ()):
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(EngineError, match=r"does not compile .*; the whole log is .*build\.log"):
        backend.build(tmp_path, write_model(tmp_path), OUT, twin="sparse")
    assert [path.name for path in (tmp_path / OUT).iterdir()] == ["build.log"]


# Timing caches, which Polygraphy always makes, go out of use in TensorRT-RTX.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_job_can_be_run_in_this_process(backend: TensorRt, tmp_path: Path) -> None:
    job = backend._job(tmp_path / write_model(tmp_path).path, tmp_path, "sparse")
    run_job(job)
    assert (tmp_path / "engine.plan").stat().st_size > 0
