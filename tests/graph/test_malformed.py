"""Graphs that break the standard in random places: one sentence, and never an unforeseen error.

`scan_onnx` turns what it does not foresee into a sentence as well; here that guard is left out, so
that a fault of the check shows.
"""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_models import Array, array_24, ints, node, write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check import onnx_rows
from prox24_deploy.graph.check.check import check_onnx, check_path

OPERATORS = [
    "MatMul",
    "Gemm",
    "Conv",
    "Transpose",
    "Reshape",
    "Slice",
    "Split",
    "Concat",
    "Gather",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Cast",
    "Clip",
    "Where",
    "Mul",
    "Add",
    "DequantizeLinear",
    "QuantizeLinear",
    "If",
    "Loop",
    "Scan",
    "Einsum",
    "Identity",
    "Flatten",
    "Pad",
    "Tile",
    "GatherND",
    "GatherElements",
    "SequenceConstruct",
    "SequenceAt",
    "OneHot",
    "Compress",
    "ConstantOfShape",
    "Range",
    "Relu",
    "LSTM",
    "ConvTranspose",
    "QLinearConv",
    "MatMulInteger",
    "Foo",
    "Constant",
    "Shape",
    "Softmax",
    "Max",
]
ATTRIBUTES = [
    "axis",
    "axes",
    "perm",
    "to",
    "transB",
    "group",
    "equation",
    "num_scan_inputs",
    "body",
    "then_branch",
    "else_branch",
    "value",
    "block_size",
    "allowzero",
    "batch_dims",
    "num_outputs",
    "split",
    "min",
    "max",
    "starts",
    "ends",
]
VALUES: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([0, 1, -1, 5, 99, 2**62, -(2**63)]),
    lambda draw: draw.random() * 1e9,
    lambda draw: draw.choice(["bk,kn->bn", "...", "a,b,c", "\0", "x" * 999, "bk,kk->b"]),
    lambda draw: [draw.choice([0, 1, -1, -2, 5, 2**40]) for _ in range(draw.randint(1, 4))],
    lambda _: [1.5, 2.5],
    lambda _: ["a", "b"],
    lambda _: numpy_helper.from_array(np.ones((2, 2), np.float32)),
    lambda _: onnx.TensorProto(),
    lambda _: helper.make_graph([], "empty", [], []),
]


def sound(path: Path) -> onnx.ModelProto:
    """Weights behind most kinds of nodes that are followed."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], "a"),
        node("Concat", ["a", "w"], "b", axis=1),
        node("Slice", ["b", "i0", "i8", "i1"], "c"),
        node("Transpose", ["c"], "d", perm=[1, 0]),
        node("Reshape", ["d", "shape"], "e"),
        node("Unsqueeze", ["e", "i0"], "f"),
        node("Gather", ["f", "x"], "g", axis=0),
        node("Mul", ["g", "m"], "h"),
        helper.make_node("If", ["x"], ["k"], then_branch=branch, else_branch=branch),
        node("Where", ["x", "k", "s"], "l"),
        node("MatMul", ["x", "l"], "n"),
        node("Einsum", ["n", "w"], "o", equation="bk,kn->bn"),
        node("Conv", ["o", "v"], "y"),
    ]
    weights: dict[str, Array] = {
        "q": np.zeros((8, 4), np.int8), "s": np.array(0.5, np.float32), "z": np.array(0, np.int8),
        "w": array_24((8, 8), 0), "v": array_24((8, 8, 1), 1), "m": np.ones((8, 1), np.float32),
        "i0": ints(0), "i1": ints(1), "i8": ints(8), "shape": ints(8, 8),
    }  # fmt: skip
    return onnx.load(write_onnx(path, nodes, weights))


def another_attribute(draw: random.Random, made: onnx.NodeProto) -> None:
    name = draw.choice(ATTRIBUTES)
    kept = [each for each in made.attribute if each.name != name]
    attribute = helper.make_attribute(name, draw.choice(VALUES)(draw))
    del made.attribute[:]
    made.attribute.extend([*kept, attribute])


def another_input(draw: random.Random, made: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    names = [name for each in graph.node for name in each.output]
    names += [tensor.name for tensor in graph.initializer]
    if made.input and draw.random() < 0.8:
        made.input[draw.randrange(len(made.input))] = draw.choice([*names, "", "x"])
    else:
        made.input.append(draw.choice(names))


def another_tensor(draw: random.Random, tensor: onnx.TensorProto) -> None:
    match draw.randrange(4):
        case 0 if tensor.dims:
            wrong = draw.choice([-1, 0, 1, 3, 2**40, 2**62])
            tensor.dims[draw.randrange(len(tensor.dims))] = wrong
        case 1:
            tensor.data_type = draw.choice([0, 1, 7, 8, 9, 10, 16, 17, 22, 23, 31, 99])
        case 2:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            place = draw.choice(["\0", "a" * 5000, "../x", "m.onnx", "", "."])
            tensor.external_data.add(key="location", value=place)
            tensor.external_data.add(key="offset", value=draw.choice(["-1", "abc", "0", "9" * 30]))
        case _:
            tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]


def mutate(draw: random.Random, model: onnx.ModelProto) -> None:
    graph = model.graph
    made = draw.choice(graph.node)
    match draw.randrange(6):
        case 0:
            made.op_type = draw.choice(OPERATORS)
        case 1:
            another_attribute(draw, made)
        case 2:
            another_input(draw, made, graph)
        case 3 if made.input:
            del made.input[draw.randrange(len(made.input))]
        case 4:
            made.domain = draw.choice(["com.microsoft", "trt", "ai.onnx", "local"])
        case _:
            another_tensor(draw, draw.choice(graph.initializer))


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return sound(tmp_path_factory.mktemp("sound") / "m.onnx")


def test_the_graph_that_is_broken_was_sound(tmp_path: Path, sound_model: onnx.ModelProto) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(sound_model.SerializeToString())
    assert [(check.tensor, check.part) for check in check_onnx(path)] == [
        ("w", " (computed from q, w)"), ("w", ""), ("v", ""),
    ]  # fmt: skip


@settings(max_examples=250)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_no_broken_graph_raises_anything_but_a_sentence(
    sound_model: onnx.ModelProto,
    tmp_path_factory: pytest.TempPathFactory,
    draw: random.Random,
    times: int,
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(sound_model)
    for _ in range(times):
        mutate(draw, model)
    path = tmp_path_factory.mktemp("broken") / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with contextlib.suppress(UsageError):
        onnx_rows._scan(path)


@pytest.mark.timeout(60)
def test_a_value_that_is_computed_from_itself_ends_the_search(
    tmp_path: Path, sound_model: onnx.ModelProto
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(sound_model)
    made = {node.op_type: node for node in model.graph.node}
    made["DequantizeLinear"].input.append("l")
    made["Reshape"].input[1] = "i8"
    made["Where"].input[:] = ["n", "k", "s"]
    made["MatMul"].input[:] = ["i8", "l"]
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError):
        check_path(path)


def test_what_the_check_does_not_foresee_is_a_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound_model: onnx.ModelProto
) -> None:
    def fail(_: Path) -> None:
        raise ZeroDivisionError("three\nlines\nlong")

    monkeypatch.setattr(onnx_rows, "_scan", fail)
    path = tmp_path / "m.onnx"
    path.write_bytes(sound_model.SerializeToString())
    with pytest.raises(UsageError, match=r"does not expect \(ZeroDivisionError: three\); exp"):
        check_onnx(path)


def test_too_little_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound_model: onnx.ModelProto
) -> None:
    def fail(_: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(onnx_rows, "_scan", fail)
    path = tmp_path / "m.onnx"
    path.write_bytes(sound_model.SerializeToString())
    with pytest.raises(MemoryError):
        check_onnx(path)
