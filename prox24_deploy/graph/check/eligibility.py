"""Whether TensorRT may take a sparse kernel for a weight, by the rules that it was seen to follow.

For an eligible weight TensorRT times sparse kernels too; it takes one only where that was faster,
which channels below about 256 seldom are (github.com/NVIDIA/TensorRT, issue 3849). MatMul and Gemm
are eligible besides Conv (issues 2169 and 2271), convolutions of several groups are not (4054).
Sizes that are no multiple of 8 and 16, and types without sparse tensor-core instructions, are not.
Sparse INT8 kernels are taken only where the output is INT8 as the input is (issue 4694, and pull
request 1664 of github.com/NVIDIA/Model-Optimizer): all that reads it must be QuantizeLinear, behind
at most a bias, an activation function that TensorRT fuses, and nodes that only renumber elements.
Batches of matrices follow the rules of one matrix here; what TensorRT does with them is not known.
Its parser refuses a whole file in which a zero point of QuantizeLinear or DequantizeLinear is not
zero ("Non-zero zero point is not supported", issue 2774), has no sign ("Found unsupported input
type of UINT8"), or in which a tensor is sparse; the last two are what TensorRT-RTX 1.7 does.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.graph.check.attributes import described
from prox24_deploy.graph.check.constants import constant_of, input_of, read_tensor, type_of_input
from prox24_deploy.graph.check.quantisers import is_quantiser, is_quantising, quantised_type

_SPARSE_OPS = ("MatMul", "Gemm", "Conv", "")
_SPARSE_TYPES = ("float16", "bfloat16", "int8", "float8_e4m3fn")
# Through these an output stays what the kernel of a product writes.
_FUSED = ("Relu", "Gelu", "Clip", "LeakyRelu")
_RENUMBERED = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_N_MULTIPLE = 8
_K_MULTIPLE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShape:
    """A weight as a matrix multiplication sees it.

    `n` counts outputs and `k` the elements that are summed, for a convolution output channels and
    the input channels of one of its `groups`.
    """

    n: int
    k: int
    groups: int = 1


def obstacles(op_type: str, domain: str, dtype: str, gemm: WeightShape | None) -> list[str]:
    """Every rule that keeps TensorRT from sparse kernels; empty if it may take one.

    Args:
        op_type: operator that reads the weight, "" for a weight outside a graph.
        domain: domain of the operator, "" for ONNX's own.
        dtype: name of the type that is multiplied.
        gemm: sizes of the multiplication, None where they are not known.
    """
    found = []
    if domain not in ("", "ai.onnx"):
        found.append(f"TensorRT does not parse {op_type} of {domain}")
    elif op_type not in _SPARSE_OPS:
        found.append(f"TensorRT has sparse kernels for MatMul, Gemm and Conv, not for {op_type}")
    if gemm is None:
        return found
    if dtype not in _SPARSE_TYPES:
        found.append(f"{dtype} has no sparse kernels")
    if gemm.groups > 1:
        found.append(f"TensorRT has no sparse kernels for a convolution of {gemm.groups} groups")
    outputs, inputs = ("output channels", "input channels") if op_type == "Conv" else ("N", "K")
    if gemm.n % _N_MULTIPLE:
        found.append(f"{outputs} = {gemm.n} is not a multiple of {_N_MULTIPLE}")
    if gemm.k % _K_MULTIPLE:
        found.append(f"{inputs} = {gemm.k} is not a multiple of {_K_MULTIPLE}")
    return found


def wide_output(node: ir.Node) -> str:
    """Why the output of an INT8 product is not INT8 too, "" where it is."""
    left, seen = [node.outputs[0]], set()
    while left:
        value = left.pop()
        if value.is_graph_output():
            return _wide("it is an output of the graph")
        for reader in value.consumers():
            if is_quantiser(reader) or reader in seen:
                continue
            if not _passes(reader, value):
                return _wide(f"{described(reader)} reads it as it is")
            seen.add(reader)
            left += reader.outputs
    return ""


def _wide(why: str) -> str:
    return f"TensorRT has sparse INT8 kernels for INT8 outputs only, and {why}"


def _passes(reader: ir.Node, value: ir.Value) -> bool:
    if reader.op_type == "Add":
        others = [given for given in reader.inputs if given is not value]
        return bool(others) and all(constant_of(given) is not None for given in others)
    return reader.op_type in (*_FUSED, *_RENUMBERED) and reader.inputs[0] is value


def refusal(nodes: Iterable[ir.Node], path: Path, sparse: str) -> str:
    """Why the parser of TensorRT refuses a whole file, "" if nothing of it is known to.

    Args:
        nodes: of the graph.
        path: of the file.
        sparse: name of a sparse tensor of the file, "" if it has none.
    """
    if sparse:
        return f"TensorRT takes no sparse tensors, as which the file stores {sparse!r}"
    for node in nodes:
        if is_quantising(node):
            found = _refused_quantiser(node, path)
            if found:
                return found
    return ""


def _refused_quantiser(node: ir.Node, path: Path) -> str:
    zeros = input_of(node, 2)
    types = [type_of_input(node, 0), type_of_input(node, 2)]
    types += [quantised_type(node)] if zeros is None and is_quantiser(node) else []
    if ir.DataType.UINT8 in types:
        return f"TensorRT takes no integers without a sign, as {described(node)} has"
    if zeros is None:
        return ""
    zeros = _passed_on(zeros)
    tensor = constant_of(zeros)
    if tensor is None:
        return f"TensorRT takes no zero point that is computed, as that of {described(node)}"
    if np.any(read_tensor(tensor, zeros.name or "", path)):
        return f"TensorRT takes no zero point but 0, and {described(node)} has another"
    return ""


def _passed_on(value: ir.Value) -> ir.Value:
    """Where a value comes from through nodes that the parser folds."""
    seen = {value}
    node = value.producer()
    while node is not None and node.op_type in ("Identity", "Cast"):
        source = input_of(node, 0)
        if source is None or source in seen:
            break
        seen.add(source)
        value, node = source, source.producer()
    return value
