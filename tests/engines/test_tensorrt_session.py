"""Opening and running TensorRT engines: these calls have met no GPU.

Polygraphy is real; TensorRT, the CUDA runtime under Polygraphy, and torch's streams and events are
stood in for. Everything lies on the CPU.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fake_tensorrt
import ml_dtypes
import numpy as np
import pytest
import torch
from afresh import afresh_each_time
from fake_tensorrt import Version, library, said, stand_in_for_cuda
from tensorrt_models import write_model

from prox24_deploy.config.options import EngineOptions
from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.records import Engine
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.tensorrt import session as tensorrt_session
from prox24_deploy.engines.tensorrt.backend import TensorRt
from prox24_deploy.engines.tensorrt.session import TensorRtSession, opened

FOLDER = Path("engines/tensorrt/sparse")
ROWS = np.ones((2, 4), ml_dtypes.bfloat16)
FEEDS: Feeds = {"x": ROWS, "past": np.zeros((2, 0), ml_dtypes.bfloat16)}
STREAM = 7
CARD = ("NVIDIA H200", "SM90", "580.1")


class Stream:
    """What is used of a CUDA stream of another library."""

    def __init__(self, stream_ptr: int) -> None:
        assert stream_ptr == STREAM

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
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Event.made = 0
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    yield from afresh_each_time(monkeypatch)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TensorRtSession]:
    """An engine opened on the CPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", library("11"))
    (tmp_path / "engine.plan").write_bytes(b"plan")
    stand_in_for_cuda()
    with opened("tensorrt", tmp_path / "engine.plan", None, "engine.plan", "cpu") as found:
        yield found


def test_inputs_outputs_and_an_empty_past_go_through_polygraphy(session: TensorRtSession) -> None:
    first = session.infer(FEEDS)
    addresses = dict(said("IExecutionContext.set_tensor_address"))
    # Also that of the empty one, which TensorRT wants to have one.
    assert addresses.keys() == {"x", "past"}
    assert all(addresses.values())
    assert said("IExecutionContext.execute_async_v3") == [(STREAM,)]
    assert list(first) == ["y"]
    assert first["y"].dtype == ml_dtypes.bfloat16
    session.infer({**FEEDS, "x": 4 * ROWS})
    # Not written over, though Polygraphy uses its memory again.
    assert np.array_equal(first["y"], 2 * ROWS)


def test_each_timed_run_has_a_time_and_warm_up_has_none(session: TensorRtSession) -> None:
    assert session.latencies_ms(FEEDS, runs=3, warmup=2).tolist() == [2.0, 4.0, 6.0]
    # One more before them, in which Polygraphy finds room for the outputs.
    assert len(said("IExecutionContext.execute_async_v3")) == 6
    assert said("IExecutionContext.set_tensor_address")[-1][0] == "y"
    # And asked for outputs again, it gives them.
    assert np.array_equal(session.infer(FEEDS)["y"], 2 * ROWS)


def test_polygraphy_and_tensorrt_speak_to_logging_alone(
    session: TensorRtSession, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What is printed belongs to the command line, which may be printing JSON."""
    messages = importlib.import_module("polygraphy.backend.trt").get_trt_logger()
    with caplog.at_level(logging.INFO):
        messages.log(fake_tensorrt.Severity.INFO, "in passing")
        messages.log(fake_tensorrt.Severity.ERROR, "out of memory")
    assert [record.getMessage() for record in caplog.records] == ["[E] out of memory"]
    assert capfd.readouterr() == ("", "")


def test_polygraphy_finds_the_cuda_runtime_that_torch_brings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/own")
    tensorrt_session._show_cuda()
    tensorrt_session._show_cuda()
    where = importlib.import_module("polygraphy.cuda.cuda")._find_cuda_lib_dirs()
    assert where[:2] == ["/opt/own", str(folder)]
    assert where.count(str(folder)) == 1


def test_inputs_are_checked_by_name_and_shape(session: TensorRtSession) -> None:
    with pytest.raises(EngineError, match=r"^engine\.plan does not run: .*not found.*'past'"):
        session.infer({"x": ROWS})
    large = np.ones((9, 4), ml_dtypes.bfloat16)
    with pytest.raises(EngineError, match=r"For input: x, failed to set shape.*9, 4.*--shapes\.$"):
        session.infer({**FEEDS, "x": large})


def test_a_refusal_is_an_error(
    session: TensorRtSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session.latencies_ms(FEEDS, runs=1, warmup=0)
    monkeypatch.setenv("FAKE_TENSORRT_END", "no run")
    with pytest.raises(EngineError, match=r"engine\.plan does not run: .*execute_async_v3"):
        session.infer(FEEDS)
    with pytest.raises(EngineError, match=r"engine\.plan did not run"):
        session._enqueue()
    monkeypatch.setenv("FAKE_TENSORRT_END", "no room")
    with (
        pytest.raises(EngineError, match=r"p has no room on the GPU: .*; free memory of it\.$"),
        opened("tensorrt", tmp_path / "engine.plan", None, "p"),
    ):
        pass


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stand_in_for_cuda()
    return TensorRt(
        library="tensorrt",
        version=fake_tensorrt.NUMBERS[version],
        polygraphy="0.53.6",
        card=CARD,
        options=EngineOptions(),
    )


def test_an_engine_is_opened_as_its_record_says(backend: TensorRt, tmp_path: Path) -> None:
    engine = make_bundle(tmp_path, '["SPARSE_WEIGHTS"]')
    with backend.open(tmp_path, engine) as found:
        assert isinstance(found, TensorRtSession)
    assert said("Refitter.refit_cuda_engine") == []


def test_an_engine_without_weights_takes_those_of_its_onnx_file(
    backend: TensorRt, tmp_path: Path
) -> None:
    engine = make_bundle(tmp_path, '["STRIP_PLAN", "VERSION_COMPATIBLE"]')
    with backend.open(tmp_path, engine):
        pass
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
    with (
        pytest.raises(EngineError, match="does not load here: Could not deserialize engine"),
        backend.open(tmp_path, engine),
    ):
        pass


def test_an_engine_for_other_gpus_is_missing_its_device_here(
    backend: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_bundle(tmp_path, "[]")
    nowhere = replace(backend, card=())
    with pytest.raises(BackendMissingError, match="this machine has no NVIDIA GPU; run prox24"):
        nowhere.open(tmp_path, engine).__enter__()
    rtx = replace(backend, library="tensorrt_rtx")
    with pytest.raises(BackendMissingError, match="this machine has NVIDIA H200 SM90; run"):
        rtx.open(tmp_path, engine).__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendMissingError, match="install a CUDA build of torch"):
        backend.open(tmp_path, engine).__enter__()
