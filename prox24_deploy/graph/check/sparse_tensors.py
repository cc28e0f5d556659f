"""Sparse tensors of an ONNX file, stored dense so that one proof serves both forms.

ONNX has them as initializers of their own kind and as values of Constant nodes, each with its
non-zeros and their places: one number in C order, or one index for each axis.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from prox24_deploy.core.errors import UsageError
from prox24_deploy.sparsity.groups import Array

# A file of a few bytes can claim any shape, and a dense tensor is there several times for a moment.
MOST_BYTES = 1 << 28


def make_dense(model: onnx.ModelProto, path: Path) -> list[str]:
    """Replace, in place, every sparse tensor of a model by a dense one of the same name.

    Returns the names.

    Raises:
        UsageError: places are missing, repeated or outside of the shape, or the dense tensors would
            have more than `MOST_BYTES` together.
    """
    names = []
    room = _Room(path)
    inner = [graph for f in model.functions for node in f.node for graph in _inner(node)]
    for graph in (each for outer in (model.graph, *inner) for each in _graphs(outer)):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, room))
            names.append(sparse.values.name)
        del graph.sparse_initializer[:]
        names += _replace_values(graph.node, room)
    for function in model.functions:
        names += _replace_values(function.node, room)
    return names


@dataclass(slots=True)
class _Room:
    """What is left of `MOST_BYTES` for the dense tensors of one file."""

    path: Path
    left: int = field(default_factory=lambda: MOST_BYTES)

    def take(self, name: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Refuse a tensor that does not fit."""
        self.left -= math.prod(shape) * itemsize
        if min(shape, default=0) < 0 or self.left < 0:
            raise UsageError(
                f"Sparse tensor {name!r} of {self.path} has the shape {shape}; the check makes "
                f"those of a file dense up to {MOST_BYTES:,} bytes; store it as a dense tensor."
            )


def _replace_values(nodes: Iterable[onnx.NodeProto], room: _Room) -> Iterator[str]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                dense = _dense(attribute.sparse_tensor, room)
                attribute.Clear()
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                attribute.t.CopyFrom(dense)
                yield node.output[0] if node.output else dense.name


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    pending = [graph]
    while pending:
        graph = pending.pop()
        yield graph
        pending.extend(inner for node in graph.node for inner in _inner(node))


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _dense(sparse: onnx.SparseTensorProto, room: _Room) -> onnx.TensorProto:
    name, shape = sparse.values.name, tuple(sparse.dims)
    try:
        values = numpy_helper.to_array(sparse.values)
        room.take(name, shape, values.itemsize)
        places = _positions(numpy_helper.to_array(sparse.indices), shape)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(_malformed(name, room.path)) from error
    if values.shape != (len(places),) or len(np.unique(places)) < len(places):
        raise UsageError(_malformed(name, room.path))
    dense = np.zeros(math.prod(shape), values.dtype)
    dense[places] = values
    return numpy_helper.from_array(dense.reshape(shape), name)


def _positions(indices: Array, shape: tuple[int, ...]) -> Array:
    """Places in C order; ValueError where one is outside of the shape."""
    if indices.ndim == 2 and indices.shape[1] == len(shape):
        return np.asarray(np.ravel_multi_index(tuple(indices.T), shape))
    inside = not indices.size or 0 <= indices.min() <= indices.max() < math.prod(shape)
    if indices.ndim != 1 or not inside:
        raise ValueError(indices.shape)
    return indices


def _malformed(name: str, path: Path) -> str:
    return (
        f"Sparse tensor {name!r} of {path} does not fit its places; expected one place inside of "
        "its shape for each value, none twice; store it as a dense tensor."
    )
