"""The real TensorRT on a real GPU; written before any such machine was at hand."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tensorrt_models import write_model

from prox24_deploy.config.options import EngineOptions, TensorRtOptions
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.engines.tensorrt.backend import open_tensorrt

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu]
WIDTH = 64


@pytest.mark.parametrize("strip", [False, True])
def test_a_sparse_engine_is_built_told_of_and_computes_the_product(
    *, strip: bool, tmp_path: Path
) -> None:
    options = EngineOptions(
        batches=(1, 4), sequences=(8,), tensorrt=TensorRtOptions(strip_weights=strip)
    )
    backend = open_tensorrt("tensorrt", options)
    model = write_model(tmp_path)
    engine = backend.build(tmp_path, model, Path("engines/tensorrt/sparse"), twin="sparse")
    folder = (tmp_path / engine.path).parent
    assert {path.name for path in folder.iterdir()} == {
        "engine.plan", "engine.json", "build.log", "layers.json",
    }  # fmt: skip
    check = TensorCheck(
        tensor="w",
        module="layer",
        node="node_linear",
        op_type="MatMul",
        dtype="float16",
        shape=(WIDTH, WIDTH),
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
    assert evidence.eligible is not None
    assert evidence.chosen is not None
    weight = numpy_helper.to_array(onnx.load(tmp_path / model.path).graph.initializer[0])
    x = np.random.default_rng(0).standard_normal((4, 8, WIDTH)).astype(np.float16)
    with backend.open(tmp_path, engine) as session:
        found = session.infer({"x": x})["y"]
        elapsed = session.latencies_ms({"x": x}, runs=5, warmup=2)
    expected = np.maximum(x.astype(np.float32) @ weight.astype(np.float32), 0)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.05)
    assert elapsed.shape == (5,)
    assert (elapsed > 0).all()
