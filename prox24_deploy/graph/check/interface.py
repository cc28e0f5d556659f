"""What a server has to know of an ONNX file: its inputs, its outputs and the files beside it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir

from prox24_deploy.config.recipe import GraphTensor
from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.export.signature import axes_of


def read_interface(path: Path) -> tuple[tuple[GraphTensor, ...], tuple[GraphTensor, ...]]:
    """Inputs and outputs of an ONNX file, with the exact types and the names of their axes.

    Raises:
        UsageError: the file cannot be read.
    """
    graph = load_onnx(path).graph
    return _tensors(graph.inputs), _tensors(graph.outputs)


def external_files(path: Path) -> tuple[str, ...]:
    """Names, relative to its folder, of the files in which an ONNX file keeps tensors; sorted.

    Raises:
        UsageError: the file cannot be read.
    """
    graph = load_onnx(path).graph
    found = {
        tensor.location
        for part in (graph, *graph.subgraphs())
        for tensor in _stored(part)
        if isinstance(tensor, ir.ExternalTensor)
    }
    return tuple(sorted(map(str, found)))


def _stored(graph: ir.Graph | ir.Function) -> Iterator[object]:
    if isinstance(graph, ir.Graph):
        yield from (value.const_value for value in graph.initializers.values())
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.value


def _tensors(values: Iterable[ir.Value]) -> tuple[GraphTensor, ...]:
    return tuple(
        GraphTensor(
            name=value.name or "",
            dtype=value.dtype.name if value.dtype else "UNDEFINED",
            axes=tuple(axes_of(value)),
        )
        for value in values
    )
