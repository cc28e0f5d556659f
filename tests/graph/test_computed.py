"""Weights that are computed from constants, against ONNX Runtime, which runs the same file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph_models import Array, array_24, bad_groups, ints, node, write_onnx
from onnx import TensorProto

from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check import evaluation
from prox24_deploy.graph.check.check import check_onnx, check_path

K, N = 16, 12
MASK = (array_24((K, N), 0) != 0).astype(np.float32)
FULL = np.full((K, N), 3, np.float32)
HALF = np.array(0.5, np.float32)


def scalar(number: float) -> Array:
    return np.array(number, np.float32)


def multiplied(path: Path) -> Array:
    """The matrix that ONNX Runtime multiplies its input by."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(K, dtype=np.float32)})[0])


def row(path: Path, nodes: Sequence[onnx.NodeProto], weights: dict[str, Array]) -> TensorCheck:
    nodes = [*nodes, node("MatMul", ["x", "c"], "y")]
    checks = check_onnx(write_onnx(path, nodes, weights, opset=21))
    assert len(checks) == 1
    return checks[0]


def agrees(path: Path, nodes: Sequence[onnx.NodeProto], weights: dict[str, Array]) -> TensorCheck:
    """The row of a weight, which must be what ONNX Runtime finds."""
    check = row(path, nodes, weights)
    matrix = multiplied(path)
    assert (check.unproven, check.is_24) == (False, not bad_groups(matrix))
    assert check.density == pytest.approx(np.count_nonzero(matrix) / matrix.size)
    return check


@pytest.mark.parametrize("order", [["w", "m"], ["m", "w"]])
@pytest.mark.parametrize("mask", [MASK, np.ones((K, N), np.float32)])
def test_a_mask_in_front_of_a_weight(tmp_path: Path, order: list[str], mask: Array) -> None:
    check = agrees(tmp_path / "m.onnx", [node("Mul", order, "c")], {"w": FULL, "m": mask})
    assert (check.axis, check.part) == (0, f" (computed from {', '.join(order)})")
    assert check.first_violation == (None if check.is_24 else (0, 0))


@pytest.mark.parametrize("order", [["w", "m"], ["m", "w"]])
def test_a_weight_is_ignored_by_the_name_of_any_tensor_that_it_is_made_of(
    tmp_path: Path, order: list[str]
) -> None:
    nodes = [node("Mul", order, "c"), node("MatMul", ["x", "c"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": FULL, "m": FULL})
    assert len(check_path(path).violations) == 1
    for name in order:
        assert not check_path(path, ignore=[name]).violations


CHAINS: list[tuple[list[onnx.NodeProto], dict[str, Array]]] = [
    ([node("Where", ["m", "w", "z"], "c")], {"m": MASK != 0, "z": scalar(0)}),
    ([node("Where", ["m", "w", "z"], "c")], {"m": MASK == 0, "z": scalar(1)}),
    (
        [node("Cast", ["m"], "f", to=TensorProto.FLOAT), node("Mul", ["f", "w"], "c")],
        {"m": MASK != 0},
    ),
    ([node("And", ["m", "m"], "b"), node("Where", ["b", "w", "z"], "c")],
     {"m": MASK != 0, "z": scalar(0)}),
    ([node("Mul", ["w", "m"], "a"), node("Mul", ["a", "s"], "c")],
     {"m": MASK, "s": np.linspace(0, 1, N, dtype=np.float32)}),
    ([node("Mul", ["w", "m"], "a"), node("Clip", ["a", "l", "h"], "c")],
     {"m": MASK, "l": scalar(-1), "h": scalar(1)}),
    ([node("Mul", ["w", "m"], "a"), node("Clip", ["a", "l", "h"], "c")],
     {"m": MASK, "l": scalar(0.1), "h": scalar(1)}),
    ([node("Mul", ["w", "m"], "a"), node("Add", ["a", "z"], "c")], {"m": MASK, "z": scalar(0)}),
    ([node("Mul", ["w", "m"], "a"), node("Add", ["a", "z"], "c")], {"m": MASK, "z": scalar(1)}),
    ([node("Min", ["w", "m"], "c")], {"m": MASK}),
    ([node("Max", ["n", "m"], "c")], {"m": MASK, "n": -FULL}),
    ([node("Mul", ["w", "m"], "a"), node("Relu", ["a"], "c")], {"m": -MASK}),
    ([node("Mul", ["w", "m"], "a"), node("Neg", ["a"], "b"), node("Tanh", ["b"], "c")],
     {"m": MASK}),
    ([node("Mul", ["w", "m"], "a"), node("Div", ["a", "s"], "c")], {"m": MASK, "s": FULL}),
    ([node("Mul", ["w", "m"], "a"), node("Softmax", ["a"], "c", axis=0)], {"m": MASK}),
    ([node("Tile", ["v", "r"], "c")], {"v": MASK[:8], "r": ints(2, 1)}),
    ([node("Pad", ["v", "p"], "c")], {"v": MASK[:12], "p": ints(2, 0, 2, 0)}),
    ([node("Gather", ["m", "i"], "c")], {"m": MASK, "i": np.arange(K)[::-1].copy()}),
    ([node("MatMul", ["a", "b"], "p"), node("Mul", ["p", "m"], "c")],
     {"m": MASK, "a": np.ones((K, 2), np.float32), "b": np.ones((2, N), np.float32)}),
    ([node("Transpose", ["t"], "u"), node("Mul", ["w", "u"], "c")], {"t": MASK.T.copy()}),
    ([node("Mul", ["w", "m"], "a"), node("Trilu", ["a"], "c")], {"m": MASK}),
    ([node("Sub", ["w", "f"], "c")], {"f": FULL - MASK}),
    ([node("Pow", ["m", "e"], "c")], {"m": MASK, "e": scalar(2)}),
    ([node("Identity", ["m"], "i"), node("Dropout", ["i"], "c")], {"m": MASK}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_constants_are_computed_as_the_runtime_computes_them(tmp_path: Path, number: int) -> None:
    nodes, constants = CHAINS[number]
    used = {name for each in nodes for name in each.input}
    weights = {"w": FULL, **constants}
    path = tmp_path / "m.onnx"
    write_onnx(path, nodes, weights, opset=21)
    nodes = [*nodes, node("MatMul", ["x", "c"], "y")]
    path = write_onnx(path, nodes, {k: v for k, v in weights.items() if k in used}, opset=21)
    checks = [check for check in check_onnx(path) if check.node == "node_y"]
    matrix = multiplied(path)
    assert {(check.unproven, check.is_24) for check in checks} == {(False, not bad_groups(matrix))}


@pytest.mark.parametrize(
    ("dtype", "point"), [("uint8", 7), ("int8", -3), ("uint8", 0), ("int32", 0), ("int16", 5)]
)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_quantised_weights_are_compared_with_their_zero_points(
    tmp_path: Path, dtype: str, point: int, axis: int | None
) -> None:
    length = () if axis is None else ((K, N)[axis],)
    points = np.full(length, point, dtype)
    if points.size > 1 and dtype != "int32":
        points[::2] += 1
    spread = points if axis != 0 else points[:, None]
    nodes = [node("DequantizeLinear", ["w", "s", "p"], "c", axis=axis or 0)]
    weights = {"s": np.ones(length, np.float32), "p": points}
    for stored in (np.where(MASK, spread + 2, spread), np.zeros((K, N))):
        agrees(tmp_path / "m.onnx", nodes, {**weights, "w": stored.astype(dtype)})


def test_blocks_have_zero_points_of_their_own(tmp_path: Path) -> None:
    points = np.arange(2 * N).reshape(2, N).astype(np.uint8)
    stored = np.where(MASK, 99, np.repeat(points, K // 2, 0)).astype(np.uint8)
    nodes = [node("DequantizeLinear", ["w", "s", "p"], "c", axis=0, block_size=K // 2)]
    weights: dict[str, Array] = {"w": stored, "s": np.ones((2, N), np.float32), "p": points}
    assert agrees(tmp_path / "m.onnx", nodes, weights).is_24
    weights["w"] = stored + 1
    assert not agrees(tmp_path / "m.onnx", nodes, weights).is_24


@pytest.mark.parametrize("kind", ["int4", "uint4", "float8_e4m3fn", "float8_e5m2"])
def test_small_types_are_dequantised(tmp_path: Path, kind: str) -> None:
    stored = MASK.astype(np.dtype(getattr(ml_dtypes, kind)))
    nodes = [node("DequantizeLinear", ["w", "s"], "c")]
    assert row(tmp_path / "m.onnx", nodes, {"w": stored, "s": HALF}).is_24
    stored = (MASK + 1).astype(stored.dtype)
    check = row(tmp_path / "m.onnx", nodes, {"w": stored, "s": HALF})
    assert (check.is_24, check.unproven, check.dtype) == (False, False, kind)


def test_zero_points_of_blocks_of_four_bits(tmp_path: Path) -> None:
    points = np.array([[3] * N, [5] * N]).astype(ml_dtypes.uint4)
    stored = np.where(MASK, 9, np.repeat(points.astype(int), K // 2, 0)).astype(ml_dtypes.uint4)
    nodes = [node("DequantizeLinear", ["w", "s", "p"], "c", axis=0, block_size=K // 2)]
    weights: dict[str, Array] = {"w": stored, "s": np.ones((2, N), np.float32), "p": points}
    assert row(tmp_path / "m.onnx", nodes, weights).is_24


@pytest.mark.parametrize("between", [[], [node("Clip", ["q", "l", "h"], "k")]])
@pytest.mark.parametrize("point", [0, 3])
def test_float_weight_that_is_quantised_in_the_graph(
    tmp_path: Path, between: list[onnx.NodeProto], point: int
) -> None:
    last = "k" if between else "q"
    nodes = [
        node("QuantizeLinear", ["w", "s", "p"], "q"),
        *between,
        node("DequantizeLinear", [last, "s", "p"], "c"),
    ]
    weights = {"s": HALF, "p": np.array(point, np.int8), "w": FULL * MASK}
    weights |= {"l": np.array(-5, np.int8), "h": np.array(5, np.int8)} if between else {}
    assert agrees(tmp_path / "m.onnx", nodes, weights).is_24
    # What is too small for the scale becomes zero, and a dense weight 2:4.
    weights["w"] = FULL * MASK + 0.01
    assert agrees(tmp_path / "m.onnx", nodes, weights).is_24
    weights["w"] = FULL
    assert not agrees(tmp_path / "m.onnx", nodes, weights).is_24


def test_zero_point_that_is_lost_between_quantising_and_dequantising(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", ["w", "s", "p"], "q"),
        node("DequantizeLinear", ["q", "s", "other"], "c"),
    ]
    weights = {
        "w": FULL * MASK, "s": HALF, "p": np.array(0, np.int8), "other": np.array(1, np.int8),
    }  # fmt: skip
    assert not agrees(tmp_path / "m.onnx", nodes, weights).is_24


@pytest.mark.parametrize("domain", ["trt", "com.microsoft"])
def test_quantisers_of_other_domains_are_followed_and_computed(tmp_path: Path, domain: str) -> None:
    prefix = "TRT_FP8" if domain == "trt" else ""
    nodes = [
        node(f"{prefix}QuantizeLinear", ["w", "s"], "q", domain=domain),
        node(f"{prefix}DequantizeLinear", ["q", "s"], "c", domain=domain),
    ]
    path = tmp_path / "m.onnx"
    assert row(path, nodes, {"w": FULL * MASK, "s": HALF}).is_24
    check = row(path, nodes, {"w": FULL, "s": HALF})
    assert (check.is_24, check.unproven) == (False, False)
    assert row(path, nodes, {"w": FULL * MASK + 1e-4, "s": np.array(9, np.float32)}).is_24


def test_a_cast_that_rounds_to_zero_is_computed(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], "h", to=TensorProto.FLOAT16),
        node("Cast", ["h"], "c", to=TensorProto.FLOAT),
    ]
    assert agrees(tmp_path / "m.onnx", nodes, {"w": MASK + 1e-9}).is_24
    assert not agrees(tmp_path / "m.onnx", nodes, {"w": MASK + 1}).is_24


def test_integers_with_a_zero_point_for_each_output(tmp_path: Path) -> None:
    points = np.arange(N).astype(np.uint8)
    stored = np.where(MASK, 99, points).astype(np.uint8)
    made = node("MatMulInteger", ["q", "w", "", "p"], "y")
    nodes = [node("Cast", ["x"], "q", to=TensorProto.UINT8), made]
    weights = {"w": stored, "p": points}
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert (check.is_24, check.density, check.axis) == (True, 0.5, 0)
    weights["p"] = points + 1
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert (check.is_24, check.unproven) == (False, False)
    weights["p"] = np.zeros(N + 1, np.uint8) + np.arange(N + 1).astype(np.uint8)
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert check.unproven


def test_a_scale_that_is_not_finite_keeps_no_zeros(tmp_path: Path) -> None:
    nodes = [node("DequantizeLinear", ["w", "s"], "c")]
    weights = {"w": MASK.astype(np.int8), "s": np.array(np.inf, np.float32)}
    assert not row(tmp_path / "m.onnx", nodes, weights).is_24


def test_a_constant_that_grows_out_of_bounds_is_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node("Mul", ["a", "b"], "c")]
    weights = {"a": np.ones((K, 1), np.float32), "b": np.ones((1, N), np.float32)}
    assert not row(tmp_path / "m.onnx", nodes, weights).unproven
    monkeypatch.setattr(evaluation, "_FREE_ELEMENTS", K * N - 1)
    check = row(tmp_path / "m.onnx", nodes, weights)
    assert check.unproven
    assert check.reason.startswith("Mul computes the weight from it in a way that the check does n")


@pytest.mark.parametrize("attribute", ["elements", "steps"])
def test_work_out_of_proportion_to_the_file_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    budget = evaluation.Budget(10**6, 10**6)
    setattr(budget, attribute, 1)
    monkeypatch.setattr(evaluation.Budget, "of", lambda _: budget)
    nodes: list[Any] = [node("Abs", ["w"], "a"), node("Mul", ["a", "m"], "c")]
    check = row(tmp_path / "m.onnx", nodes, {"w": FULL, "m": MASK})
    assert (check.is_24, check.unproven) == (False, True)
    assert check.reason.startswith("it takes more work than the check does for a file of this size")
