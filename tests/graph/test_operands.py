"""Which axis each operator sums over, against the runtimes that execute it."""

import itertools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_models import Array, array_24, node, spoil, write_onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_onnx
from prox24_deploy.graph.check.operands import sums_no_weight
from prox24_deploy.graph.check.operators import ACTIVATIONS, NO_PRODUCT

MICROSOFT = "com.microsoft"


def is_24_along(array: Array, axis: int) -> bool:
    """Every group of four, one by one."""
    lines = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    starts = range(0, array.shape[axis], 4)
    return all(
        sum(bool(value != 0) for value in line[start : start + 4]) <= 2
        for line, start in itertools.product(lines, starts)
    )


def run(path: Path, x: Array) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def only(path: Path) -> TensorCheck:
    (check,) = check_onnx(path)
    return check


@pytest.mark.parametrize("pruned_axis", [0, 1, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("batch", [0, 1])
def test_fused_matmul_is_read_as_its_runtime_executes_it(
    tmp_path: Path, pruned_axis: int, *, first: bool, trans: int, batch: int
) -> None:
    side = "A" if first else "B"
    attributes: dict[str, Any] = {f"trans{side}": trans, f"transBatch{side}": batch, "alpha": 1.0}
    inputs = ["w", "x"] if first else ["x", "w"]
    made = node("FusedMatMul", inputs, "y", domain=MICROSOFT, **attributes)
    weight = array_24((8, 4, 12), pruned_axis)
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": weight})
    check = only(path)
    length = weight.shape[check.axis]
    unit = np.eye(length, dtype=np.float32)
    result = run(path, np.tile(unit, (weight.shape[1 if batch else 0], 1, 1)))
    assert result.shape[-1 if first else -2] == length
    assert check.is_24 == is_24_along(result, 2 if first else 1)
    assert check.ineligible_reason.startswith(
        ("TensorRT does not parse FusedMatMul of com.m", "it is not proven 2:4; TensorRT does not")
    )


@pytest.mark.parametrize("op", ["FusedGemm", "TransposeMatMul", "GemmFastGelu"])
def test_other_fused_products_are_read_like_their_plain_forms(tmp_path: Path, op: str) -> None:
    made = node(op, ["x", "w"], "y", domain=MICROSOFT)
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((16, 8), 0)})
    assert (only(path).is_24, only(path).axis, only(path).op_type) == (True, 0, op)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pruned_axis", [0, 1, 2])
def test_transposed_convolution_sums_over_the_first_axis_within_each_group(
    tmp_path: Path, pruned_axis: int, groups: int
) -> None:
    weight = array_24((16, 4, 4, 1), pruned_axis)
    made = node("ConvTranspose", ["x", "w"], "y", group=groups)
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": weight})
    channels = np.eye(16, dtype=np.float32)[:, :, None, None]
    result = run(path, channels)
    assert result.shape == (16, 4 * groups, 4, 1)
    check = only(path)
    # Channels of other groups give zeros, which no group of four within a group contains.
    assert (check.axis, check.is_24) == (0, is_24_along(result, 0))
    assert "not for ConvTranspose" in check.ineligible_reason


def test_groups_of_a_transposed_convolution_are_not_counted_across(tmp_path: Path) -> None:
    made = node("ConvTranspose", ["x", "w"], "y", group=2)
    weight = np.zeros((12, 4, 1, 1), np.float32)
    check = only(write_onnx(tmp_path / "m.onnx", [made], {"w": weight}))
    assert check.reason == "reduction length 6 is not a multiple of 4"
    made = node("ConvTranspose", ["x", "w"], "y", group=5)
    check = only(write_onnx(tmp_path / "m.onnx", [made], {"w": weight}))
    assert check.reason == "its 5 groups do not fit the stored tensor"


@pytest.mark.parametrize("pruned_axis", [0, 1])
def test_grouped_convolution_sums_over_the_channels_of_a_group(
    tmp_path: Path, pruned_axis: int
) -> None:
    weight = array_24((8, 16, 1, 1), pruned_axis, "float16").astype(np.float32)
    made = node("Conv", ["x", "w"], "y", group=4)
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": weight})
    channels = np.eye(64, dtype=np.float32)[:, :, None, None]
    outputs: Any = ReferenceEvaluator(onnx.load(path)).run(None, {"x": channels})
    assert only(path).is_24 == is_24_along(outputs[0], 0)
    assert "for a convolution of 4 groups" in only(path).ineligible_reason


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_have_two_weights(tmp_path: Path, op: str) -> None:
    made = node(op, ["x", "w", "r"], "y", hidden_size=4)
    weights = {"w": array_24((1, 8, 16), 2), "r": array_24((1, 8, 4), 1)}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", [made], weights))
    assert [(c.tensor, c.axis, c.is_24) for c in checks] == [("w", 2, True), ("r", 2, False)]
    assert f"not for {op}" in checks[0].ineligible_reason


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("bk,kn->bn", (8, 4)), ("bk, nk -> bn", (4, 8)), ("bk,nkm->bnm", (4, 8, 4))],
)
def test_einsum_is_read_from_its_equation(
    tmp_path: Path, equation: str, shape: tuple[int, ...]
) -> None:
    for axis in range(len(shape)):
        made = node("Einsum", ["x", "w"], "y", equation=equation)
        path = write_onnx(tmp_path / "m.onnx", [made], {"w": array_24(shape, axis)})
        outputs: Any = ReferenceEvaluator(onnx.load(path)).run(
            None, {"x": np.eye(8, dtype=np.float32)}
        )
        assert only(path).is_24 == is_24_along(outputs[0], 0)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bi,ijk->bi", "does not sum over one axis that both operands have"),
        ("bji,ijk->bk", "does not sum over one axis that both operands have"),
        ("bik,ijk->bj", "sums over axes that do not neighbour each other"),
        ("b...k,k...n->bn", "the check does not read the equation 'b...k,k...n->bn' of Einsum"),
        ("bk,kkn->bn", "the check does not read the equation"),
        ("bk,kn->bn", "the check does not read the equation 'bk,kn->bn' of Einsum"),
        ("bk,k$n->bn", "the check does not read the equation"),
    ],
)
def test_einsum_that_is_not_one_product_is_a_row(
    tmp_path: Path, equation: str, reason: str
) -> None:
    made = node("Einsum", ["x", "w"], "y", equation=equation)
    check = only(write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((4, 4, 8), 0)}))
    assert (check.is_24, check.unproven, check.axis) == (False, True, -1)
    assert reason in check.reason


@pytest.mark.parametrize(
    ("equation", "shape", "first", "count"),
    [
        ("bhd,hdo->bo", (2, 8, 4), 0, 2),
        ("bhd,ohd->bo", (4, 2, 6), 1, 2),
        ("...hd,hdo->...o", (2, 2, 4), 0, 2),
        ("b...k,kn->b...n", (8, 4), 0, 1),
        ("...k,nk->...n", (4, 8), 1, 1),
        ("bk,kn", (8, 4), 0, 1),
        ("...k,kn", (8, 4), 0, 1),
        ("bk,...kn->...bn", (3, 8, 4), 1, 1),
        ("ebk,ekn->ebn", (2, 8, 4), 1, 1),
        ("eb, e b n -> en", (2, 8, 4), 1, 1),
    ],
)
def test_several_letters_batches_and_dots_are_read_from_the_equation(
    tmp_path: Path, equation: str, shape: tuple[int, ...], first: int, count: int
) -> None:
    """Axes of the weight that are summed are one axis of groups, whatever lies around them."""
    summed = math.prod(shape[first : first + count])
    outer = (*shape[:first], summed, *shape[first + count :])
    pruned = array_24(outer, first)
    made = node("Einsum", ["x", "w"], "y", equation=equation)
    path = tmp_path / "m.onnx"
    assert only(write_onnx(path, [made], {"w": pruned.reshape(shape)})).is_24
    spoiled = spoil(pruned, (0,) * len(outer), first)
    check = only(write_onnx(path, [made], {"w": spoiled.reshape(shape)}))
    assert (check.is_24, check.unproven) == (False, False)
    assert check.first_violation == (0,) * len(shape)


def test_einsum_of_three_operands_has_a_weight_in_each(tmp_path: Path) -> None:
    made = node("Einsum", ["x", "w", "s"], "y", equation="bk,kn,n->bn")
    weights = {"w": array_24((8, 4), 0), "s": np.ones(4, np.float32)}
    assert [c.tensor for c in check_onnx(write_onnx(tmp_path / "m.onnx", [made], weights))] == ["w"]
    made = node("Einsum", ["x", "w", "v"], "y", equation="bk,kn,nm->bm")
    weights = {"w": np.ones((8, 4), np.float32), "v": np.ones((4, 8), np.float32)}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", [made], weights))
    assert [(c.tensor, c.is_24, c.unproven) for c in checks] == [
        ("w", False, True), ("v", False, False),
    ]  # fmt: skip


def test_einsum_that_sums_nothing_has_no_weight(tmp_path: Path) -> None:
    nodes = [
        node("Einsum", ["x", "w"], "a", equation="b,hd->bhd"),
        node("MatMul", ["a", "v"], "y"),
    ]
    weights = {"w": array_24((4, 8), 0), "v": array_24((8, 8), 0)}
    assert only(write_onnx(tmp_path / "m.onnx", nodes, weights)).tensor == "v"


@pytest.mark.parametrize(
    ("op", "domain", "inputs"),
    [
        ("MatMulInteger", "", ["x", "w", "", "zero"]),
        ("QLinearMatMul", "", ["x", "s", "z", "w", "s", "zero", "s", "z"]),
        ("ConvInteger", "", ["x", "w", "", "zero"]),
        ("QLinearConv", "", ["x", "s", "z", "w", "s", "zero", "s", "z"]),
        ("QGemm", MICROSOFT, ["x", "s", "z", "w", "s", "zero"]),
        ("MatMulIntegerToFloat", MICROSOFT, ["x", "w", "s", "s", "", "zero"]),
        ("DynamicQuantizeMatMul", MICROSOFT, ["x", "w", "s", "zero"]),
        ("QAttention", MICROSOFT, ["x", "w", "s", "s", "s", "", "", "zero"]),
    ],
)
def test_integer_operators_say_which_integer_is_zero(
    tmp_path: Path, op: str, domain: str, inputs: list[str]
) -> None:
    axis = 1 if "Conv" in op else 0
    weights: dict[str, Array] = {
        "w": np.where(array_24((16, 16), axis) != 0, 9, 7).astype(np.uint8),
        "zero": np.array(7, np.uint8),
        "s": np.array(0.5, np.float32),
        "z": np.array(0, np.uint8),
    }
    made = node(op, inputs, "y", domain=domain)
    check = only(write_onnx(tmp_path / "m.onnx", [made], weights))
    assert (check.is_24, check.axis, check.density) == (True, axis, 0.5)
    # Without the zero point nothing in the tensor is a zero.
    made = node(op, ["" if name == "zero" else name for name in inputs], "y", domain=domain)
    assert not only(write_onnx(tmp_path / "m.onnx", [made], weights)).is_24


@pytest.mark.parametrize(
    ("op", "domain"),
    [("MatMulNBits", MICROSOFT), ("MoE", MICROSOFT), ("SparseLinear", "local.ops")],
)
def test_weight_in_a_form_that_is_not_read_is_a_row(tmp_path: Path, op: str, domain: str) -> None:
    made = node(op, ["x", "w", "bias", "", "name"], "y", domain=domain)
    weights: dict[str, Array] = {
        "w": np.ones((8, 2, 16), np.uint8),
        "bias": np.ones((1, 8), np.float32),
        "name": np.array(3.0, np.float32),
    }
    check = only(write_onnx(tmp_path / "m.onnx", [made], weights))
    assert check.reason == f"{op} keeps it in a form that the check does not read"
    assert (check.is_24, check.expected, check.eligible) == (False, True, False)
    assert check.ineligible_reason == (
        f"it is not proven 2:4; TensorRT does not parse {op} of {domain}"
    )


def test_weights_in_attributes_are_listed(tmp_path: Path) -> None:
    held = numpy_helper.from_array(np.ones((8, 8), np.float32), "inner")
    nodes = [
        node("Dense", ["x"], "a", domain="local", kernel=held, sizes=[1.0, 2.0]),
        node("Filter", ["a"], "b", domain="local", taps=[0.5] * 64),
        node("LinearRegressor", ["b"], "c", domain="ai.onnx.ml", coefficients=[1.0, 2.0]),
        node("Scaler", ["c"], "d", domain="ai.onnx.ml", scale=[1.0] * 99),
        node("MatMul", ["d", "w"], "y"),
    ]
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)}))
    assert [(c.tensor, c.unproven, c.is_24) for c in checks] == [
        ("kernel of node_a", True, False),
        ("taps of node_b", True, False),
        ("coefficients of node_c", True, False),
        ("w", False, True),
    ]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "LSTM", "ConvInteger", "QLinearConv"])
def test_a_constant_that_is_taken_for_data_is_listed(tmp_path: Path, op: str) -> None:
    rest = ["x"] * 7 if op == "QLinearConv" else ["x"]
    made = node(op, ["w", *rest], "y")
    check = only(write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((4, 8, 4), 1)}))
    assert check.reason == f"{op} takes it for data, which the check does not prove"


def test_an_operator_of_a_later_set_may_sum_over_any_input(tmp_path: Path) -> None:
    made = node("FutureProduct", ["x", "w"], "y")
    check = only(write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((8, 8), 0)}))
    assert (check.unproven, check.op_type) == (True, "FutureProduct")


def test_every_operator_of_onnx_is_told_apart() -> None:
    names = {
        schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain
    }
    for name in names:
        made = node(name, ["x"], "y")
        known = ir.from_proto(made)
        assert sums_no_weight(known) != (name in ACTIVATIONS - NO_PRODUCT), name
    assert sums_no_weight(ir.from_proto(node("Relu", ["x"], "y")))
    assert not sums_no_weight(ir.from_proto(node("Attention", ["x"], "y")))


def test_tables_of_fused_operators_are_no_weights(tmp_path: Path) -> None:
    nodes = [
        node("RotaryEmbedding", ["x", "p", "cos", "sin"], "r", domain=MICROSOFT),
        node("SkipLayerNormalization", ["r", "table", "p"], "s", domain=MICROSOFT),
        node("Gather", ["table", "x"], "g"),
        node("Attention", ["s", "w", "p"], "y", domain=MICROSOFT),
    ]
    table = np.ones((8, 8), np.float32)
    weights = {"cos": table, "sin": table, "table": table, "w": array_24((8, 24), 0)}
    check = only(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert (check.tensor, check.is_24, check.axis) == ("w", True, 0)


def quantised(path: Path, weight: Array, *, both: bool) -> TensorCheck:
    nodes = [
        node("DequantizeLinear", ["x", "s"], "dx"),
        node("DequantizeLinear", ["w", "s"], "dw"),
        node("Transpose", ["dw"], "t", perm=[1, 0]),
        node("MatMul", ["dx" if both else "x", "t"], "y"),
    ]
    weights = {"w": weight, "s": np.array(0.5, np.float32)}
    return only(write_onnx(path, nodes, weights))


@pytest.mark.parametrize("kind", [np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)])
def test_product_of_two_quantised_operands_is_eligible_in_their_type(
    tmp_path: Path, kind: np.dtype[Any]
) -> None:
    weight = (array_24((16, 32), 1) != 0).astype(kind)
    check = quantised(tmp_path / "m.onnx", weight, both=True)
    # INT8 kernels that are sparse put out INT8 too, which nothing asks for here.
    assert (check.is_24, check.eligible) == (True, kind != np.dtype(np.int8))
    check = quantised(tmp_path / "m.onnx", weight, both=False)
    assert (check.is_24, check.eligible) == (True, False)
    assert check.ineligible_reason == "float32 has no sparse kernels"
