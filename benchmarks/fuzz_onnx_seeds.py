"""Small ONNX files: each way in which a weight reaches its product, and chains that grow."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 20
Seed = tuple[onnx.ModelProto, dict[str, bytes]]


def onnx_seeds() -> dict[str, Seed]:
    """Name to a model and the files beside it."""
    plain = {make.__name__.strip("_"): make() for make in _PLAIN}
    chains = {
        f"{make.__name__.strip('_')}-{depth}": make(depth) for make in _CHAINS for depth in _DEPTHS
    }
    return {name: (model, {}) for name, model in {**plain, **chains}.items()} | {
        "external": _external(),
    }


def _weight(name: str, *shape: int, dtype: Any = np.float32) -> onnx.TensorProto:
    values = np.random.default_rng(0).integers(1, 9, shape).astype(dtype)
    return numpy_helper.from_array(
        np.where(np.arange(shape[-1]) % 4 < 2, values, 0).astype(dtype), name
    )


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _model(
    nodes: Sequence[onnx.NodeProto],
    stored: Sequence[onnx.TensorProto],
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    shape: Sequence[int] = (2, 8),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(stored),
    )
    imports = [
        helper.make_opsetid(name, 1 if name else _OPSET) for name in ("", "own", "com.microsoft")
    ]
    model = helper.make_model(
        graph, opset_imports=imports, functions=list(functions), ir_version=10
    )
    helper.set_model_props(model, {"prox24.sparse_weights": '["layer.a"]'})
    for node in model.graph.node:
        for key, value in (
            ("prox24.module", "layer.a"),
            ("pkg.torch.onnx.name_scopes", "['', 'layer', 'layer.a', 'linear']"),
        ):
            entry = node.metadata_props.add()
            entry.key, entry.value = key, value
    return model


def _products() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Gemm", ["a", "g", "b"], ["c"], transB=1, alpha=1.0),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    return _model(nodes, [_weight("w", 8, 4), _weight("g", 4, 4), _weight("b", 4)])


def _convolution() -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], group=1)
    return _model([node], [_weight("w", 4, 4, 3, 3)], shape=(1, 4, 8, 8))


def _quantised() -> onnx.ModelProto:
    stored = [_weight("q", 8, 4, dtype=np.int8), _weight("s", 4), _weight("z", 4, dtype=np.int8)]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return _model(nodes, stored)


def _folded() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Reshape", ["t", "shape"], ["r"]),
        helper.make_node("Slice", ["r", "start", "end", "axes"], ["p"]),
        helper.make_node("Cast", ["p"], ["k"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["k", "k"], ["j"], axis=1),
        helper.make_node("Split", ["j"], ["l", "m"], axis=1, num_outputs=2),
        helper.make_node("Unsqueeze", ["m", "axes"], ["u"]),
        helper.make_node("Squeeze", ["u", "axes"], ["v"]),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    stored = [_weight("w", 4, 8), _ints("shape", 8, 4), _ints("start", 0), _ints("end", 8)]
    return _model(nodes, [*stored, _ints("axes", 0)])


def _experts() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
        helper.make_node("Gather", ["w", "i"], ["e"], axis=0),
        helper.make_node("MatMul", ["x", "e"], ["y"]),
    ]
    return _model(nodes, [_weight("w", 2, 8, 4)])


def _einsum() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Einsum", ["x", "w"], ["a"], equation="bk,knm->bnm"),
        helper.make_node("Mul", ["w", "m"], ["s"]),
        helper.make_node("Einsum", ["x", "s"], ["y"], equation="...k,knm->...nm"),
    ]
    return _model(nodes, [_weight("w", 8, 2, 4), _weight("m", 8, 2, 4)])


def _branches() -> onnx.ModelProto:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", name], [f"{name}_y"])
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out], [_weight(name, 8, 4)])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("t"), else_branch=branch("e")),
    ]
    return _model(nodes, [])


def _loop() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("h", "g")]
    counts = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    going = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("on", "off")]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "w"], ["g"]),
            helper.make_node("Identity", ["on"], ["off"]),
        ],
        "body", [*counts, going[0], values[0]], [going[1], values[1]],
    )  # fmt: skip
    node = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
    return _model([node], [_weight("w", 8, 8), _ints("times", 3)])


def _recurrent() -> onnx.ModelProto:
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)
    return _model([node], [_weight("w", 1, 16, 8), _weight("r", 1, 16, 4)], shape=(3, 2, 8))


def _packed() -> onnx.ModelProto:
    given: dict[str, Any] = {"K": 8, "N": 4, "bits": 4, "block_size": 16}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **given)
    return _model([node], [_weight("q", 4, 1, 8, dtype=np.uint8), _weight("s", 4)])


def _constants() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=_weight("", 8, 4)),
        helper.make_node("Constant", [], ["v"], value_floats=[1.0, 0.0, 0.0, 2.0]),
        helper.make_node("ConstantOfShape", ["shape"], ["o"], value=_weight("", 1)),
        helper.make_node("Where", ["flag", "w", "o"], ["m"]),
        helper.make_node("MatMul", ["x", "m"], ["y"]),
    ]
    flag = numpy_helper.from_array(np.ones((8, 4), bool), "flag")
    return _model(nodes, [_ints("shape", 8, 4), flag])


def _sparse() -> onnx.ModelProto:
    model = _model([helper.make_node("MatMul", ["x", "w"], ["y"])], [])
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, _ints("indices", 0, 5), [8, 4])
    )
    return model


def _external() -> Seed:
    model = _products()
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.data"), ("offset", "0"), ("length", str(len(data)))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model, {"weights.data": data}


def _concatenations(depth: int) -> onnx.ModelProto:
    """A constant that is joined with itself, again and again."""
    nodes = [
        helper.make_node("Concat", [f"w{i}", f"w{i}"], [f"w{i + 1}"], axis=1) for i in range(depth)
    ]
    nodes.append(helper.make_node("MatMul", ["x", f"w{depth}"], ["y"]))
    return _model(nodes, [_weight("w0", 8, 4)])


def _identities(depth: int) -> onnx.ModelProto:
    """A constant that is passed on, again and again."""
    nodes = [helper.make_node("Identity", [f"w{i}"], [f"w{i + 1}"]) for i in range(depth)]
    nodes.append(helper.make_node("MatMul", ["x", f"w{depth}"], ["y"]))
    return _model(nodes, [_weight("w0", 8, 4)])


def _calls(depth: int) -> onnx.ModelProto:
    """Functions of which each calls the next one twice."""
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function(
            "own", f"f{i}", ["a"], ["c"],
            [
                helper.make_node(f"f{i + 1}" if i + 1 < depth else "Relu", ["a"], ["b"],
                                 domain="own" if i + 1 < depth else ""),
                helper.make_node(f"f{i + 1}" if i + 1 < depth else "Relu", ["b"], ["c"],
                                 domain="own" if i + 1 < depth else ""),
            ],
            imports,
        )
        for i in range(depth)
    ]  # fmt: skip
    nodes = [
        helper.make_node("f0", ["x"], ["h"], domain="own"),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    return _model(nodes, [_weight("w", 8, 4)], functions=functions)


_DEPTHS = (3, 12, 28, 600)
_PLAIN: tuple[Callable[[], onnx.ModelProto], ...] = (
    _products, _convolution, _quantised, _folded, _experts, _einsum, _branches, _loop, _recurrent,
    _packed, _constants, _sparse,
)  # fmt: skip
_CHAINS: tuple[Callable[[int], onnx.ModelProto], ...] = (_concatenations, _identities, _calls)
