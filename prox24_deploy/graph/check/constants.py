"""The constant tensors of an ONNX graph: which values are stored, and their data."""

import contextlib
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.core.errors import UsageError
from prox24_deploy.sparsity.groups import Array

ONNX_DOMAINS = ("", "ai.onnx")


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Tensor of an initializer or of a Constant node's output, else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ONNX_DOMAINS:
        return None
    attributes = list(node.attributes.values())
    # A Constant node that breaks the standard is no constant to speak of.
    if len(node.outputs) != 1 or len(attributes) != 1 or attributes[0].is_ref():
        return None
    return _attribute_tensor(attributes[0], value.name)


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input of a node by its place, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def type_of_input(node: ir.Node, index: int) -> ir.DataType | None:
    """Type of an input as it is stored, or as the file tells it."""
    value = input_of(node, index)
    tensor = constant_of(value)
    return tensor.dtype if tensor is not None else value.dtype if value is not None else None


def read_tensor(tensor: ir.TensorProtocol, name: str, path: Path | None) -> Array:
    """Return a constant as an array; external data is memory-mapped.

    `path` is that of the ONNX file, None for a model that holds its tensors in memory.

    Raises:
        UsageError: the data is missing, truncated, outside the model's folder or damaged.
    """
    try:
        if isinstance(tensor, ir.ExternalTensor) and path is not None:
            _require_external(tensor, name, path)
        return np.asarray(tensor.numpy())
    except (ValueError, TypeError, OSError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"Tensor {name!r} of {path} cannot be read ({reason}); copy or export the file again."
        ) from error


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap what `read_tensor` mapped, unless an array of it is still in use."""
    if isinstance(tensor, ir.ExternalTensor):
        # A computed array may be a view of the mapping, which is unmapped with it then.
        with contextlib.suppress(BufferError):
            tensor.release()


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Shape of a stored tensor, as integers."""
    return tuple(int(length) for length in tensor.shape.numpy())


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether more than one axis is longer than one; scales, biases and bounds are not."""
    return len([length for length in shape if length > 1]) > 1


def _attribute_tensor(attribute: ir.Attr, name: str | None) -> ir.TensorProtocol | None:
    kinds = ir.AttributeType
    match attribute.type:
        case kinds.TENSOR:
            return attribute.as_tensor()
        case kinds.FLOAT | kinds.FLOATS:
            return ir.Tensor(np.asarray(attribute.value, np.float32), name=name)
        case kinds.INT | kinds.INTS:
            return ir.Tensor(np.asarray(attribute.value, np.int64), name=name)
        case _:
            return None


def _require_external(tensor: ir.ExternalTensor, name: str, path: Path) -> None:
    try:
        folder = path.parent.resolve()
        data = (folder / tensor.location).resolve()
        size = data.stat().st_size if data.is_file() else -1
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Tensor {name!r} of {path} points to external data "
            f"{_short(str(tensor.location))!r}, which is no name of a file; save the model again."
        ) from error
    if not data.is_relative_to(folder):
        raise UsageError(
            f"Tensor {name!r} of {path} points to external data {_short(str(tensor.location))!r} "
            "outside the model's folder; save the model with its data beside it."
        )
    if size < 0:
        raise UsageError(
            f"External data {_short(str(tensor.location))!r} of {path} is missing; copy it into "
            f"{folder}."
        )
    _require_range(tensor, name, size, path)


def _require_range(tensor: ir.ExternalTensor, name: str, size: int, path: Path) -> None:
    """The bytes of a tensor lie inside its file, and are as many as its shape needs."""
    bits = math.prod(sizes_of(tensor)) * tensor.dtype.bitwidth
    needed = -(-bits // 8)
    begin, length = tensor.offset or 0, tensor.length
    if begin < 0 or (length is not None and length != needed):
        raise UsageError(
            f"Tensor {name!r} of {path} takes {length} bytes from byte {begin} on, and its shape "
            f"needs {needed}; save the model again."
        )
    if size < begin + needed:
        raise UsageError(
            f"External data {_short(str(tensor.location))!r} of {path} is truncated: tensor "
            f"{name!r} needs {begin + needed} bytes, the file has {size}; copy it again."
        )


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
