"""A tiny ONNX model and what surrounds a build of it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.records import OnnxModel
from prox24_deploy.core.types import DType

OPSET = 20


def write_model(
    bundle: Path,
    *,
    op_type: str = "MatMul",
    domain: str = "",
    dtype: DType = "float16",
    name: str = "x",
) -> OnnxModel:
    """One 2:4 MatMul and a Relu, over (batch, sequence, 64), at onnx/sparse/model.onnx."""
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    half = np.tile(np.array([[1], [1], [0], [0]], np.float16), (16, 64))
    weight = half if dtype == "float16" else half.astype(np.float32)
    axes: list[str | int | None] = ["batch", "sequence", 64]
    graph = helper.make_graph(
        [
            helper.make_node(op_type, [name, "w"], ["h"], name="node_linear", domain=domain),
            helper.make_node("Relu", ["h"], ["y"], name="node_relu"),
        ],
        "tiny",
        [helper.make_tensor_value_info(name, kind, axes)],
        [helper.make_tensor_value_info("y", kind, axes)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("custom", 1)]
    path = bundle / "onnx" / "sparse" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return OnnxModel(
        path="onnx/sparse/model.onnx",
        dtype=dtype,
        opset=OPSET,
        sha256="ab" * 32,
        size_bytes=path.stat().st_size,
    )


def write_decoder(path: Path) -> Path:
    """The inputs of a graph with a cache; it computes nothing of use."""
    shapes: dict[str, list[str | int | None]] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "past_key_values.0.key": ["batch", 2, "past", 8],
    }
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["y"])],
        "decoder",
        [helper.make_tensor_value_info(n, TensorProto.INT64, axes) for n, axes in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.INT64, shapes["input_ids"])],
    )
    onnx.save(helper.make_model(graph, ir_version=10), path)
    return path
