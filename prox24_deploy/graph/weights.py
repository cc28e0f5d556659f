"""Find the constant weights of an ONNX graph and the axis along which each is reduced."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from prox24_deploy.errors import UsageError
from prox24_deploy.graph.groups import Array

MODULE_KEY = "prox24.module"
SPARSE_KEY = "prox24.sparse_weights"
SCOPES_KEY = "pkg.torch.onnx.name_scopes"

_ONNX_DOMAINS = ("", "ai.onnx")
_VALUE_PRESERVING = ("Cast", "Identity")


@dataclass(slots=True)
class ConstantWeight:
    """One constant tensor that MatMul, Gemm or Conv nodes reduce along `axis`.

    `axis` counts in the stored tensor and is -1 where its rank does not fit the nodes.
    `zero_point` is the input of the DequantizeLinear that the stored integers pass, if any.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    axis: int
    zero_point: ir.Value | None
    nodes: list[ir.Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Source:
    value: ir.Value
    tensor: ir.TensorProtocol
    perms: tuple[tuple[int, ...] | None, ...]
    zero_point: ir.Value | None


def load_model(path: Path) -> ir.Model:
    """Load the graph of an ONNX file; weights stay in the file until they are read.

    Local functions are inlined, so that a weight passed to one is seen at its consumer.

    Raises:
        UsageError: the file cannot be read or is not an ONNX model.
    """
    try:
        model = ir.load(path, format="protobuf")
        if model.functions:
            InlinePass()(model)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); pass an ONNX file.") from error
    except Exception as error:  # protobuf and the deserialiser raise types of many kinds
        raise UsageError(_not_onnx(path)) from error
    if not len(model.graph):
        raise UsageError(_not_onnx(path))
    return model


def find_weights(model: ir.Model) -> list[ConstantWeight]:
    """List every constant weight of MatMul, Gemm and Conv nodes, subgraphs included.

    The weight is followed back through Transpose, Cast, Identity, QuantizeLinear and
    DequantizeLinear. A tensor with several consumers along one axis is listed once. A MatMul or
    Gemm over a single element, as rotary position tables use it, sums nothing and has no weight.
    """
    found: dict[tuple[ir.Value, int], ConstantWeight] = {}
    for node in model.graph.all_nodes():
        for index in _weight_inputs(node):
            source = _trace(node.inputs[index])
            if source is None or not len(source.tensor.shape):
                continue
            axis = _stored_axis(node, index, source)
            if _is_outer_product(node, axis, source.tensor):
                continue
            weight = found.setdefault(
                (source.value, axis),
                ConstantWeight(source.value, source.tensor, axis, source.zero_point),
            )
            weight.nodes.append(node)
    return list(found.values())


def module_of(node: ir.Node) -> str:
    """Module path of a node: our own metadata, else the exporter's name scopes, else ""."""
    if MODULE_KEY in node.metadata_props:
        return node.metadata_props[MODULE_KEY]
    return scoped_module(node.metadata_props)


def scoped_module(metadata: Mapping[str, str]) -> str:
    """Innermost module path in the `pkg.torch.onnx.name_scopes` that torch's exporter writes.

    The value is the text of a list that runs from the root "" to the innermost module and ends in
    the name of the operator instance, which is dropped.
    """
    try:
        scopes = ast.literal_eval(metadata.get(SCOPES_KEY, "[]"))
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return ""
    if len(scopes) > 1 and scopes[-2] and scopes[-1].startswith(f"{scopes[-2]}."):
        return str(scopes[-1])
    return str(scopes[-2]) if len(scopes) > 1 else ""


def declared_modules(model: ir.Model, path: Path) -> frozenset[str] | None:
    """Module paths that the file itself declares as 2:4, or None if it declares nothing.

    Raises:
        UsageError: the declaration is not a JSON list of strings.
    """
    text = model.metadata_props.get(SPARSE_KEY)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"Metadata {SPARSE_KEY} of {path} must be a JSON list of module paths, got "
            f"{text[:80]!r}; export the file again."
        )
    return frozenset(names)


def read_tensor(tensor: ir.TensorProtocol, name: str, path: Path) -> Array:
    """Return a constant as an array; external data is memory-mapped.

    Raises:
        UsageError: the data is missing, truncated, outside the model's folder or damaged.
    """
    if isinstance(tensor, ir.ExternalTensor):
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


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """Tensor of an initializer or of a Constant node's output, else None."""
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:  # a Constant node that breaks the standard: no constant to speak of
        return None


def _not_onnx(path: Path) -> str:
    return f"{path} is not an ONNX model, or is damaged; pass a file that onnx.load can read."


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


def _weight_inputs(node: ir.Node) -> Iterator[int]:
    if node.domain not in _ONNX_DOMAINS:
        return
    if node.op_type in ("MatMul", "Gemm"):
        yield from (0, 1)
    elif node.op_type == "Conv":
        yield 1


def _reduction_axis(node: ir.Node, index: int, rank: int) -> int:
    """Axis of input `index`, of the given rank, that the node sums over."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transA" if index == 0 else "transB", 0)
        return int(bool(transposed) == bool(index))
    if index == 0:
        return rank - 1
    return max(rank - 2, 0)


def _trace(value: ir.Value | None) -> _Source | None:
    perms: list[tuple[int, ...] | None] = []
    zero_point: ir.Value | None = None
    while value is not None:
        tensor = constant_of(value)
        if tensor is not None:
            return _Source(value, tensor, tuple(perms), zero_point)
        node = value.producer()
        if node is None or node.domain not in _ONNX_DOMAINS:
            return None
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", None)
            perms.append(None if perm is None else tuple(perm))
        elif node.op_type == "DequantizeLinear":
            zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        elif node.op_type == "QuantizeLinear":
            # The constant before it is a float again, whose zero is zero.
            zero_point = None
        elif node.op_type not in _VALUE_PRESERVING:
            return None
        value = node.inputs[0]
    return None


def _is_outer_product(node: ir.Node, axis: int, tensor: ir.TensorProtocol) -> bool:
    return node.op_type != "Conv" and axis >= 0 and tensor.shape[axis] == 1


def _stored_axis(node: ir.Node, index: int, source: _Source) -> int:
    """Reduction axis in the stored tensor, -1 where its rank does not fit the nodes."""
    rank = len(source.tensor.shape)
    axis = _reduction_axis(node, index, rank)
    for perm in source.perms:
        order = tuple(reversed(range(rank))) if perm is None else perm
        if sorted(order) != list(range(rank)) or axis >= rank:
            return -1
        axis = order[axis]
    return axis if axis < rank else -1


def zero_point_of(weight: ConstantWeight, path: Path) -> int | None:
    """The stored integer that stands for zero, or None where no single one is known."""
    if weight.zero_point is None:
        return 0
    tensor = constant_of(weight.zero_point)
    if tensor is None:
        return None
    points = np.unique(read_tensor(tensor, weight.zero_point.name or "", path).astype(np.int64))
    return int(points[0]) if len(points) == 1 else None
