"""TensorRT-RTX: what compiles, and what is said where it does not."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from prox24_deploy.engines.tensorrt_rtx import compile_plans, run_job
from prox24_deploy.errors import BackendMissingError, EngineError

RANGES = {"x": ((1, 8), (2, 8), (4, 8))}
rtx = pytest.mark.tensorrt_rtx


def write(path: Path, op_type: str, domain: str = "") -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x"], ["y"], domain=domain)], "g", [x], [y]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("custom", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@rtx
def test_a_file_is_compiled_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "Relu")
    plans = compile_plans(path, tmp_path / "deep" / "plans", ["SM86", "SM120"], RANGES)
    assert set(plans) == {"SM86", "SM120"}
    assert all(plan.stat().st_size > 0 for plan in plans.values())


@rtx
def test_a_file_that_does_not_parse_is_named_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "Unheard", "custom")
    message = r"does not compile .*m\.onnx for SM86: .*EngineError: parser: .*; export it again"
    with pytest.raises(EngineError, match=message) as caught:
        compile_plans(path, tmp_path, ["SM86"], RANGES)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.plan"))


@rtx
def test_a_profile_that_does_not_fit_is_an_error_of_the_builder(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "Relu")
    with pytest.raises(EngineError, match=r"EngineError: builder: no plan for SM86, see its mess"):
        compile_plans(path, tmp_path, ["SM86"], {})


@rtx
def test_a_job_can_be_run_in_this_process(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "Relu")
    plan = tmp_path / "SM86.plan"
    run_job({"onnx": str(path), "plans": {"SM86": str(plan)}, "ranges": RANGES})
    assert plan.stat().st_size > 0
    with pytest.raises(EngineError, match="builder: no plan for SM86"):
        run_job({"onnx": str(path), "plans": {"SM86": str(plan)}, "ranges": {}})
    broken = write(tmp_path / "broken.onnx", "Unheard", "custom")
    with pytest.raises(EngineError, match="parser: "):
        run_job({"onnx": str(broken), "plans": {"SM86": str(plan)}, "ranges": RANGES})


def test_a_missing_library_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendMissingError, match=r"not installed .*pip install tensorrt-rtx-cu13"):
        compile_plans(tmp_path / "m.onnx", tmp_path, ["SM86"], RANGES)


def test_a_compiler_that_dies_silently_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", json)
    dead = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(EngineError, match=r"m\.onnx for SM86: it ended with code -11; export it"):
        compile_plans(tmp_path / "m.onnx", tmp_path, ["SM86"], RANGES)
