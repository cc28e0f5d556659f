from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_models import Array, array_24, node, spoil, write_onnx, write_safetensors
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.graph.check.check import check_onnx, check_safetensors
from prox24_deploy.graph.check.eligibility import WeightShape, obstacles

FLOAT = "float32 has no sparse kernels"


@pytest.mark.parametrize(
    ("op", "dtype", "gemm", "found"),
    [
        ("MatMul", "float16", WeightShape(n=8, k=16), []),
        ("Gemm", "bfloat16", WeightShape(n=8, k=16), []),
        ("Conv", "int8", WeightShape(n=8, k=16), []),
        ("", "float8_e4m3fn", WeightShape(n=8, k=16), []),
        ("MatMul", "float32", WeightShape(n=8, k=16), [FLOAT]),
        ("MatMul", "float16", WeightShape(n=12, k=16), ["N = 12 is not a multiple of 8"]),
        ("MatMul", "float16", WeightShape(n=8, k=24), ["K = 24 is not a multiple of 16"]),
        ("Conv", "float16", WeightShape(n=8, k=3), ["input channels = 3 is not a multiple of 16"]),
        ("Conv", "float16", WeightShape(n=2, k=16), ["output channels = 2 is not a multiple of 8"]),
        (
            "Conv",
            "float16",
            WeightShape(n=8, k=16, groups=2),
            ["TensorRT has no sparse kernels for a convolution of 2 groups"],
        ),
        (
            "LSTM",
            "float16",
            WeightShape(n=8, k=16),
            ["TensorRT has sparse kernels for MatMul, Gemm and"],
        ),
        ("Einsum", "", None, ["TensorRT has sparse kernels for MatMul, Gemm and Conv, not for Ei"]),
    ],
)
def test_rules_that_are_broken_are_said(
    op: str, dtype: str, gemm: WeightShape | None, found: list[str]
) -> None:
    said = obstacles(op, "", dtype, gemm)
    assert len(said) == len(found)
    assert all(text.startswith(start) for text, start in zip(said, found, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "shape", "axis"), [("MatMul", (32, 24), 0), ("Conv", (24, 32, 3, 3), 1)]
)
def test_weight_that_keeps_every_rule_is_eligible_only_if_it_is_24(
    tmp_path: Path, op: str, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    weight = array_24(shape, axis, dtype)
    path = write_onnx(tmp_path / "m.onnx", [node(op, ["x", "w"], "y")], {"w": weight})
    (check,) = check_onnx(path)
    assert (check.eligible, check.ineligible_reason) == (True, "")
    weight = spoil(weight, (0,) * len(shape), axis)
    write_onnx(path, [node(op, ["x", "w"], "y")], {"w": weight})
    (check,) = check_onnx(path)
    assert (check.eligible, check.ineligible_reason) == (False, "it is not proven 2:4")


def test_every_broken_rule_is_named(tmp_path: Path) -> None:
    weight = {"w": np.ones((20, 10), np.float32)}
    (check,) = check_onnx(
        write_onnx(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], weight)
    )
    assert check.ineligible_reason == (
        f"it is not proven 2:4; {FLOAT}; N = 10 is not a multiple of 8; "
        "K = 20 is not a multiple of 16"
    )


def test_packed_projection_counts_with_the_size_of_the_whole(tmp_path: Path) -> None:
    nodes = [node("Concat", ["a", "b"], "w", axis=1), node("MatMul", ["x", "w"], "y")]
    weights = {"a": array_24((16, 12), 0, "float16"), "b": array_24((16, 4), 0, "float16")}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [check.eligible for check in checks] == [True, True]


def test_stored_weights_are_judged_as_the_layers_they_will_be(tmp_path: Path) -> None:
    tensors = {
        "a.weight": array_24((8, 32), 1, "float16"),
        "b.weight": array_24((12, 32), 1, "float32"),
        "c.weight": array_24((16, 24), 0, "float16"),
        "d.weight": array_24((16,), 0, "float16"),
    }
    axes = {"a.weight": 1, "b.weight": 1, "c.weight": 0, "d.weight": 0}
    checks = check_safetensors(write_safetensors(tmp_path / "m.safetensors", tensors, axes))
    assert [check.eligible for check in checks] == [True, False, True, False]
    assert checks[1].ineligible_reason == f"{FLOAT}; N = 12 is not a multiple of 8"


def quantised(
    path: Path, point: dict[str, int], *, computed: str = "", kind: type[np.integer[Any]] = np.int8
) -> Path:
    """A product of two 8-bit operands with a zero point each, whose output is rounded too."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "px"], "qx"),
        node("DequantizeLinear", ["qx", "s", "px"], "dx"),
        node("DequantizeLinear", ["w", "s", "pw"], "dw"),
        node("MatMul", ["dx", "dw"], "m", "fc"),
        node("QuantizeLinear", ["m", "s", "px"], "qm"),
        node("DequantizeLinear", ["qm", "s", "px"], "y"),
    ]
    if computed:
        nodes[:0] = [node(computed, ["z"], "px")]
    weight = np.where(array_24((32, 16), 0) != 0, 9, point["w"]).astype(kind)
    weights: dict[str, Array] = {
        "w": weight,
        "s": np.array(0.5, np.float32),
        "pw": np.array(point["w"], kind),
        "z" if computed else "px": np.array(point["x"], kind),
    }
    path = write_onnx(path, nodes, weights)
    model = onnx.load(path)
    for value, shape in ((model.graph.input[0], [4, 32]), (model.graph.output[0], [4, 16])):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("x", "w"), [(0, 0), (7, 0), (0, 3), (7, 3)])
def test_a_zero_point_that_is_not_zero_keeps_the_whole_file_from_tensorrt(
    tmp_path: Path, x: int, w: int
) -> None:
    (check,) = check_onnx(quantised(tmp_path / "m.onnx", {"x": x, "w": w}))
    assert (check.is_24, check.eligible) == (True, not x and not w)
    if not check.eligible:
        who = "node_qx' (QuantizeLinear)" if x else "node_dw' (DequantizeLinear)"
        assert check.ineligible_reason == (
            f"TensorRT takes no zero point but 0, and node '{who} has another"
        )


def test_a_zero_point_that_is_computed_is_not_taken_for_one(tmp_path: Path) -> None:
    zero = {"x": 0, "w": 0}
    assert check_onnx(quantised(tmp_path / "m.onnx", zero, computed="Identity"))[0].eligible
    (check,) = check_onnx(quantised(tmp_path / "m.onnx", zero, computed="Abs"))
    assert check.ineligible_reason.startswith(
        "TensorRT takes no zero point that is computed, as tha"
    )


def test_unsigned_integers_keep_the_whole_file_from_tensorrt(tmp_path: Path) -> None:
    (check,) = check_onnx(quantised(tmp_path / "m.onnx", {"x": 0, "w": 0}, kind=np.uint8))
    assert check.ineligible_reason.startswith("TensorRT takes no integers without a sign, as node")


def half_product(path: Path, *, sparse: bool) -> Path:
    """A product in float16 that TensorRT may run sparse, but for how its weight is stored."""
    weight = array_24((32, 16), 0, "float16")
    path = write_onnx(path, [node("MatMul", ["x", "w"], "y")], {} if sparse else {"w": weight})
    model = onnx.load(path)
    for value, shape in ((model.graph.input[0], [4, 32]), (model.graph.output[0], [4, 16])):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT16, shape))
    if sparse:
        places = np.flatnonzero(weight).astype(np.int64)
        values = numpy_helper.from_array(weight.reshape(-1)[places], "w")
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(places, "p"), weight.shape)
        )
    path.write_bytes(model.SerializeToString())
    return path


def test_a_sparse_tensor_keeps_the_whole_file_from_tensorrt(tmp_path: Path) -> None:
    assert check_onnx(half_product(tmp_path / "m.onnx", sparse=False))[0].eligible
    (check,) = check_onnx(half_product(tmp_path / "m.onnx", sparse=True))
    assert (check.is_24, check.eligible) == (True, False)
    assert (
        check.ineligible_reason == "TensorRT takes no sparse tensors, as which the file stores 'w'"
    )


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize(
    "make",
    [
        lambda path: quantised(path, {"x": 0, "w": 0}),
        lambda path: quantised(path, {"x": 0, "w": 0}, computed="Identity"),
        lambda path: quantised(path, {"x": 7, "w": 0}),
        lambda path: quantised(path, {"x": 0, "w": 3}),
        lambda path: quantised(path, {"x": 0, "w": 0}, kind=np.uint8),
        lambda path: half_product(path, sparse=False),
        lambda path: half_product(path, sparse=True),
    ],
)
def test_the_parser_of_tensorrt_takes_what_is_said_to_be_taken(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    path = make(tmp_path / "m.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()) == check_onnx(path)[0].eligible


def between(path: Path, op: str, given: list[str]) -> Path:
    """An INT8 product with one node between it and the rounding of its output."""
    model = onnx.load(quantised(path, {"x": 0, "w": 0}))
    product = next(each for each in model.graph.node if each.op_type == "MatMul")
    product.output[0] = "product"
    model.graph.node.insert(len(model.graph.node) - 2, node(op, given, "m"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), "bias"))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("op", "given", "eligible"),
    [
        ("Add", ["product", "bias"], True),
        ("Gelu", ["product"], True),
        ("Transpose", ["product"], True),
        ("Add", ["product", "dx"], False),
        ("Softmax", ["product"], False),
    ],
)
def test_an_int8_product_is_eligible_where_its_kernel_can_write_int8(
    tmp_path: Path, op: str, given: list[str], *, eligible: bool
) -> None:
    (check,) = check_onnx(between(tmp_path / "m.onnx", op, given))
    assert check.eligible == eligible
    said = (
        f"TensorRT has sparse INT8 kernels for INT8 outputs only, and node 'node_m' ({op}) reads "
        "it as it is"
    )
    assert check.ineligible_reason == ("" if eligible else said)
