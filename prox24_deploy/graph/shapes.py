"""Shapes of the values of a graph, inferred by ONNX where the file does not tell them.

They help to tell an activation from a scale. No proof rests on them, since a file may tell wrong
ones.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import helper

# Small tensors may be shapes, which the inference of others needs.
_SMALL_BYTES = 1000

Lengths = tuple[int | None, ...]


class Shapes:
    """Shapes of one model; `path` is its file, None if it is in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._inferred: dict[str, Lengths | None] | None = None

    def of(self, value: ir.Value | None) -> Lengths | None:
        """Lengths of a value, each None where it is not fixed; None if not even their number is."""
        if value is None:
            return None
        if value.shape is not None:
            return tuple(n if isinstance(n, int) else None for n in value.shape)
        if self._inferred is None:
            self._inferred = {} if self._path is None else _inferred(self._path)
        return self._inferred.get(value.name or "")


def _inferred(path: Path) -> dict[str, Lengths | None]:
    """Shapes by name; None for a name that has several, as in the branches of an If."""
    model = onnx.load(path, format="protobuf", load_external_data=False)
    _drop_weights(model.graph)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # a node that breaks the standard makes ONNX raise types of many kinds
        return {}
    found: dict[str, Lengths | None] = {}
    for value in _values(model.graph):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
            found[value.name] = shape if found.get(value.name, shape) == shape else None
    return found


def _drop_weights(graph: onnx.GraphProto) -> None:
    """Turn large tensors into inputs of the same shape: the inference copies the whole model."""
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if tensor.ByteSize() > _SMALL_BYTES or tensor.data_location == tensor.EXTERNAL:
            graph.input.append(_value(tensor.name, tensor))
            del graph.initializer[index]
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Constant" or node.ByteSize() <= _SMALL_BYTES:
            continue
        if node.attribute and node.attribute[0].HasField("t"):
            graph.input.append(_value(node.output[0], node.attribute[0].t))
            del graph.node[index]


def _value(name: str, tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    pending = [graph]
    while pending:
        graph = pending.pop()
        yield from graph.value_info
        yield from graph.input
        yield from graph.output
        for node in graph.node:
            for attribute in node.attribute:
                pending.extend([attribute.g] if attribute.HasField("g") else [])
