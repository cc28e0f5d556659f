"""Find the constant weights of an ONNX graph and the axis along which each is reduced."""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from prox24_deploy.documents import decode_json
from prox24_deploy.errors import UsageError
from prox24_deploy.graph.constants import (
    constant_of,
    constant_values,
    input_of,
    read_tensor,
    release,
    sizes_of,
)
from prox24_deploy.graph.eligibility import GemmShape
from prox24_deploy.graph.folding import Blocked, Folded, Folder, Part
from prox24_deploy.graph.groups import GROUP
from prox24_deploy.graph.operands import (
    Operand,
    Reduction,
    is_known,
    reduction_of,
    weight_operands,
)
from prox24_deploy.graph.strided import Strided

MODULE_KEY = "prox24.module"
SPARSE_KEY = "prox24.sparse_weights"
SCOPES_KEY = "pkg.torch.onnx.name_scopes"


@dataclass(slots=True)
class ConstantWeight:
    """Elements of one constant tensor that nodes sum over together.

    `view` shows the elements in the order in which they are stored and `reduction` is its axis of
    the groups; `axis` is that axis of the stored tensor, -1 where it is not known. `gemm` and
    `dtype` are those of the multiplication, None where they are not known. `zero_point` is the
    input that holds the stored integer for zero, if any. `reason` says why nothing can be proven,
    "" if it can.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    view: Strided
    reduction: int = 0
    axis: int = -1
    gemm: GemmShape | None = None
    dtype: ir.DataType | None = None
    zero_point: ir.Value | None = None
    reason: str = ""
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every element of the stored tensor belongs to the weight."""
        return self.view.size == self.tensor.size


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


def find_weights(model: ir.Model, path: Path | None = None) -> list[ConstantWeight]:
    """List every constant that a node of the model multiplies and sums over, subgraphs included.

    A weight is followed back to the tensors that are stored. Elements with several consumers along
    one axis are listed once. A product over a single element, as rotary position tables use it,
    sums nothing and has no weight. What cannot be followed or read is listed with the reason.

    Args:
        model: with inlined functions.
        path: the file of the model, None if it holds its tensors in memory.

    Raises:
        UsageError: external data that is needed to follow a weight is missing or damaged, or a
            weight is stored in a way that is not read (as a sparse initializer).
    """
    folder = Folder(constant_values(model), path)
    found: dict[tuple[object, ...], ConstantWeight] = {}
    for node in model.graph.all_nodes():
        for operand in weight_operands(node):
            value = node.inputs[operand.index]
            _require_defined(node, value, path)
            for weight in _weights_of(node, operand, folder.fold(value)):
                place = (weight.value, weight.view, weight.reduction, weight.axis)
                key = (*place, weight.zero_point, weight.reason)
                found.setdefault(key, weight).nodes.append(node)
    return list(found.values())


def module_of(node: ir.Node) -> str:
    """Module path of a node, "" where the file does not tell it.

    Sources, first that tells: our own metadata, the name scopes of torch's exporter, and names that
    are paths, as torch's TorchScript exporter and the builders that imitate it write them
    (`/encoder/layer.0/dense/MatMul`).
    """
    if MODULE_KEY in node.metadata_props:
        return node.metadata_props[MODULE_KEY]
    root, *scopes = (node.name or "").rpartition("/")[0].split("/")
    return scoped_module(node.metadata_props) or (".".join(scopes) if not root else "")


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
        names = decode_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"Metadata {SPARSE_KEY} of {path} must be a JSON list of module paths, got "
            f"{text[:80]!r}; export the file again."
        )
    return frozenset(names)


def _not_onnx(path: Path) -> str:
    return f"{path} is not an ONNX model, or is damaged; pass a file that onnx.load can read."


def _require_defined(node: ir.Node, value: ir.Value | None, path: Path | None) -> None:
    if value is None or value.producer() is not None or value.is_graph_input():
        return
    if constant_of(value) is None:
        raise UsageError(
            f"Node {node.name!r} of {path} multiplies by {value.name!r}, which the file does not "
            "hold as a dense tensor; store sparse initializers as dense ones."
        )


def _weights_of(
    node: ir.Node, operand: Operand, source: Folded | Blocked | None
) -> Iterator[ConstantWeight]:
    if source is None or (source.shape is not None and not source.shape):
        return
    rank = len(source.shape or ())
    if operand.form == "packed" and not is_known(node) and not _is_matrix(source):
        return
    found = reduction_of(node, operand, rank) if source.shape else None
    if isinstance(found, Reduction) and _is_outer_product(operand, found, source):
        return
    if source.shape and found is None:
        return
    if isinstance(source, Blocked):
        yield _unproven(source, source.reason)
    elif isinstance(found, str):
        yield from (_unproven(part, found) for part in source.parts)
    elif found is not None:
        yield from (_weight(node, operand, found, source, part) for part in source.parts)


def _weight(
    node: ir.Node, operand: Operand, found: Reduction, source: Folded, part: Part
) -> ConstantWeight:
    """One stored part of a weight, as the node sums over it."""
    view, axis, length = part.view, found.axis, source.shape[found.axis]
    if found.groups > 1:
        length //= found.groups
        if view.shape[axis] != source.shape[axis] or length * found.groups != view.shape[axis]:
            return _unproven(part, f"its {found.groups} groups do not fit the stored tensor")
        view = view.split(axis, found.groups)
        axis += 1
    edges = (part.start[axis], part.start[axis] + view.shape[axis]) if found.groups == 1 else (0,)
    outside = [edge for edge in edges if edge % GROUP]
    if outside and length % GROUP == 0:
        reason = f"other tensors are joined to it at position {outside[0]}, inside a group of four"
        return _unproven(part, reason)
    if view.strides[axis] == 0 and length > 1:
        return _unproven(part, "its elements are repeated along the axis that is summed")
    zero = part.zero_point
    if zero is None and operand.zero_point is not None and not part.is_float:
        zero = input_of(node, operand.zero_point)
    gemm = GemmShape(math.prod(source.shape[i] for i in found.outputs), length, _groups(node))
    stored, reduction = view.storage_order(axis)
    return ConstantWeight(
        part.value,
        part.tensor,
        stored,
        reduction,
        stored.stored_axis(reduction, sizes_of(part.tensor)),
        gemm,
        _multiplied_in(node, operand, source),
        zero,
    )


def _unproven(source: Part | Blocked, reason: str) -> ConstantWeight:
    whole = Strided.of(sizes_of(source.tensor))
    return ConstantWeight(source.value, source.tensor, whole, reason=reason)


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def _multiplied_in(node: ir.Node, operand: Operand, source: Folded) -> ir.DataType:
    """Type of the multiplication: that before dequantisation only if both operands pass one."""
    other = input_of(node, 0 if operand.index else 1)
    producer = other.producer() if other is not None else None
    both = producer is not None and producer.op_type == "DequantizeLinear"
    return source.quantized if source.quantized is not None and both else source.dtype


def _is_matrix(source: Folded | Blocked) -> bool:
    return len([length for length in source.shape or () if length > 1]) > 1


def _is_outer_product(operand: Operand, found: Reduction, source: Folded | Blocked) -> bool:
    lengths = source.shape or ()
    return operand.form in ("left", "right", "einsum") and lengths[found.axis] == 1


def zero_point_of(weight: ConstantWeight, path: Path) -> int | None:
    """The stored integer that stands for zero, or None where no single one is known."""
    if weight.zero_point is None:
        return 0
    tensor = constant_of(weight.zero_point)
    if tensor is None:
        return None
    points = np.unique(read_tensor(tensor, weight.zero_point.name or "", path).astype(np.int64))
    release(tensor)
    return int(points[0]) if len(points) == 1 else None
