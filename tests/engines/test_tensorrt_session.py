"""Opening and running TensorRT engines, on a stand-in: these calls have met no GPU.

torch's streams and events are stood in for as well; its tensors lie on the CPU.
"""

import sys
from pathlib import Path

import fake_tensorrt
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_tensorrt import Version, library, said
from tensorrt_models import write_model

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.records import Engine
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.tensorrt import session as tensorrt_session
from prox24_deploy.engines.tensorrt.backend import TensorRt
from prox24_deploy.engines.tensorrt.session import TensorRtSession

FOLDER = Path("engines/tensorrt/sparse")
ROWS = np.ones((2, 4), ml_dtypes.bfloat16)
FEEDS: Feeds = {"x": ROWS, "past": np.zeros((2, 0), ml_dtypes.bfloat16)}
CARD = ("NVIDIA H200", "SM90", "580.1")


class Stream:
    """What is used of a CUDA stream."""

    cuda_stream = 7

    def synchronize(self) -> None: ...


class Event:
    """Every run takes as many milliseconds as events were made before its end."""

    made = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self.number = Event.made

    def record(self, stream: Stream) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return float(end.number)


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.calls.clear()
    Event.made = 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def session() -> TensorRtSession:
    trt = library("11")
    return TensorRtSession(trt, trt.ICudaEngine(), "engine.plan", device="cpu")


def test_every_tensor_gets_an_address_even_an_empty_one() -> None:
    outputs = session().infer(FEEDS)
    addresses = dict(said("IExecutionContext.set_tensor_address"))
    assert addresses.keys() == {"x", "past", "y"}
    assert all(addresses.values())
    assert len(set(addresses.values())) == 3
    assert said("IExecutionContext.execute_async_v3") == [(Stream.cuda_stream,)]
    assert list(outputs) == ["y"]
    assert (outputs["y"].shape, outputs["y"].dtype) == ((2, 4), ml_dtypes.bfloat16)


def test_each_timed_run_has_a_time_and_warm_up_has_none() -> None:
    elapsed = session().latencies_ms(FEEDS, runs=3, warmup=2)
    assert elapsed.tolist() == [2.0, 4.0, 6.0]
    assert len(said("IExecutionContext.execute_async_v3")) == 5


def test_inputs_are_checked_by_name_and_shape() -> None:
    with pytest.raises(EngineError, match=r"do not fit engine\.plan: got x; feed exactly past, x"):
        session().infer({"x": ROWS})
    large = np.ones((9, 4), ml_dtypes.bfloat16)
    with pytest.raises(EngineError, match=r"does not take shape \(9, 4\) for x.*--shapes"):
        session().infer({**FEEDS, "x": large})


@pytest.mark.parametrize(("end", "message"), [("no run", "did not run"), ("no room", "no room")])
def test_a_refusal_is_an_error(end: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_END", end)
    with pytest.raises(EngineError, match=message):
        session().infer(FEEDS)


@pytest.mark.parametrize("dtype", [np.float16, np.int64, ml_dtypes.bfloat16])
def test_arrays_keep_their_bits_through_torch(dtype: type) -> None:
    array: Array = np.arange(6).reshape(2, 3).T.astype(dtype)
    tensor = tensorrt_session._to_torch(array)
    assert tensor.is_contiguous()
    back = tensorrt_session._to_numpy(tensor)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def make_bundle(root: Path, flags: str) -> Engine:
    model = write_model(root)
    (root / FOLDER).mkdir(parents=True)
    (root / FOLDER / "engine.plan").write_bytes(b"plan")
    (root / FOLDER / "engine.json").write_text(
        f'{{"flags": {flags}, "onnx_sha256": "{model.sha256}"}}'
    )
    return Engine(
        path=f"{FOLDER}/engine.plan",
        backend="tensorrt",
        twin="sparse",
        onnx=model.path,
        onnx_sha256=model.sha256,
        device="NVIDIA H200",
        dtype="float16",
        versions={},
        size_bytes=4,
    )


@pytest.fixture(params=["10", "11"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    version: Version = request.param
    monkeypatch.setitem(sys.modules, "tensorrt", library(version))
    return TensorRt(
        library="tensorrt",
        version=fake_tensorrt.NUMBERS[version],
        card=CARD,
        options=EngineOptions(),
    )


def test_an_engine_is_opened_as_its_record_says(backend: TensorRt, tmp_path: Path) -> None:
    engine = make_bundle(tmp_path, '["SPARSE_WEIGHTS"]')
    with backend.open(tmp_path, engine) as found:
        assert isinstance(found, TensorRtSession)
    assert said("Runtime.engine_host_code_allowed") == [(False,)]
    assert said("Refitter.refit_cuda_engine") == []


def test_an_engine_without_weights_takes_those_of_its_onnx_file(
    backend: TensorRt, tmp_path: Path
) -> None:
    engine = make_bundle(tmp_path, '["STRIP_PLAN", "VERSION_COMPATIBLE"]')
    with backend.open(tmp_path, engine):
        pass
    assert said("Runtime.engine_host_code_allowed") == [(True,)]
    assert said("OnnxParserRefitter.refit_from_file") == [(str(tmp_path / engine.onnx),)]
    assert said("Refitter.refit_cuda_engine") == [()]
    (tmp_path / engine.onnx).unlink()
    with (
        pytest.raises(EngineError, match="does not take the weights of"),
        backend.open(tmp_path, engine),
    ):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"flags": 7, "onnx_sha256": ""}'])
def test_a_damaged_record_says_what_to_do(backend: TensorRt, tmp_path: Path, text: str) -> None:
    engine = make_bundle(tmp_path, "[]")
    (tmp_path / FOLDER / "engine.json").write_text(text)
    with (
        pytest.raises(EngineError, match="compile the model again"),
        backend.open(tmp_path, engine),
    ):
        pass


def test_a_record_of_another_model_and_a_plan_of_another_version_are_refused(
    backend: TensorRt, tmp_path: Path
) -> None:
    engine = make_bundle(tmp_path, "[]")
    path = tmp_path / FOLDER / "engine.json"
    sound = path.read_text()
    path.write_text(sound.replace("abab", "cdcd"))
    with (
        pytest.raises(EngineError, match="is of an ONNX file with hash cdcd"),
        backend.open(tmp_path, engine),
    ):
        pass
    path.write_text(sound)
    (tmp_path / FOLDER / "engine.plan").write_bytes(b"of another version")
    with pytest.raises(EngineError, match="does not load here"), backend.open(tmp_path, engine):
        pass


def test_an_engine_for_other_gpus_is_missing_its_device_here(
    backend: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_bundle(tmp_path, "[]")
    nowhere = TensorRt(library="tensorrt", version="11", card=(), options=EngineOptions())
    with pytest.raises(BackendMissingError, match="this machine has no NVIDIA GPU; run prox24"):
        nowhere.open(tmp_path, engine).__enter__()
    rtx = TensorRt(library="tensorrt_rtx", version="1.7", card=CARD, options=EngineOptions())
    with pytest.raises(BackendMissingError, match="this machine has NVIDIA H200 SM90; run"):
        rtx.open(tmp_path, engine).__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendMissingError, match="install a CUDA build of torch"):
        backend.open(tmp_path, engine).__enter__()
