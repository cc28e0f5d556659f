import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import BackendMissingError, EngineError
from prox24_deploy.core.host import cpu_model
from prox24_deploy.core.records import Engine, OnnxModel, TensorCheck
from prox24_deploy.core.types import DType
from prox24_deploy.engines.onnxruntime import (
    NO_SPARSE_KERNELS,
    PROVIDER,
    OnnxRuntime,
    OrtSession,
)

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_model(bundle: Path, dtype: DType = "float32") -> OnnxModel:
    """A graph with one MatMul: rows [batch, 4] to scores [batch, 3]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["rows", "weight"], ["scores"])],
        "matmul",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = bundle / "onnx" / "sparse" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    return OnnxModel(
        path="onnx/sparse/model.onnx",
        dtype=dtype,
        opset=20,
        sha256="ab" * 32,
        size_bytes=path.stat().st_size,
    )


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return write_model(tmp_path)


@pytest.fixture
def engine(tmp_path: Path, model: OnnxModel) -> Engine:
    return OnnxRuntime(threads=1).build(
        tmp_path, model, Path("engines/onnxruntime/sparse"), twin="sparse"
    )


def test_engine_file_names_model_hash_provider_options_and_versions(
    tmp_path: Path, engine: Engine
) -> None:
    assert engine.path == "engines/onnxruntime/sparse/engine.json"
    assert engine.device == f"CPU ({cpu_model()})"
    assert json.loads((tmp_path / engine.path).read_text(encoding="utf-8")) == {
        "backend": "onnxruntime",
        "provider": PROVIDER,
        "onnx": engine.onnx,
        "onnx_sha256": "ab" * 32,
        "session_options": {"intra_op_num_threads": 1},
        "versions": {"onnxruntime": ort.__version__},
    }
    assert [p.name for p in (tmp_path / engine.path).parent.iterdir()] == ["engine.json"]


def test_session_computes_what_the_graph_says(tmp_path: Path, engine: Engine) -> None:
    rows = np.array([[1, 0, 2, 0], [0, 1, 0, 1]], dtype=np.float32)
    with OnnxRuntime().open(tmp_path, engine) as session:
        outputs = session.infer({"rows": rows})
    assert list(outputs) == ["scores"]
    np.testing.assert_array_equal(outputs["scores"], rows @ WEIGHT)


def test_latencies_are_one_positive_time_per_run(tmp_path: Path, engine: Engine) -> None:
    with OnnxRuntime().open(tmp_path, engine) as session:
        elapsed = session.latencies_ms({"rows": np.ones((1, 4), np.float32)}, runs=5, warmup=2)
    assert elapsed.shape == (5,)
    assert elapsed.dtype == np.float64
    assert (elapsed > 0).all()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "missing rows, not known none; feed exactly rows"),
        (["rows", "extra"], "missing none, not known extra"),
        (["Rows"], "missing rows, not known Rows"),
    ],
)
def test_feeds_with_wrong_names_are_named(
    tmp_path: Path, engine: Engine, names: list[str], message: str
) -> None:
    feeds = {name: np.ones((1, 4), np.float32) for name in names}
    with OnnxRuntime().open(tmp_path, engine) as session:
        with pytest.raises(EngineError, match=message):
            session.infer(feeds)
        with pytest.raises(EngineError, match=message):
            session.latencies_ms(feeds, runs=1, warmup=0)


def test_feed_of_wrong_shape_is_an_engine_error(tmp_path: Path, engine: Engine) -> None:
    with (
        OnnxRuntime().open(tmp_path, engine) as session,
        pytest.raises(EngineError, match=r"could not run onnx/sparse/model\.onnx"),
    ):
        session.infer({"rows": np.ones((1, 5), np.float32)})


def test_session_is_closed_on_exit(tmp_path: Path, engine: Engine) -> None:
    with OnnxRuntime().open(tmp_path, engine) as session:
        pass
    with pytest.raises(EngineError, match="is closed; open the engine again"):
        session.infer({"rows": np.ones((1, 4), np.float32)})


def test_bfloat16_is_built_but_cannot_run_here(tmp_path: Path) -> None:
    model = write_model(tmp_path, "bfloat16")
    engine = OnnxRuntime().build(tmp_path, model, Path("engines"), twin="sparse")
    assert (engine.dtype, engine.onnx_sha256) == ("bfloat16", model.sha256)
    told = "no bfloat16 kernels; build with --dtype float16 or float32 to measure it on a CPU"
    with pytest.raises(BackendMissingError, match=told), OnnxRuntime().open(tmp_path, engine):
        pass


def test_file_that_does_not_load_writes_no_engine(tmp_path: Path, model: OnnxModel) -> None:
    (tmp_path / model.path).write_bytes(b"not an ONNX file")
    with pytest.raises(EngineError, match=r"does not load .*model\.onnx"):
        OnnxRuntime().build(tmp_path, model, Path("engines"), twin="sparse")
    assert not (tmp_path / "engines").exists()


def test_silent_change_of_provider_is_an_error(
    tmp_path: Path, model: OnnxModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["AzureExecutionProvider", PROVIDER]

    monkeypatch.setattr(ort, "InferenceSession", Elsewhere)
    with pytest.raises(EngineError, match=r"AzureExecutionProvider.* where CPUExecutionProvider"):
        OnnxRuntime().build(tmp_path, model, Path("engines"), twin="sparse")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"session_options": {}}'])
def test_damaged_engine_file_says_what_to_do(tmp_path: Path, engine: Engine, text: str) -> None:
    (tmp_path / engine.path).write_text(text, encoding="utf-8")
    with (
        pytest.raises(
            EngineError, match=r"(cannot be read|is not readable JSON) .* compile the model again"
        ),
        OnnxRuntime().open(tmp_path, engine),
    ):
        pass


def test_engine_file_of_another_model_is_refused(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / engine.path
    path.write_text(path.read_text(encoding="utf-8").replace("abab", "cdcd"), encoding="utf-8")
    with (
        pytest.raises(EngineError, match=r"was made from an ONNX file with hash cdcd"),
        OnnxRuntime().open(tmp_path, engine),
    ):
        pass


def test_evidence_names_every_expected_layer_and_no_other(engine: Engine) -> None:
    def check(tensor: str, module: str, *, expected: bool) -> TensorCheck:
        return TensorCheck(
            tensor=tensor,
            module=module,
            node="node",
            op_type="MatMul",
            dtype="float32",
            shape=(4, 4),
            axis=0,
            density=0.5,
            is_24=True,
            expected=expected,
            first_violation=None,
            reason="",
        )

    sparsity = (
        check("val_1", "layer.0.query", expected=True),
        check("val_2", "", expected=True),
        check("val_3", "pooler", expected=False),
    )
    evidence = OnnxRuntime().evidence(Path(), engine, sparsity)
    assert (evidence.eligible, evidence.chosen) == (0, 0)
    assert [layer.module for layer in evidence.layers] == ["layer.0.query", "val_2"]
    assert {(layer.chosen, layer.reason) for layer in evidence.layers} == {
        (False, NO_SPARSE_KERNELS)
    }
    assert evidence.summary.endswith("0 of 2 2:4 layers run on one")


def test_cpu_model_falls_back_to_the_architecture(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    assert cpu_model(table)
    table.write_text("processor : 0\nmodel name\t: Some CPU @ 2GHz\n", encoding="utf-8")
    assert cpu_model(table) == "Some CPU @ 2GHz"


@pytest.mark.parametrize(
    "said",
    [
        "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 4096",
        "std::bad_alloc",
    ],
)
def test_a_lack_of_memory_is_no_fault_of_an_engine(said: str) -> None:
    """It is told as one, so that the stage is not kept as failed and the next run goes on."""

    class Full:
        def run(self, *_: object) -> None:
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {said}")

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    session = OrtSession(Full(), "a model")
    with pytest.raises(MemoryError, match=said.split()[-1]):
        session.infer({})
