"""Shapes of the values of a graph: as the file tells them, and as ONNX infers them.

A file may tell wrong shapes, which no runtime holds it to. Those serve to tell an activation from a
scale. What a proof rests on is inferred anew, from the inputs of the graph and its tensors alone.
"""

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx import helper

# Small tensors may be shapes, which the inference of others needs.
_SMALL_BYTES = 1000

Lengths = tuple[int | None, ...]


class Shapes:
    """Shapes of one model; those that it tells are `trusted` if it was made in this process."""

    def __init__(self, model: ir.Model, *, trusted: bool) -> None:
        self._model = model
        self._inputs = frozenset(model.graph.inputs)
        self._trusted = trusted
        self._inferred: dict[str, Lengths | None] | None = None

    def told(self, value: ir.Value | None) -> Lengths | None:
        """Lengths of a value, each None where it is not fixed; None if not even their number is."""
        if value is None or value.shape is None:
            return self.sure(value)
        return tuple(n if isinstance(n, int) else None for n in value.shape)

    def sure(self, value: ir.Value | None) -> Lengths | None:
        """The same without what the file only claims."""
        if value is None:
            return None
        # Runtimes hold what they are given to the shapes of the inputs.
        if value.shape is not None and (self._trusted or value in self._inputs):
            return tuple(n if isinstance(n, int) else None for n in value.shape)
        if self._inferred is None:
            self._inferred = {} if self._trusted else _inferred(self._model)
        return self._inferred.get(value.name or "")


def _inferred(model: ir.Model) -> dict[str, Lengths | None]:
    """Shapes by name; None for a name that has several, as in the branches of an If."""
    try:
        proto = ir.to_proto(model)
        _drop_weights(proto.graph)
        _drop_claims(proto.graph)
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # a node that breaks the standard makes ONNX raise types of many kinds
        return {}
    found: dict[str, Lengths | None] = {}
    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
                found[value.name] = shape if found.get(value.name, shape) == shape else None
    return found


def _drop_claims(graph: onnx.GraphProto) -> None:
    """Forget all shapes but those of the inputs of the whole graph."""
    for number, each in enumerate(_graphs(graph)):
        del each.value_info[:]
        for value in (*each.output, *(each.input if number else ())):
            value.type.tensor_type.ClearField("shape")
    for each in _graphs(graph):
        loops = [node for node in each.node if node.op_type == "Loop"]
        # The number of the step and the condition are scalars.
        for value in (value for loop in loops for body in _held(loop) for value in body.input[:2]):
            value.type.tensor_type.shape.SetInParent()


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


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and then those inside of it."""
    pending = [graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            pending.extend(_held(node))


def _held(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))
