"""The constant tensors of an ONNX graph: which values are constant, and their stored data."""

from pathlib import Path

import onnx_ir as ir

from prox24_deploy.errors import UsageError
from prox24_deploy.graph.groups import Array

ONNX_DOMAINS = ("", "ai.onnx")
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Tensor of an initializer or of a Constant node's output, else None."""
    if value is None:
        return None
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # a Constant node that breaks the standard: no constant to speak of
        return None


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input of a node by its place, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_values(model: ir.Model) -> frozenset[ir.Value]:
    """Every value that no input of the model can change: stored, or computed from such alone.

    A node that holds a subgraph counts as changing, and so does one with neither inputs nor a
    stored tensor, as those that draw random numbers. A quantised constant stays one whatever its
    scale is.
    """
    found: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        sources = node.inputs[:1] if node.op_type in QUANTISERS else node.inputs
        inputs = [value for value in sources if value is not None]
        found.update(value for value in inputs if constant_of(value) is not None)
        if inputs and found.issuperset(inputs) and not _holds_graph(node):
            found.update(node.outputs)
    return frozenset(found)


def read_tensor(tensor: ir.TensorProtocol, name: str, path: Path | None) -> Array:
    """Return a constant as an array; external data is memory-mapped.

    `path` is that of the ONNX file, None for a model that holds its tensors in memory.

    Raises:
        UsageError: the data is missing, truncated, outside the model's folder or damaged.
    """
    if isinstance(tensor, ir.ExternalTensor) and path is not None:
        _require_external(tensor, name, path)
    try:
        return tensor.numpy()
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"Tensor {name!r} of {path} cannot be read ({reason}); copy or export the file again."
        ) from error


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap what `read_tensor` mapped; no array of it may be in use any more."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Shape of a stored tensor, as integers."""
    return tuple(tensor.shape.numpy())


def _holds_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _require_external(tensor: ir.ExternalTensor, name: str, path: Path) -> None:
    folder = path.parent.resolve()
    data = (folder / tensor.location).resolve()
    if not data.is_relative_to(folder):
        raise UsageError(
            f"Tensor {name!r} of {path} points to external data {str(tensor.location)!r} outside "
            f"the model's folder; save the model with its data beside it."
        )
    if not data.is_file():
        raise UsageError(
            f"External data {str(tensor.location)!r} of {path} is missing; copy it into {folder}."
        )
    needed = (tensor.offset or 0) + tensor.nbytes
    size = data.stat().st_size
    if size < needed:
        raise UsageError(
            f"External data {str(tensor.location)!r} of {path} is truncated: tensor {name!r} needs "
            f"{needed} bytes, the file has {size}; copy it again."
        )
