"""Inputs, outputs and external files of ONNX files that another exporter may have written."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check.interface import external_files, read_interface


def external(name: str, location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def write(path: Path) -> Path:
    """A weight, a constant and one in a branch, each in a file of its own."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["branch.weight"], ["b"])], "branch", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])],
        [external("branch.weight", "branch.bin")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=external("value", "constant.bin")),
        helper.make_node("If", ["flag"], ["d"], then_branch=branch, else_branch=branch),
        helper.make_node("Sum", ["x", "weight", "c", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "past + sequence"])],
        [external("weight", "weight.bin"), numpy_helper.from_array(np.ones(2), "inline")],
    )  # fmt: skip
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_exact_types_and_named_axes(tmp_path: Path) -> None:
    inputs, outputs = read_interface(write(tmp_path / "model.onnx"))
    assert [(t.name, t.dtype, t.axes) for t in inputs] == [
        ("x", "FLOAT16", ("batch", 4)),
        ("flag", "BOOL", ()),
    ]
    assert [(t.name, t.dtype, t.axes) for t in outputs] == [
        ("y", "FLOAT", ("batch", "past + sequence"))
    ]


def test_files_of_weights_constants_and_branches(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    assert external_files(path) == ("branch.bin", "constant.bin", "weight.bin")
    assert onnx.load(path, load_external_data=False).graph.initializer[0].name == "weight"


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match=r"model\.onnx"):
        read_interface(tmp_path / "model.onnx")
