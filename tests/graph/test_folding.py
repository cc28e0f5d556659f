"""Weights behind nodes that renumber their elements, against ONNX's reference evaluator.

The evaluator is fed the unit matrix: what comes out is the matrix that the graph multiplies by.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_models import (
    Array,
    array_24,
    bad_groups,
    ints,
    multiplied_matrix,
    node,
    spoil,
    write_onnx,
)
from onnx import TensorProto, helper

from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.check import check_onnx


def row(path: Path, nodes: Sequence[onnx.NodeProto], weights: dict[str, Array]) -> TensorCheck:
    checks = check_onnx(write_onnx(path, nodes, weights))
    assert len(checks) == 1
    return checks[0]


def test_packed_projection_of_several_tensors_has_a_row_for_each(tmp_path: Path) -> None:
    nodes = [node("Concat", ["q", "k", "v"], "w", axis=1), node("MatMul", ["x", "w"], "y", "qkv")]
    weights = {
        "q": array_24((16, 8), 0),
        "k": spoil(array_24((16, 4), 0), (8, 1), 0),
        "v": array_24((16, 4), 0),
    }
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    found = [(c.tensor, c.module, c.is_24, c.first_violation) for c in check_onnx(path)]
    assert found == [
        ("q", "qkv", True, None), ("k", "qkv", False, (8, 1)), ("v", "qkv", True, None),
    ]  # fmt: skip
    assert bad_groups(multiplied_matrix(path, 16)) == 1


def test_packed_projection_that_is_split_has_a_row_for_each_part(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Split", ["w", "sizes"], ["q", "k", "v"], axis=1),
        *(node("MatMul", ["x", name], f"{name}_y", f"attn.{name}") for name in "qkv"),
        node("Concat", ["q_y", "k_y", "v_y"], "y", axis=1),
    ]
    weight = spoil(array_24((16, 16), 0), (4, 9), 0)
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": weight, "sizes": ints(8, 4, 4)})
    found = [(c.module, c.part, c.shape, c.is_24, c.first_violation) for c in check_onnx(path)]
    assert found == [
        ("attn.q", "[:, 0:8]", (16, 8), True, None),
        ("attn.k", "[:, 8:12]", (16, 4), False, (4, 9)),
        ("attn.v", "[:, 12:16]", (16, 4), True, None),
    ]
    assert check_onnx(path)[1].reason.startswith("4 non-zeros in group [4:8, 9] (1 of 16 groups")
    assert bad_groups(multiplied_matrix(path, 16)) == 1


@pytest.mark.parametrize(
    ("attributes", "widths"), [({"num_outputs": 3}, [6, 6, 4]), ({}, [6, 6, 4]), ({"split": 1}, [])]
)
def test_split_without_sizes_cuts_equal_parts(
    tmp_path: Path, attributes: dict[str, Any], widths: list[int]
) -> None:
    if "split" in attributes:
        attributes, widths = {"split": [2, 6, 8]}, [2, 6, 8]
    nodes = [
        helper.make_node("Split", ["w"], ["a", "b", "c"], axis=-1, **attributes),
        *(node("MatMul", ["x", name], f"{name}_y") for name in "abc"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((16, 16), 0)})
    assert [check.shape[1] for check in check_onnx(path)] == widths
    assert all(check.is_24 for check in check_onnx(path))


def test_tensors_joined_along_the_summed_axis_are_proven_also_where_a_group_is_cut(
    tmp_path: Path,
) -> None:
    nodes = [node("Concat", ["a", "b"], "w", axis=0), node("MatMul", ["x", "w"], "y")]
    weights = {"a": array_24((8, 6), 0), "b": array_24((4, 6), 0)}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    assert [check.is_24 for check in check_onnx(path)] == [True, True]
    assert not bad_groups(multiplied_matrix(path, 12))
    whole = array_24((12, 6), 0)
    checks = check_onnx(write_onnx(path, nodes, {"a": whole[:6], "b": whole[6:]}))
    assert [(c.tensor, c.is_24, c.shape) for c in checks] == [
        ("a", True, (6, 6)), ("b", True, (6, 6)),
    ]  # fmt: skip
    # Each half is 2:4 as far as its whole groups go, and only the group between them is not.
    halves = {"a": np.zeros((6, 6), np.float32), "b": np.zeros((6, 6), np.float32)}
    halves["a"][4:], halves["b"][0] = 1, 1
    checks = check_onnx(write_onnx(path, nodes, halves))
    assert [(c.is_24, c.unproven, c.axis) for c in checks] == [(False, False, -1)] * 2
    assert checks[0].reason.startswith("as it is multiplied, 3 non-zeros in group [4:8, 0] (6 of")
    assert bad_groups(multiplied_matrix(path, 12)) == 6


def test_a_slice_of_joined_tensors_takes_what_it_needs_of_each(tmp_path: Path) -> None:
    nodes = [
        node("Concat", ["a", "b", "c"], "j", axis=1),
        node("Slice", ["j", "begin", "end", "axes", "steps"], "s"),
        node("Transpose", ["s"], "t"),
        node("Gemm", ["x", "t"], "y", transB=1),
    ]
    weights = {
        "a": array_24((8, 5), 0), "b": array_24((8, 5), 0), "c": array_24((8, 5), 0),
        "begin": ints(6), "end": ints(15), "axes": ints(1), "steps": ints(3),
    }  # fmt: skip
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    checks = check_onnx(path)
    assert [(c.tensor, c.part, c.is_24) for c in checks] == [
        ("b", "16 elements", True), ("c", "[:, 2:3]", True),
    ]  # fmt: skip
    assert multiplied_matrix(path, 8).shape == (8, 3)


def test_slices_and_squeezes_of_old_operator_sets_are_followed(tmp_path: Path) -> None:
    nodes = [
        node("Slice", ["w"], "s", starts=[0], ends=[8], axes=[1]),
        node("Unsqueeze", ["s"], "u", axes=[0]),
        node("Squeeze", ["u"], "q", axes=[0]),
        node("MatMul", ["x", "q"], "y"),
    ]
    check = row(tmp_path / "m.onnx", nodes, {"w": array_24((16, 12), 0)})
    assert (check.part, check.is_24, check.axis) == ("[:, 0:8]", True, 0)


def test_group_that_runs_over_two_stored_axes_is_named_by_its_first_element(
    tmp_path: Path,
) -> None:
    nodes = [node("Reshape", ["w", "shape"], "r"), node("MatMul", ["x", "r"], "y")]
    weights = {"w": np.ones((2, 6, 3), np.float32), "shape": ints(0, -1, 3)}
    weights["shape"] = ints(12, 3)
    weights["w"][0, :4] = 0
    check = row(tmp_path / "m.onnx", nodes, weights)
    assert (check.first_violation, check.axis) == ((0, 4, 0), 1)
    assert check.reason.startswith("4 non-zeros in group from [0, 4, 0] on (6 of 9 groups are")


def test_expanded_batches_are_counted_once_and_repeated_inputs_as_they_are(tmp_path: Path) -> None:
    nodes = [node("Expand", ["w", "shape"], "e"), node("MatMul", ["x", "e"], "y")]
    weights = {"w": array_24((1, 8, 4), 1), "shape": ints(3, 8, 4)}
    check = row(tmp_path / "m.onnx", nodes, weights)
    assert (check.is_24, check.axis, check.density) == (True, 1, 0.5)
    weights = {"w": np.ones((1, 4), np.float32), "shape": ints(8, 4)}
    check = row(tmp_path / "m.onnx", nodes, weights)
    assert check.reason.startswith("as it is multiplied, 4 non-zeros in group [0:4, 0] (8 of 8")
    assert row(tmp_path / "m.onnx", nodes, {**weights, "w": np.zeros((1, 4), np.float32)}).is_24


@pytest.mark.parametrize(
    ("op", "extra", "attributes"),
    [
        ("Tokenize", [], {"domain": "local"}),
        ("Resize", [np.ones(0, np.float32), np.ones(2, np.float32)], {}),
        ("Reshape", [ints(0, 0, 0, 8)], {}),
        ("Slice", [ints(0), ints(4), ints(5)], {}),
        ("Concat", [np.ones((4, 8), np.float32)], {"axis": 7}),
        ("Concat", [np.ones((4, 4), np.float32)], {"axis": 0}),
        ("Concat", [np.ones(8, np.float32)], {"axis": 0}),
        ("Reshape", [np.ones(64, np.int64)], {}),
        ("Reshape", [ints(9, 9)], {}),
        ("Transpose", [], {"perm": [0, 0]}),
        ("Split", [], {"axis": 5}),
        ("Squeeze", [ints(0)], {}),
        # Nodes that lack an input are rows too, and no faults of the check.
        ("Gather", [], {}),
        ("Expand", [], {}),
        ("Slice", [], {}),
        ("Reshape", [], {}),
        ("Unsqueeze", [], {}),
        ("Mul", [], {}),
    ],
)
def test_weight_that_cannot_be_computed_is_a_row_with_the_reason(
    tmp_path: Path, op: str, extra: list[Array], attributes: dict[str, Any]
) -> None:
    names = [f"e{i}" for i in range(len(extra))]
    nodes = [node(op, ["w", *names], "c", **attributes), node("MatMul", ["x", "c"], "y")]
    weights = {"w": array_24((8, 8), 0), **dict(zip(names, extra, strict=True))}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    check = next(c for c in checks if (c.tensor, c.op_type) == ("w", "MatMul"))
    assert (check.is_24, check.unproven, check.axis, check.eligible) == (False, True, -1, False)
    assert check.reason.startswith(f"{op} computes the weight from it in a way that the check")
    assert check.remedy.startswith("fold the constants of the graph first")


def test_index_outside_of_the_tensor_is_not_proven(tmp_path: Path) -> None:
    nodes = [node("Gather", ["w", "i"], "c"), node("MatMul", ["x", "c"], "y")]
    check = row(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0), "i": np.array(99)})
    assert (check.tensor, check.unproven) == ("w", True)
    assert "node 'node_c' (Gather) cannot be computed" in check.reason


def test_node_of_another_domain_is_not_taken_for_the_one_it_is_named_like(tmp_path: Path) -> None:
    nodes = [node("Flatten", ["w"], "f", domain="local"), node("MatMul", ["x", "f"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
    assert [(check.op_type, check.is_24) for check in check_onnx(path)] == [
        ("Flatten", False), ("MatMul", False),
    ]  # fmt: skip


def test_reshape_that_mixes_axes_is_proven_as_it_is_multiplied(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["w"], "t"),
        node("Reshape", ["t", "shape"], "r"),
        node("MatMul", ["x", "r"], "y"),
    ]
    multiplied = array_24((12, 4), 0)
    stored = np.ascontiguousarray(multiplied.reshape(6, 8).T)
    path = tmp_path / "m.onnx"
    check = row(path, nodes, {"w": stored, "shape": ints(12, 4)})
    assert (check.is_24, check.axis, check.density) == (True, -1, 0.5)
    assert (multiplied_matrix(path, 12) == multiplied).all()
    check = row(path, nodes, {"w": array_24((8, 6), 0), "shape": ints(12, 4)})
    bad = bad_groups(multiplied_matrix(path, 12))
    assert check.reason.endswith(f"({bad} of 12 groups are not 2:4)")
    assert check.first_violation is None


def test_joined_tensor_that_is_computed_or_reshaped_has_a_row_for_what_it_is_made_of(
    tmp_path: Path,
) -> None:
    nodes = [
        node("Neg", ["a"], "n"),
        node("Concat", ["n", "a"], "j", axis=0),
        node("MatMul", ["x", "j"], "z"),
        node("Concat", ["a", "a"], "k", axis=0),
        node("Reshape", ["k", "shape"], "r"),
        node("MatMul", ["z", "r"], "y"),
    ]
    weights = {"a": array_24((8, 8), 0), "shape": ints(16, 8)}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [(c.tensor, c.node, c.is_24) for c in checks] == [
        ("a", "node_z", True), ("a", "node_z", True), ("a", "node_y", True),
    ]  # fmt: skip


def test_what_depends_on_an_input_or_on_chance_is_no_weight(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], "shape"),
        node("Expand", ["one", "shape"], "e"),
        node("MatMul", ["x", "e"], "a"),
        node("RandomNormal", [], "n", shape=[8, 8]),
        node("MatMul", ["a", "n"], "b"),
        node("MatMul", ["b", "w"], "y"),
    ]
    weights = {"w": array_24((8, 8), 0), "one": np.ones((1, 1), np.float32)}
    check = row(tmp_path / "m.onnx", nodes, weights)
    assert (check.node, check.is_24) == ("node_y", True)


def test_quantised_parts_keep_their_own_zero_points(tmp_path: Path) -> None:
    nodes = [
        node("DequantizeLinear", ["a", "scale", "seven"], "da"),
        node("DequantizeLinear", ["b", "scale"], "db"),
        node("Concat", ["da", "db"], "j", axis=1),
        node("MatMul", ["x", "j"], "y"),
    ]
    weights: dict[str, Array] = {
        "a": np.where(array_24((8, 4), 0) != 0, 9, 7).astype(np.uint8),
        "b": (array_24((8, 4), 0) != 0).astype(np.uint8),
        "scale": np.array(0.5, np.float32),
        "seven": np.array(7, np.uint8),
    }
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [check.is_24 for check in checks] == [True, True]
    assert not bad_groups(multiplied_matrix(tmp_path / "m.onnx", 8))


def test_one_tensor_under_two_zero_points_has_two_rows(tmp_path: Path) -> None:
    nodes = [
        node("DequantizeLinear", ["w", "scale"], "a"),
        node("MatMul", ["x", "a"], "b"),
        node("DequantizeLinear", ["w", "scale", "seven"], "c"),
        node("MatMul", ["b", "c"], "y"),
    ]
    weights: dict[str, Array] = {
        "w": (array_24((8, 8), 0) != 0).astype(np.uint8),
        "scale": np.array(0.5, np.float32),
        "seven": np.array(7, np.uint8),
    }
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [check.is_24 for check in checks] == [True, False]


def test_external_bounds_of_a_slice_are_read(tmp_path: Path) -> None:
    nodes = [node("Slice", ["w", "b", "e", "a"], "s"), node("MatMul", ["x", "s"], "y")]
    weights = {"w": array_24((16, 12), 0), "b": ints(4), "e": ints(12), "a": ints(0)}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights, external=True)
    (check,) = check_onnx(path)
    assert (check.part, check.is_24) == ("[4:12, :]", True)


def test_cast_to_a_type_of_its_own_output_is_what_is_multiplied(tmp_path: Path) -> None:
    weight = array_24((16, 8), 0)
    for to, eligible in ((TensorProto.FLOAT16, True), (TensorProto.FLOAT, False)):
        nodes = [node("Cast", ["w"], "c", to=to), node("MatMul", ["x", "c"], "y")]
        check = row(tmp_path / "m.onnx", nodes, {"w": weight})
        assert (check.dtype, check.is_24, check.eligible) == ("float32", True, eligible)
