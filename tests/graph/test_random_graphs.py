"""Random graphs between stored tensors and a product, against ONNX Runtime.

Each graph has one to three weights, all 2:4 but for at most one that is dense, at a random place.
They pass operators that keep zeros, one of them is chosen at run time, and a product takes it.
Behind it stands a second product with a weight that is always proven, so that no file passes for
want of rows. ONNX Runtime gives the matrix that is really multiplied.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph_models import Array, array_24, bad_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prox24_deploy.core.errors import SparsityLostError, SparsityUnprovenError
from prox24_deploy.graph.check.check import check_path, require_24

K, N = 8, 8
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Graph:
    """A graph under construction; values are (K, N) matrices unless said otherwise."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.numbers = np.random.default_rng(draw.randrange(2**32))
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, Array] = {}
        self.inputs: dict[str, int] = {}
        self.feeds: dict[str, Array] = {"x": np.eye(K, dtype=np.float32)}
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: Any) -> str:
        """A stored tensor, as an initializer or as a node."""
        name = self.name()
        if self.draw.random() < 0.3:
            value = numpy_helper.from_array(np.asarray(array))
            self.nodes.append(helper.make_node("Constant", [], [name], value=value))
        else:
            self.stored[name] = np.asarray(array)
        return name

    def given(self, array: Any, kind: int) -> str:
        """A value that is known at run time alone."""
        name = self.name()
        self.inputs[name], self.feeds[name] = kind, np.asarray(array)
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.several(1, op, *inputs, **attributes)[0]

    def several(self, outputs: int, op: str, *inputs: str, **attributes: Any) -> list[str]:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names

    def shuffled(self, *names: str) -> list[str]:
        return self.draw.sample(names, len(names))


def weight(graph: Graph, *, dense: bool) -> str:
    """A stored weight, under a mask or quantised."""
    kept = np.ones((K, N), bool) if dense else array_24((K, N), 0) != 0
    values = np.where(kept, graph.numbers.uniform(1, 2, (K, N)), 0).astype(np.float32)
    points = graph.numbers.integers(0, 9, N).astype(np.uint8)
    match graph.draw.choice(["plain", "masked", "int8", "point", "channels"]):
        case "plain":
            return graph.constant(values)
        case "masked":
            full = graph.constant(np.abs(values) + 1)
            mask = graph.constant(kept.astype(np.float32))
            return graph.add("Mul", *graph.shuffled(full, mask))
        case "int8":
            stored = np.where(kept, 5, 0).astype(np.int8)
            return graph.add(
                "DequantizeLinear", graph.constant(stored), graph.constant(np.float32(0.5))
            )
        case "point":
            points = np.full(N, 7, np.uint8)
        case _:
            pass
    stored = np.where(kept, points + 3, points).astype(np.uint8)
    scale, point = graph.constant(np.ones(N, np.float32)), graph.constant(points)
    return graph.add("DequantizeLinear", graph.constant(stored), scale, point, axis=1)


def twice(graph: Graph, value: str, op: str) -> str:
    return graph.add(op, graph.add(op, value))


def reshaped(graph: Graph, value: str) -> str:
    middle = graph.add("Reshape", value, graph.constant(np.array([2, 4, -1])))
    return graph.add("Reshape", middle, graph.constant(np.array([K, N])))


def widened(graph: Graph, value: str) -> str:
    """Join columns to it and cut them off again."""
    more = graph.constant(graph.numbers.random((K, 3)).astype(np.float32))
    wide = graph.add("Concat", value, more, axis=1)
    bounds = [graph.constant(np.array([number])) for number in (0, N, 1)]
    return graph.add("Slice", wide, *bounds)


def split(graph: Graph, value: str) -> str:
    return graph.add("Concat", *graph.several(2, "Split", value, axis=1, num_outputs=2), axis=1)


def quantised(graph: Graph, value: str) -> str:
    scale, point = graph.constant(np.float32(0.1)), graph.constant(np.int8(0))
    integers = graph.add("QuantizeLinear", value, scale, point)
    return graph.add("DequantizeLinear", integers, scale, point)


def expanded(graph: Graph, value: str) -> str:
    zero = graph.constant(np.array([0]))
    shape = graph.given([1, K, N], INT64)
    wide = graph.add("Expand", graph.add("Unsqueeze", value, zero), shape)
    return graph.add("Squeeze", wide, zero)


def scaled(graph: Graph, value: str) -> str:
    shape = graph.draw.choice([(), (1, N), (K, 1), (K, N)])
    factor = graph.given(np.full(shape, 2, np.float32), FLOAT)
    return graph.add("Mul", *graph.shuffled(value, factor))


def masked_at_run_time(graph: Graph, value: str) -> str:
    mask = graph.given(np.ones(graph.draw.choice([(), (K, N)]), bool), BOOL)
    return graph.add("Where", mask, value, graph.constant(np.float32(0)))


def bounded(graph: Graph, value: str) -> str:
    bounds = [graph.constant(np.float32(number)) for number in (-100, 100)]
    return graph.add("Clip", value, *bounds)


KEEPERS: list[Callable[[Graph, str], str]] = [
    lambda g, v: g.add("Identity", v),
    lambda g, v: twice(g, v, "Transpose"),
    lambda g, v: twice(g, v, "Neg"),
    lambda g, v: g.add("Relu", v),
    lambda g, v: g.add("Cast", g.add("Cast", v, to=TensorProto.FLOAT16), to=FLOAT),
    lambda g, v: g.add("Mul", *g.shuffled(v, g.constant(np.full((1, N), 2, np.float32)))),
    lambda g, v: g.add("Add", *g.shuffled(v, g.constant(np.float32(0)))),
    lambda g, v: g.add("Min", v, g.constant(np.float32(100))),
    lambda g, v: g.add("Pad", v, g.constant(np.zeros(4, np.int64))),
    bounded, expanded, masked_at_run_time, quantised, reshaped, scaled, split, widened,
]  # fmt: skip


def branches(graph: Graph, values: Sequence[str]) -> str:
    """A tree of Ifs with a value in each leaf."""
    if len(values) == 1:
        return graph.add("Identity", values[0])
    flag = graph.given(np.array(graph.draw.random() < 0.5), BOOL)
    made = {}
    for attribute, part in (("then_branch", values[:1]), ("else_branch", values[1:])):
        outer, graph.nodes = graph.nodes, []
        result = branches(graph, part)
        output = helper.make_tensor_value_info(result, FLOAT, None)
        made[attribute] = helper.make_graph(graph.nodes, result, [], [output])
        graph.nodes = outer
    return graph.add("If", flag, **made)


def looped(graph: Graph, values: Sequence[str]) -> str:
    """The first value at first, and the last one after a step."""
    state, result, step, go, more = (graph.name() for _ in range(5))
    nodes = [
        helper.make_node("Identity", [go], [more]),
        helper.make_node("Identity", [values[-1]], [result]),
    ]
    inputs = [
        helper.make_tensor_value_info(step, INT64, []),
        helper.make_tensor_value_info(go, BOOL, []),
        helper.make_tensor_value_info(state, FLOAT, None),
    ]
    outputs = [
        helper.make_tensor_value_info(more, BOOL, []),
        helper.make_tensor_value_info(result, FLOAT, None),
    ]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    count = graph.given(np.int64(graph.draw.randint(0, 1)), INT64)
    return graph.add("Loop", count, "", values[0], body=body)


def chosen(graph: Graph, values: Sequence[str]) -> str:
    """One of several values, by one of the ways in which exporters choose an expert."""
    index = graph.draw.randrange(len(values))
    zero = graph.constant(np.array([0]))
    stack = graph.add("Concat", *(graph.add("Unsqueeze", v, zero) for v in values), axis=0)
    ways = ["index", "indices", "nd", "slice", "elements", "one-hot", "sequence", "if"]
    match graph.draw.choice([*ways, *(["where", "loop"] if len(values) < 3 else [])]):
        case "index":
            return graph.add("Gather", stack, graph.given(np.int64(index), INT64))
        case "indices":
            rows = graph.add("Gather", stack, graph.given([index], INT64))
            return graph.add("Squeeze", rows, zero)
        case "nd":
            return graph.add("GatherND", stack, graph.given([index], INT64))
        case "slice":
            bounds = [graph.given([number], INT64) for number in (index, index + 1)]
            return graph.add("Squeeze", graph.add("Slice", stack, *bounds, zero), zero)
        case "elements":
            places = graph.given(np.full((1, K, N), index), INT64)
            return graph.add("Squeeze", graph.add("GatherElements", stack, places), zero)
        case "one-hot":
            rows = graph.add("Reshape", stack, graph.constant(np.array([len(values), K * N])))
            depth, ends = graph.constant(len(values)), graph.constant(np.array([0, 1], np.float32))
            one = graph.add("OneHot", graph.given([index], INT64), depth, ends)
            picked = graph.add("MatMul", one, rows)
            return graph.add("Reshape", picked, graph.constant(np.array([K, N])))
        case "sequence":
            sequence = graph.add("SequenceConstruct", *values)
            return graph.add("SequenceAt", sequence, graph.given(np.int64(index), INT64))
        case "where":
            return graph.add("Where", graph.given(index == 0, BOOL), values[0], values[-1])
        case "loop":
            return looped(graph, values)
        case _:
            return branches(graph, values)


def product(graph: Graph, value: str) -> str:
    """Multiply the input by a weight, and the result by one that is 2:4."""
    flip = {"perm": [1, 0]}
    match graph.draw.choice(["MatMul", "Gemm", "transposed", "left", "Conv", "Einsum"]):
        case "Gemm":
            result = graph.add("Gemm", "x", value)
        case "transposed":
            result = graph.add("Gemm", "x", graph.add("Transpose", value, **flip), transB=1)
        case "left":
            left = graph.add("MatMul", graph.add("Transpose", value, **flip), "x")
            result = graph.add("Transpose", left, **flip)
        case "Conv":
            two = graph.constant(np.array([2]))
            kernel = graph.add("Unsqueeze", graph.add("Transpose", value, **flip), two)
            result = graph.add("Conv", graph.add("Unsqueeze", "x", two), kernel)
            result = graph.add("Squeeze", result, two)
        case "Einsum":
            result = graph.add("Einsum", "x", value, equation="...k,kn->...n")
        case _:
            result = graph.add("MatMul", "x", value)
    return graph.add("MatMul", result, graph.constant(array_24((N, 8), 0)))


def multiplied(path: Path, graph: Graph, value: str, result: str) -> Array:
    """Write a graph, run it, and give the weight that it multiplied by."""
    inputs = [helper.make_tensor_value_info("x", FLOAT, [None, K])]
    for name, kind in graph.inputs.items():
        inputs.append(helper.make_tensor_value_info(name, kind, graph.feeds[name].shape))
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in (result, value)]
    stored = [numpy_helper.from_array(array, name) for name, array in graph.stored.items()]
    made = helper.make_graph(graph.nodes, "graph", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21)]
    path.write_bytes(
        helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, graph.feeds)[1])


def verdict(path: Path) -> str:
    try:
        require_24(check_path(path))
    except SparsityLostError:
        return "lost"
    except SparsityUnprovenError:
        return "not proven"
    return "2:4"


@settings(max_examples=80)
@given(draw=st.randoms(use_true_random=False), weights=st.integers(1, 3), dense=st.booleans())
def test_no_dense_weight_passes_and_no_pruned_one_is_lost(
    tmp_path_factory: pytest.TempPathFactory, draw: random.Random, weights: int, *, dense: bool
) -> None:
    graph = Graph(draw)
    spoiled = draw.randrange(weights) if dense else -1
    values = []
    for number in range(weights):
        value = weight(graph, dense=number == spoiled)
        for _ in range(draw.randint(0, 3)):
            value = draw.choice(KEEPERS)(graph, value)
        values.append(value)
    value = chosen(graph, values) if weights > 1 or draw.random() < 0.3 else values[0]
    for _ in range(draw.randint(0, 2)):
        value = draw.choice(KEEPERS)(graph, value)
    path = tmp_path_factory.mktemp("graph") / "m.onnx"
    matrix = multiplied(path, graph, value, product(graph, value))
    found = verdict(path)
    if dense:
        assert found != "2:4"
    else:
        assert not bad_groups(matrix)
        assert found != "lost"
