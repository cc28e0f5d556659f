"""Files of which two readers take different weights, and files that break the standard."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_models import Array, array_24, node, write_matmul, write_onnx
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check import evaluation, folding, inlining
from prox24_deploy.graph.check.check import check_onnx, check_path

DENSE = np.ones((8, 8), np.float32)
FLOAT = TensorProto.FLOAT


def edited(path: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def sound(tmp_path: Path) -> Path:
    return write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0))


def test_two_initializers_of_one_name_are_refused(tmp_path: Path) -> None:
    """ONNX Runtime multiplies by the first, onnx_ir keeps the last."""
    path = edited(
        sound(tmp_path),
        lambda m: m.graph.initializer.insert(0, numpy_helper.from_array(DENSE, "w")),
    )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.count_nonzero(session.run(None, {"x": np.eye(8, dtype=np.float32)})[0]) == 64
    with pytest.raises(UsageError, match=r"m\.onnx has the initializer 'w' twice, of which runt"):
        check_path(path)


def inner_model(path: Path, names: str, outer: str) -> Path:
    """An If whose branches hold tensors of the given names, beside one of the graph."""
    branches: dict[str, Any] = {}
    for branch, name in zip(("then_branch", "else_branch"), names, strict=True):
        out = f"{branch}_out"
        branches[branch] = helper.make_graph(
            [node("MatMul", ["x", name], out)],
            branch,
            [],
            [helper.make_tensor_value_info(out, FLOAT, None)],
            [numpy_helper.from_array(array_24((8, 8), 0), name)],
        )
    made = helper.make_node("If", ["c"], ["y"], **branches)
    weights: dict[str, Array] = {outer: DENSE, "c": np.ones((), dtype=bool)}
    return write_onnx(path, [made], weights)


def test_a_tensor_of_a_subgraph_that_hides_another_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime multiplies by the one outside."""
    path = inner_model(tmp_path / "m.onnx", "ab", "a")
    with pytest.raises(UsageError, match=r"gives the name 'a' to a value of subgraph 'then_bra"):
        check_path(path)
    assert len(check_onnx(inner_model(path, "aa", "z"))) == 2


def test_an_input_of_a_loop_may_hide_a_name_as_runtimes_agree_on_it(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("MatMul", ["x", "w"], "next"), helper.make_node("Identity", ["go"], ["more"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    made = helper.make_node("Loop", ["count", "", "start"], ["y"], body=body)
    weights = {"w": DENSE, "start": array_24((8, 8), 0), "count": np.array(1)}
    path = write_onnx(tmp_path / "m.onnx", [made], weights)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.count_nonzero(session.run(None, {"x": np.eye(8, dtype=np.float32)})[0]) == 32
    assert [(check.tensor, check.is_24) for check in check_onnx(path)] == [("start", True)]


def twice_stored(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].float_data.extend([0.0] * 64)


def twice_external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for location in ("a.data", "b.data"):
        tensor.external_data.add(key="location", value=location)


def twice_declared(model: onnx.ModelProto) -> None:
    for text in ("[]", '["layer.dense"]'):
        model.metadata_props.add(key="prox24.sparse_weights", value=text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (twice_stored, "Tensor 'w' of .* is stored in float_data and raw_data; expected its val"),
        (twice_external, "external data key of tensor 'w' 'location' twice"),
        (twice_declared, "has the metadata key 'prox24.sparse_weights' twice"),
        (
            lambda m: m.graph.node[0].attribute.extend(
                helper.make_attribute("a", i) for i in range(2)
            ),
            r"has the attribute of node 'node_y' \(MatMul\) 'a' twice",
        ),
        (
            lambda m: m.graph.node.append(node("Relu", ["x"], "w")),
            "has the value 'w' twice",
        ),
        (
            lambda m: m.opset_import.append(helper.make_opsetid("", 5)),
            "has the operator set 'ai.onnx' twice",
        ),
        (
            lambda m: m.graph.initializer[0].dims.__setitem__(0, -1),
            r"Tensor 'w' of .* has the shape \(-1, 8\); expected at most 64 lengths, none below 0",
        ),
        (
            lambda m: m.graph.initializer[0].dims.extend([1] * 100),
            "Tensor 'w' of .* has the shape .* expected at most 64 lengths",
        ),
        (lambda m: m.graph.input.add(name="x"), "has the value 'x' twice"),
    ],
)  # fmt: skip
def test_what_is_given_twice_or_cannot_be_stored_is_refused(
    tmp_path: Path, edit: Callable[[onnx.ModelProto], object], message: str
) -> None:
    path = edited(sound(tmp_path), edit)
    with pytest.raises(UsageError, match=message):
        check_path(path)


@pytest.mark.parametrize(
    ("op", "attribute", "value", "expected"),
    [
        ("Transpose", "perm", 1, "has type INT; expected INTS"),
        ("Transpose", "perm", [0.5], "has type FLOATS; expected INTS"),
        ("Gather", "axis", "0", "has type STRING; expected INT"),
        ("Concat", "axis", [0], "has type INTS; expected INT"),
        ("Cast", "to", 99, "is 99, which is no type of ONNX"),
        ("Gemm", "transB", 1.5, "has type FLOAT; expected INT"),
        ("Conv", "group", "two", "has type STRING; expected INT"),
        ("Einsum", "equation", 3, "has type INT; expected STRING"),
        ("If", "then_branch", 3, "has type INT; expected GRAPH"),
        ("Split", "num_outputs", 2.5, "has type FLOAT; expected INT"),
    ],
)
def test_attribute_of_a_wrong_type_is_named(
    tmp_path: Path, op: str, attribute: str, value: Any, expected: str
) -> None:
    nodes = [node(op, ["w", "w"], "c", **{attribute: value}), node("MatMul", ["x", "c"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
    message = rf"Attribute '{attribute}' of node 'node_c' \({op}\) {expected}"
    with pytest.raises(UsageError, match=message):
        check_path(path)


def test_control_flow_without_its_graph_is_refused(tmp_path: Path) -> None:
    nodes = [node("Loop", ["n", "", "w"], "c"), node("MatMul", ["x", "c"], "y")]
    weights = {"w": DENSE, "n": np.array(1)}
    with pytest.raises(UsageError, match=r"'node_c' \(Loop\) has no attribute 'body', which the"):
        check_path(write_onnx(tmp_path / "m.onnx", nodes, weights))


@pytest.mark.parametrize("location", ["\0", "a" * 5000, "x/" * 3000, "nul\0.data"])
def test_external_data_under_no_name_of_a_file_is_refused(tmp_path: Path, location: str) -> None:
    def move(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    path = edited(sound(tmp_path), move)
    with pytest.raises(
        UsageError, match=r"Tensor 'w' of .* points to external data .*no name of a"
    ):
        check_path(path)


@pytest.mark.parametrize(("offset", "length"), [("-4", "256"), ("0", "8"), ("0", "-1"), ("x", "")])
def test_external_data_of_another_size_than_the_tensor_is_refused(
    tmp_path: Path, offset: str, length: str
) -> None:
    def change(model: onnx.ModelProto) -> None:
        entries = model.graph.initializer[0].external_data
        kept = [entry.value for entry in entries if entry.key == "location"]
        del entries[:]
        for key, text in (("location", kept[0]), ("offset", offset), ("length", length)):
            entries.add(key=key, value=text)

    path = write_matmul(tmp_path / "m.onnx", array_24((8, 8), 0), external=True)
    with pytest.raises(
        UsageError, match=r"takes 8 bytes from byte 0 on, and its|is not an ONNX mo"
    ):
        check_path(edited(path, change))


@pytest.mark.parametrize(
    "scopes", ["[{[]: 1}]", "[" * 5000, "{[1]}", "['a',", "[1, 2]", "('a', 'b')", "'x'" * 70000]
)
def test_name_scopes_that_are_none_tell_no_module(tmp_path: Path, scopes: str) -> None:
    made = node("MatMul", ["x", "w"], "y")
    made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    path = write_onnx(tmp_path / "m.onnx", [made], {"w": array_24((8, 8), 0)})
    assert [check.module for check in check_onnx(path)] == [""]


def test_text_is_no_weight_no_shape_and_no_zero_point(tmp_path: Path) -> None:
    text = onnx.TensorProto(name="t", data_type=TensorProto.STRING, dims=[8, 8])
    text.string_data.extend([b"x"] * 64)
    for nodes in (
        [node("Reshape", ["w", "t"], "c"), node("MatMul", ["x", "c"], "y")],
        [node("DequantizeLinear", ["w", "w", "t"], "c"), node("MatMul", ["x", "c"], "y")],
        [node("MatMul", ["x", "t"], "c"), node("MatMul", ["c", "w"], "y")],
    ):
        path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
        edited(path, lambda m: m.graph.initializer.append(text))
        assert {check.tensor for check in check_onnx(path)} == {"w"}


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    for name in ("m.onnx", "m.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match=r"is not a regular file; pass an? "):
            check_path(tmp_path / name)


def doubling(op: str, depth: int) -> list[onnx.NodeProto]:
    names = ["w", *(f"c{i}" for i in range(depth))]
    attributes: dict[str, Any] = {"axis": 1} if op == "Concat" else {}
    nodes = [node(op, [a, a], b, **attributes) for a, b in itertools.pairwise(names)]
    return [*nodes, node("MatMul", ["x", names[-1]], "y")]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("op", ["Concat", "Add", "Mul"])
@pytest.mark.parametrize("depth", [6, 28, 300])
def test_doubling_at_every_node_ends(tmp_path: Path, op: str, depth: int) -> None:
    weights = {"w": array_24((8, 4), 0)}
    check = check_onnx(write_onnx(tmp_path / "m.onnx", doubling(op, depth), weights))[0]
    assert check.is_24 != check.unproven
    assert check.is_24 == (op != "Concat" or depth == 6)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("op", ["Identity", "Transpose", "Abs", "Foo", "Mul"])
@pytest.mark.parametrize("length", [600, 2500])
def test_deep_chains_end(tmp_path: Path, op: str, length: int) -> None:
    names = ["w", *(f"c{i}" for i in range(length))]
    more = ["x"] if op == "Mul" else []
    nodes = [node(op, [a, *more], b) for a, b in itertools.pairwise(names)]
    nodes.append(node("MatMul", ["x", names[-1]], "y"))
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)}))
    # The input that is multiplied by has no known rank.
    proven = op in ("Identity", "Transpose", "Abs")
    assert [check.is_24 for check in checks][-1:] == [proven]


@pytest.mark.parametrize(("name", "limit"), [("_MOST_WORK", 3), ("MOST_PARTS", 1)])
def test_what_is_taken_apart_too_often_is_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    nodes = [
        helper.make_node("Split", ["w"], ["a", "b"], axis=1, num_outputs=2),
        node("Concat", ["b", "a"], "c", axis=1),
        node("MatMul", ["x", "c"], "y"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
    assert all(check.is_24 for check in check_onnx(path))
    monkeypatch.setattr(folding, name, limit)
    assert [(c.tensor, c.unproven) for c in check_onnx(path)] == [("w", True)]


def test_more_pieces_under_products_than_a_sound_file_has_are_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.Budget, "of", lambda _: evaluation.Budget(10**6, pieces=1))
    nodes = [node("Concat", ["w", "v"], "c", axis=1), node("MatMul", ["x", "c"], "y")]
    weights = {"w": array_24((8, 8), 0), "v": array_24((8, 8), 0)}
    checks = check_onnx(write_onnx(tmp_path / "m.onnx", nodes, weights))
    assert [(c.tensor, c.unproven) for c in checks] == [("w", True), ("v", True)]


def test_a_product_with_what_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", [node("MatMul", ["x", "gone"], "y")], {"w": DENSE})
    with pytest.raises(UsageError, match=r"'node_y' \(MatMul\) multiplies by 'gone', which"):
        check_onnx(path)


def calling(depth: int) -> list[onnx.FunctionProto]:
    """Functions each of which calls the one before twice."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    first = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    made = [helper.make_function("local", "f0", ["a", "b"], ["c"], first, opsets)]
    for i in range(1, depth):
        calls = [
            helper.make_node(f"f{i - 1}", [start, "b"], [end], domain="local")
            for start, end in (("a", "t"), ("t", "c"))
        ]
        made.append(helper.make_function("local", f"f{i}", ["a", "b"], ["c"], calls, opsets))
    return made


@pytest.mark.timeout(20)
@pytest.mark.parametrize("depth", [3, 26])
def test_functions_that_call_each_other_are_inlined_within_bounds(
    tmp_path: Path, depth: int
) -> None:
    call = helper.make_node(f"f{depth - 1}", ["x", "w"], ["y"], domain="local")
    path = write_onnx(
        tmp_path / "m.onnx", [call], {"w": array_24((8, 8), 0)}, functions=calling(depth)
    )
    (check,) = check_onnx(path)
    assert (check.tensor, check.is_24, check.unproven) == ("w", depth == 3, depth != 3)
    if check.unproven:
        assert check.reason == "f25 is a local function that is too large to inline"
        assert check.remedy == "inline the functions of the model first"


def calls_of(count: int, names: Sequence[str]) -> ir.Model:
    """A chain of calls of two functions in turn, each with nodes and values of these names."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    places = ["a", *(f"{name}{i}" for i, name in enumerate(names[1:])), "c"]
    body = [
        helper.make_node("Relu", [start], [end], name=name)
        for name, start, end in zip(names, places, places[1:], strict=False)
    ]
    functions = [helper.make_function("local", f, ["a"], ["c"], body, opsets) for f in "fg"]
    nodes = [
        helper.make_node("fg"[i % 2], [f"x{i}"], [f"x{i + 1}"], domain="local", name=f"n{i}")
        for i in range(count)
    ]
    first, last = (helper.make_tensor_value_info(f"x{i}", FLOAT, [1]) for i in (0, count))
    graph = helper.make_graph(nodes, "g", [first], [last])
    proto = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    ("count", "names", "inlined"),
    [
        (100, "r", True),
        # As many nodes, once with names of their own and once with one name.
        (100, [f"r{i}" for i in range(20)], True),
        (100, ["r"] * 20, False),
        (2_000, "r", False),
    ],
)
def test_functions_are_inlined_while_names_of_their_own_are_found_soon(
    count: int, names: Sequence[str], *, inlined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inlining, "MOST_LOOKS", 1_000_000)
    model = calls_of(count, names)
    assert inlining.inline_functions(model) is inlined
    assert len(model.graph) == (count * len(names) if inlined else count)


def test_functions_that_nothing_calls_are_left_out(tmp_path: Path) -> None:
    """The pass would put 2 ** 25 calls into them."""
    path = write_onnx(
        tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], {"w": array_24((8, 8), 0)},
        functions=calling(26),
    )  # fmt: skip
    (check,) = check_onnx(path)
    assert check.is_24


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "attributes", "told"),
    [
        ("Split", 1, 4, {"num_outputs": 2}, "num_outputs 2, expected 4"),
        ("Split", 1, 1, {"num_outputs": 2**31}, "num_outputs 2147483648, expected 1"),
        ("Split", 1, 2, {"axis": 2**62}, "axis 4611686018427387904 and batch_dims 0, expected"),
        ("LayerNormalization", 3, 3, {"axis": 2**31}, "axis 2147483648 and batch_dims 0"),
        ("GatherND", 2, 1, {"batch_dims": -1}, "axis 0 and batch_dims -1, expected at most 64"),
    ],
)
def test_what_crashes_the_inference_of_shapes_is_refused_before(
    kind: str, inputs: int, outputs: int, attributes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    odd = helper.make_node(
        kind, ["x"] * inputs, [f"o{i}" for i in range(outputs)], name="odd", **attributes
    )
    nodes = [odd, node("MatMul", ["x", "w"], "y")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"w": array_24((8, 8), 0)})
    with pytest.raises(UsageError, match=rf"^Node 'odd' \({kind}\) of .* has {told}.*; export"):
        check_onnx(path)


@pytest.mark.parametrize("place", ["node", "graph", "model"])
def test_notes_that_are_no_text_are_refused(place: str, tmp_path: Path) -> None:
    def note(model: onnx.ModelProto) -> None:
        whole: Any = {"node": model.graph.node[0], "graph": model.graph, "model": model}[place]
        whole.metadata_props.add(key="pkg.torch.onnx.class_hierarchy", value="layer.#")

    path = edited(sound(tmp_path), note)
    path.write_bytes(path.read_bytes().replace(b"layer.#", b"layer.\xff"))
    with pytest.raises(UsageError, match=r"b'layer\.\\xff' of .* is no UTF-8 text; export the fil"):
        check_onnx(path)


def test_constants_inside_of_a_function_that_is_not_inlined_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inlining, "MOST_NODES", 1)
    held = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(DENSE)),
        helper.make_node("MatMul", ["a", "w"], ["c"]),
    ]
    function = helper.make_function("local", "f", ["a"], ["c"], held, [helper.make_opsetid("", 20)])
    call = helper.make_node("f", ["x"], ["y"], domain="local")
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", [call], {}, functions=[function]))
    assert (check.tensor, check.is_24, check.unproven) == ("w", False, True)
    assert check.reason == "it lies in the local function f, which is too large to inline"


def test_functions_that_call_themselves_are_not_inlined(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("local", 1)]
    ring = [
        helper.make_function(
            "local", a, ["a", "b"], ["c"],
            [helper.make_node(b, ["a", "b"], ["c"], domain="local")], opsets,
        )
        for a, b in (("f", "g"), ("g", "f"))
    ]  # fmt: skip
    call = helper.make_node("f", ["x", "w"], ["y"], domain="local")
    (check,) = check_onnx(write_onnx(tmp_path / "m.onnx", [call], {"w": DENSE}, functions=ring))
    assert check.unproven


def test_an_attribute_of_an_operator_of_ones_own_may_mean_anything(tmp_path: Path) -> None:
    path = edited(sound(tmp_path), custom_node)
    assert check_onnx(path)


def custom_node(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    made = helper.make_node("Foo", ["x"], ["z"], domain="my.ops", axis=1000)
    model.graph.node.append(made)
