"""Weights that are chosen at run time: proven slice by slice, or listed and not proven."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_models import Array, array_24, ints, node, write_onnx
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check import folding
from prox24_deploy.graph.check.check import check_onnx

TORN = "which of its elements are summed together is chosen at run time"
Inputs = dict[str, tuple[int, list[int | str] | None]]
INDEX: Inputs = {"i": (TensorProto.INT64, [])}
INDICES: Inputs = {"i": (TensorProto.INT64, ["n"])}
FLAG: Inputs = {"c": (TensorProto.BOOL, [])}


def dense(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None)


def rows(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Array],
    inputs: Inputs | None = None,
) -> list[TensorCheck]:
    """Check a graph that has further inputs."""
    model = onnx.load(write_onnx(path, nodes, weights))
    for name, (kind, shape) in (inputs or {}).items():
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    path.write_bytes(model.SerializeToString())
    return list(check_onnx(path))


def verdicts(checks: Sequence[TensorCheck]) -> dict[str, bool | None]:
    """By tensor: proven 2:4, proven not to be, or None where neither is."""
    return {check.tensor: None if check.unproven else check.is_24 for check in checks}


def branch(name: str, source: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    made = nodes or (helper.make_node("Identity", [source], [name]),)
    return helper.make_graph(made, name, [], [value(name)])


def choice(output: str, first: onnx.GraphProto, second: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["c"], [output], then_branch=first, else_branch=second)


@pytest.mark.parametrize("spoiled", [False, True])
def test_an_if_chooses_between_two_weights_and_both_are_read(
    tmp_path: Path, *, spoiled: bool
) -> None:
    nodes = [choice("w", branch("t", "a"), branch("e", "b")), node("MatMul", ["x", "w"], "y")]
    weights = {"a": array_24((8, 8), 0), "b": dense(8, 8) if spoiled else array_24((8, 8), 0)}
    found = verdicts(rows(tmp_path / "m.onnx", nodes, weights, FLAG))
    assert found == {"a": True, "b": not spoiled}


def test_nested_ifs_are_followed_to_every_weight(tmp_path: Path) -> None:
    inner = choice("e", branch("t2", "b"), branch("e2", "d"))
    nodes = [
        choice("w", branch("t", "a"), branch("e", "", inner)),
        node("Transpose", ["w"], "v"),
        node("Gemm", ["x", "v"], "y", transB=1),
    ]
    weights = {"a": array_24((8, 8), 0), "b": array_24((8, 8), 0), "d": dense(8, 8)}
    found = rows(tmp_path / "m.onnx", nodes, weights, FLAG)
    assert verdicts(found) == {"a": True, "b": True, "d": False}
    assert {check.axis for check in found} == {0}


def test_weights_of_different_shapes_are_listed_and_not_proven(tmp_path: Path) -> None:
    nodes = [choice("w", branch("t", "a"), branch("e", "b")), node("MatMul", ["x", "w"], "y")]
    weights = {"a": array_24((8, 8), 0), "b": array_24((8, 12), 0)}
    found = rows(tmp_path / "m.onnx", nodes, weights, FLAG)
    assert verdicts(found) == {"a": None, "b": None}
    assert found[0].reason == "constants of different shapes are chosen from at run time"


def test_a_branch_that_returns_what_is_made_outside_is_refused(tmp_path: Path) -> None:
    outer = helper.make_graph([], "t", [], [value("a")])
    nodes = [choice("w", outer, branch("e", "b")), node("MatMul", ["x", "w"], "y")]
    weights = {"a": dense(8, 8), "b": array_24((8, 8), 0)}
    with pytest.raises(UsageError, match=r"Subgraph 't' of .* returns 'a', which is made outside"):
        rows(tmp_path / "m.onnx", nodes, weights, FLAG)


@pytest.mark.parametrize("inputs", [INDEX, INDICES])
@pytest.mark.parametrize("spoiled", [False, True])
def test_experts_that_are_gathered_are_proven_slice_by_slice(
    tmp_path: Path, inputs: Inputs, *, spoiled: bool
) -> None:
    stack = array_24((4, 8, 12), 1)
    if spoiled:
        stack[2, 4:, 5] = 1
    nodes = [
        node("Gather", ["w", "i"], "g"),
        node("Cast", ["g"], "h", to=TensorProto.FLOAT16),
        node("MatMul", ["x", "h"], "y"),
    ]
    (check,) = rows(tmp_path / "m.onnx", nodes, {"w": stack}, inputs)
    assert (check.tensor, check.axis, check.shape, check.is_24) == ("w", 1, (4, 8, 12), not spoiled)
    # Float16 could make more of it zero, and what is chosen at run time is not computed.
    assert check.unproven == spoiled


def test_experts_are_followed_through_transposes_and_reshapes(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["w", "i"], "g"),
        node("Transpose", ["g"], "t", perm=[0, 2, 1]),
        node("Reshape", ["t", "shape"], "r"),
        node("MatMul", ["x", "r"], "y"),
    ]
    weights = {"w": array_24((4, 12, 8), 2), "shape": ints(-1, 1, 8, 12)}
    (check,) = rows(tmp_path / "m.onnx", nodes, weights, INDICES)
    assert (check.axis, check.is_24) == (2, True)


def test_inputs_that_are_gathered_one_by_one_are_not_proven(tmp_path: Path) -> None:
    nodes = [node("Gather", ["w", "i"], "g", axis=1), node("MatMul", ["x", "g"], "y")]
    (check,) = rows(tmp_path / "m.onnx", nodes, {"w": array_24((4, 8, 12), 1)}, INDICES)
    assert (check.unproven, check.reason) == (True, TORN)
    assert check.remedy.startswith("export the graph so that the product reads the constant itself")


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        ([node("GatherND", ["w", "i"], "g")], {"i": (TensorProto.INT64, ["n", 1])}),
        ([node("Slice", ["w", "i", "j", "zero"], "g")], INDICES | {"j": (TensorProto.INT64, [1])}),
        ([helper.make_node("Split", ["w", "i"], ["g", "rest"], axis=0)], INDICES),
        ([node("Compress", ["w", "c"], "g", axis=0)], {"c": (TensorProto.BOOL, [4])}),
        ([node("Expand", ["w", "i"], "g")], {"i": (TensorProto.INT64, [4])}),
    ],
)
def test_other_choices_of_whole_matrices_are_proven(
    tmp_path: Path, nodes: list[onnx.NodeProto], inputs: Inputs
) -> None:
    nodes = [*nodes, node("MatMul", ["x", "g"], "y")]
    weights = {"w": array_24((4, 8, 12), 1), "zero": ints(0)}
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, inputs)) == {"w": True}
    assert verdicts(
        rows(tmp_path / "m.onnx", nodes, {**weights, "w": dense(4, 8, 12)}, inputs)
    ) == {"w": False}


@pytest.mark.parametrize(
    ("made", "inputs"),
    [
        (node("GatherElements", ["w", "i"], "g"), {"i": (TensorProto.INT64, [4, 8, 12])}),
        (node("GatherND", ["w", "i"], "g"), {"i": (TensorProto.INT64, None)}),
        (node("ScatterND", ["w", "i", "x"], "g"), INDICES),
        (node("Tile", ["w", "i"], "g"), INDICES),
        (node("Reshape", ["w", "i"], "g"), INDICES),
        (node("Expand", ["w", "i"], "g"), INDICES),
        (node("Gather", ["w", "i"], "g"), {"i": (TensorProto.INT64, None)}),
        (node("Mul", ["w", "i"], "g"), {"i": (TensorProto.FLOAT, None)}),
        (node("Where", ["c", "w", "zero"], "g"), {"c": (TensorProto.BOOL, None)}),
        (node("Pad", ["w", "i"], "g"), INDICES),
        (node("Add", ["w", "i"], "g"), INDICES),
        (node("Where", ["c", "w", "x"], "g"), FLAG),
    ],
)
def test_what_is_not_followed_is_listed_and_not_proven(
    tmp_path: Path, made: onnx.NodeProto, inputs: Inputs
) -> None:
    nodes = [made, node("MatMul", ["x", "g"], "y")]
    weights = {"w": array_24((4, 8, 12), 1), "zero": np.zeros(1, np.float32)}
    found = rows(tmp_path / "m.onnx", nodes, weights, inputs)
    check = next(check for check in found if check.tensor == "w")
    assert (check.tensor, check.unproven, check.is_24) == ("w", True, False)
    assert check.reason.startswith(f"{made.op_type} ")


@pytest.mark.parametrize("first", [False, True])
def test_where_with_zeros_is_a_mask_and_with_another_weight_a_choice(
    tmp_path: Path, *, first: bool
) -> None:
    pair = ["zeros", "w"] if first else ["w", "zeros"]
    mask: Inputs = {"c": (TensorProto.BOOL, [8, 8])}
    nodes = [node("Where", ["c", *pair], "g"), node("MatMul", ["x", "g"], "y")]
    weights = {"w": array_24((8, 8), 0), "zeros": np.array(0.0, np.float32)}
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, mask)) == {"w": True}
    # Under a mask that is not known, a dense weight may still become 2:4.
    found = verdicts(rows(tmp_path / "m.onnx", nodes, {**weights, "w": dense(8, 8)}, mask))
    assert found == {"w": None}
    weights["zeros"] = dense(8, 8)
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, FLAG)) == {"w": True, "zeros": False}
    assert set(verdicts(rows(tmp_path / "m.onnx", nodes, weights, mask)).values()) == {None}


def loop(body: onnx.GraphProto, start: str) -> onnx.NodeProto:
    return helper.make_node("Loop", ["count", "", start], ["y"], body=body)


def loop_body(nodes: Sequence[onnx.NodeProto], state: str, returned: str) -> onnx.GraphProto:
    made = [helper.make_node("Identity", ["go"], ["more"]), *nodes]
    inputs = [value("step", TensorProto.INT64), value("go", TensorProto.BOOL), value(state)]
    return helper.make_graph(
        made, "body", inputs, [value("more", TensorProto.BOOL), value(returned)]
    )


def test_experts_that_a_loop_takes_one_after_the_other_are_read(tmp_path: Path) -> None:
    inner = [node("Gather", ["w", "step"], "g"), node("MatMul", ["s", "g"], "next")]
    weights = {"w": array_24((3, 8, 8), 1), "count": np.array(3)}
    made = loop(loop_body(inner, "s", "next"), "x")
    assert verdicts(rows(tmp_path / "m.onnx", [made], weights)) == {"w": True}
    weights["w"] = dense(3, 8, 8)
    assert verdicts(rows(tmp_path / "m.onnx", [made], weights)) == {"w": False}


def test_a_weight_that_a_loop_hands_on_is_read(tmp_path: Path) -> None:
    inner = [
        node("MatMul", ["x", "s"], "product"),
        helper.make_node("Identity", ["other"], ["next"]),
    ]
    made = loop(loop_body(inner, "s", "next"), "w")
    weights = {"w": array_24((8, 8), 0), "other": dense(8, 8), "count": np.array(3)}
    assert verdicts(rows(tmp_path / "m.onnx", [made], weights)) == {"w": True, "other": False}
    # What comes out of the loop may be either, too.
    outside = [loop(loop_body(inner[1:], "s", "next"), "w"), node("MatMul", ["x", "y"], "z")]
    assert verdicts(rows(tmp_path / "m.onnx", outside, weights)) == {"w": True, "other": False}


def test_a_weight_that_a_loop_changes_is_not_proven(tmp_path: Path) -> None:
    inner = [node("MatMul", ["x", "s"], "product"), node("Transpose", ["s"], "next")]
    made = loop(loop_body(inner, "s", "next"), "w")
    weights = {"w": array_24((8, 8), 0), "count": np.array(3)}
    (check,) = rows(tmp_path / "m.onnx", [made], weights)
    assert (check.unproven, check.reason) == (True, "a loop computes it anew at every step")


def test_a_ring_of_nodes_that_no_loop_makes_is_refused(tmp_path: Path) -> None:
    nodes = [
        node("Add", ["b", "w"], "a"),
        node("Add", ["a", "w"], "b"),
        node("MatMul", ["x", "b"], "y"),
    ]
    with pytest.raises(UsageError, match=r"nodes of the model form a ring through '[ab]'; expect"):
        rows(tmp_path / "m.onnx", nodes, {"w": dense(8, 8)})


@pytest.mark.parametrize("axis", [0, 2])
def test_slices_that_a_scan_passes_to_its_body_are_proven(tmp_path: Path, axis: int) -> None:
    body = helper.make_graph(
        [node("MatMul", ["state", "layer"], "next")],
        "body",
        [value("state"), value("layer")],
        [value("next")],
    )
    made = node("Scan", ["x", "w"], "y", body=body, num_scan_inputs=1, scan_input_axes=[axis])
    stack = np.ascontiguousarray(np.moveaxis(array_24((3, 8, 8), 1), 0, axis))
    (check,) = rows(tmp_path / "m.onnx", [made], {"w": stack})
    assert (check.tensor, check.is_24, check.axis) == ("w", True, 1 if axis == 0 else 0)


def test_a_stack_that_a_scan_returns_is_read(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["each"])], "body", [value("row")], [value("each")]
    )
    nodes = [
        node("Scan", ["x"], "s", body=body, num_scan_inputs=1),
        node("Gather", ["s", "i"], "g"),
        node("MatMul", ["x", "g"], "y"),
    ]
    assert verdicts(rows(tmp_path / "m.onnx", nodes, {"w": dense(8, 8)}, INDEX)) == {"w": False}
    weights = {"w": array_24((8, 8), 0)}
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDEX)) == {"w": True}


def test_what_a_loop_stacks_is_read(tmp_path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["more"]),
            helper.make_node("Identity", ["w"], ["each"]),
        ],
        "body",
        [value("step", TensorProto.INT64), value("go", TensorProto.BOOL)],
        [value("more", TensorProto.BOOL), value("each")],
    )
    nodes = [
        helper.make_node("Loop", ["count", ""], ["s"], body=body),
        node("Gather", ["s", "i"], "g"),
        node("MatMul", ["x", "g"], "y"),
    ]
    weights = {"w": dense(8, 8), "count": np.array(3)}
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDEX)) == {"w": False}


@pytest.mark.parametrize("op", ["Scan", "SequenceMap"])
def test_a_graph_that_gets_its_inputs_in_another_way_is_not_followed(
    tmp_path: Path, op: str
) -> None:
    body = helper.make_graph(
        [node("MatMul", ["x", "layer"], "each")], "body", [value("layer")], [value("each")]
    )
    made = node(op, ["w"], "s", body=body, num_scan_inputs=1)
    nodes = [made, node("MatMul", ["x", "s"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((3, 8, 8), 1)}, opset=8)
    checks = check_onnx(path)
    assert [(c.tensor, c.unproven) for c in checks] == [("w", True)]
    assert checks[0].reason.startswith(
        "a graph inside of the graph gets it in a way that the check"
    )


def test_loops_that_carry_more_than_is_followed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = [node("MatMul", ["x", "s"], "product"), node("Transpose", ["s"], "next")]
    made = loop(loop_body(inner, "s", "next"), "w")
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": dense(8, 8), "count": np.array(3)})
    monkeypatch.setattr(folding, "_MOST_WORK", 1)
    with pytest.raises(UsageError, match="loops of the model carry more values than"):
        check_onnx(path)


@pytest.mark.parametrize("right", [False, True])
def test_rows_that_are_gathered_from_blocks_are_an_embedding_on_the_left_alone(
    tmp_path: Path, *, right: bool
) -> None:
    gathered = node("GatherBlockQuantized", ["q", "i", "s"], "g", domain="com.microsoft")
    nodes = [gathered, node("MatMul", ["x", "g"] if right else ["g", "w"], "y")]
    weights: dict[str, Array] = {
        "q": np.ones((8, 16), np.uint8),
        "s": np.ones((8, 1), np.float32),
        "w": array_24((16, 8), 0),
    }  # fmt: skip
    found = verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDICES))
    assert found == ({"q": None} if right else {"w": True})


def test_axes_that_a_transpose_parted_are_computed_as_one_sum(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["w"], "t", perm=[1, 0, 2]),
        node("Einsum", ["x", "t"], "y", equation="bhd,hdo->bo"),
    ]
    whole = array_24((8, 5), 0)
    stored = np.ascontiguousarray(whole.reshape(2, 4, 5).transpose(1, 0, 2))
    (check,) = rows(tmp_path / "m.onnx", nodes, {"w": stored})
    assert (check.is_24, check.axis) == (True, -1)
    stored[:, 0, 0] = 1
    (check,) = rows(tmp_path / "m.onnx", nodes, {"w": stored})
    assert check.reason.startswith("as it is multiplied, 4 non-zeros in group")


def test_one_of_a_sequence_is_read(tmp_path: Path) -> None:
    nodes = [
        node("SequenceConstruct", ["a", "b"], "s"),
        node("SequenceAt", ["s", "i"], "w"),
        node("MatMul", ["x", "w"], "y"),
    ]
    weights = {"a": array_24((8, 8), 0), "b": dense(8, 8)}
    found = verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDEX))
    assert found == {"a": True, "b": False}


def test_a_sequence_that_is_changed_is_listed_and_not_proven(tmp_path: Path) -> None:
    nodes = [
        node("SequenceConstruct", ["a"], "s"),
        node("SequenceInsert", ["s", "b"], "t"),
        node("SequenceAt", ["t", "i"], "w"),
        node("MatMul", ["x", "w"], "y"),
    ]
    weights = {"a": array_24((8, 8), 0), "b": dense(8, 8)}
    found = verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDEX))
    assert found == {"a": None, "b": None}


@pytest.mark.parametrize("spoiled", [False, True])
def test_rows_chosen_by_a_matrix_of_ones_are_experts(tmp_path: Path, *, spoiled: bool) -> None:
    nodes = [
        node("OneHot", ["i", "depth", "values"], "h"),
        node("Cast", ["h"], "o", to=TensorProto.FLOAT),
        node("Reshape", ["w", "rows"], "r"),
        node("MatMul", ["o", "r"], "p"),
        node("Reshape", ["p", "shape"], "q"),
        node("MatMul", ["x", "q"], "y"),
    ]
    weights: dict[str, Array] = {
        "w": dense(3, 8, 12) if spoiled else array_24((3, 8, 12), 1),
        "depth": np.array(3),
        "values": np.array([0, 1], np.float32),
        "rows": ints(3, 96),
        "shape": ints(-1, 8, 12),
    }
    (check,) = rows(tmp_path / "m.onnx", nodes, weights, INDICES)
    assert (check.node, check.axis, check.is_24) == ("node_y", 1, not spoiled)
    # Where the other rows do not fall away, it is a product like any other.
    weights["values"] = np.array([1, 2], np.float32)
    found = rows(tmp_path / "m.onnx", nodes, weights, INDICES)
    assert [check.node for check in found] == ["node_p"]


def test_a_weight_times_what_is_known_at_run_time_keeps_its_zeros(tmp_path: Path) -> None:
    scale: Inputs = {"s": (TensorProto.FLOAT, [1, 8])}
    for made in (node("Mul", ["s", "w"], "g"), node("Div", ["w", "s"], "g")):
        nodes = [made, node("MatMul", ["x", "g"], "y")]
        assert verdicts(rows(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)}, scale)) == {
            "w": True
        }
        (check,) = rows(tmp_path / "m.onnx", nodes, {"w": dense(8, 8)}, scale)
        assert check.unproven
        assert check.reason.startswith("it is multiplied by values known at run time alone")


@pytest.mark.parametrize("rank", [2, 3])
def test_a_vector_that_grows_into_a_matrix_is_not_taken_for_one_sum(
    tmp_path: Path, rank: int
) -> None:
    """Each column holds one element eight times, so that no group is 2:4 however the vector is."""
    factor: Inputs = {"i": (TensorProto.INT64, []), "s": (TensorProto.FLOAT, [8] * rank)}
    nodes = [
        node("Gather", ["w", "i"], "v"),
        node("Mul", ["v", "s"], "g"),
        node("MatMul", ["x", "g"], "y"),
    ]
    (check,) = rows(tmp_path / "m.onnx", nodes, {"w": array_24((4, 8), 1)}, factor)
    assert (check.unproven, check.reason) == (True, TORN)


def test_a_claim_about_a_shape_proves_nothing(tmp_path: Path) -> None:
    """Nodes behind the choice count axes from the front, of which the file tells a wrong number."""
    nodes = [
        node("Reshape", ["i", "any"], "j"),
        node("Gather", ["w", "j"], "g"),
        node("Transpose", ["g"], "t"),
        node("MatMul", ["x", "t"], "y"),
    ]
    weights = {"w": array_24((4, 8, 8), 2), "any": ints(1, -1)}
    path = write_onnx(tmp_path / "m.onnx", nodes, weights)
    model = onnx.load(path)
    for name in "ij":
        made = helper.make_tensor_value_info(name, TensorProto.INT64, [] if name == "j" else None)
        (model.graph.input if name == "i" else model.graph.value_info).append(made)
    path.write_bytes(model.SerializeToString())
    (check,) = check_onnx(path)
    assert (check.is_24, check.unproven) == (False, True)


def test_a_scale_that_a_layer_computes_is_told_from_an_activation(tmp_path: Path) -> None:
    """StyleGAN scales its weights by a layer's output; rotary tables scale a layer's output."""
    nodes = [
        node("MatMul", ["x", "v"], "h"),
        node("Mul", ["w", "h"], "g"),
        node("MatMul", ["x", "g"], "y"),
    ]
    weights = {"v": array_24((8, 1), 0), "w": dense(8, 8)}
    model = onnx.load(write_onnx(tmp_path / "m.onnx", nodes, weights))
    shapes: list[tuple[list[int | str | None], bool]] = [([1, 8], True), (["batch", 8], False)]
    for shape, listed in shapes:
        del model.graph.value_info[:]
        model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, shape))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        assert ("w" in verdicts(check_onnx(tmp_path / "m.onnx"))) == listed


def test_shapes_that_a_file_does_not_tell_are_inferred(tmp_path: Path) -> None:
    """As in files of torch's TorchScript exporter, which tell no shapes."""
    nodes = [
        node("MatMul", ["x", "v"], "q"),
        node("Mul", ["q", "table"], "r"),
        node("Transpose", ["q"], "k", perm=[1, 0]),
        node("MatMul", ["r", "k"], "y"),
    ]
    weights = {"v": array_24((8, 8), 0), "table": np.full((6, 8), 0.5, np.float32)}
    model = onnx.load(write_onnx(tmp_path / "m.onnx", nodes, weights))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 8]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert verdicts(check_onnx(tmp_path / "m.onnx")) == {"v": True}


def test_embeddings_and_positions_are_no_weights_of_the_layer_behind_them(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["table", "i"], "e"),
        node("Slice", ["positions", "i", "i"], "p"),
        node("Add", ["e", "p"], "h"),
        node("Mul", ["h", "gamma"], "n"),
        node("MatMul", ["n", "w"], "y"),
    ]
    weights = {
        "table": dense(16, 8),
        "positions": dense(16, 8),
        "gamma": np.full(8, 2, np.float32),
        "w": array_24((8, 8), 0),
    }
    assert verdicts(rows(tmp_path / "m.onnx", nodes, weights, INDICES)) == {"w": True}


def test_the_default_of_an_input_is_no_proof_that_it_is_24(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], {"w": array_24((8, 8), 0)}
    )
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]))
    path.write_bytes(model.SerializeToString())
    (check,) = check_onnx(path)
    assert (check.unproven, check.is_24) == (True, False)
    assert check.reason.startswith("it is the default of an input of the graph, which a caller can")
    assert check.remedy == "remove its name from the inputs of the graph"
    # Before version 4 of the format every tensor had to be named as an input.
    model.ir_version = 3
    path.write_bytes(model.SerializeToString())
    assert check_onnx(path)[0].is_24
    model.ir_version = 8
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(dense(8, 8), "w"))
    path.write_bytes(model.SerializeToString())
    (check,) = check_onnx(path)
    assert (check.unproven, check.is_24) == (False, False)
