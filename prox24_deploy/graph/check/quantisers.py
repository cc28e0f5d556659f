"""QuantizeLinear and DequantizeLinear under all the names and domains that exporters give them.

TensorRT's own (domain `trt`, as Model Optimizer writes them) and ONNX Runtime's work as those of
ONNX do, and are read as those.
"""

import onnx
import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import ONNX_DOMAINS, type_of_input

MICROSOFT = "com.microsoft"
TENSORRT = "trt"
# The operator set whose quantisers have all types and blocks.
_OPSET = 23

_TYPES = {
    "TRT_FP8": ir.DataType.FLOAT8E4M3FN,
    "TRT_INT4": ir.DataType.INT4,
    "TRT_INT8": ir.DataType.INT8,
    "TRT_FP4": ir.DataType.FLOAT4E2M1,
    "TRT_MXFP8": ir.DataType.FLOAT8E4M3FN,
}
# These choose their scales themselves, and are followed but not computed.
_DYNAMIC = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
_STATIC = ("TRT_FP8", "TRT_INT4", "TRT_INT8")


def is_quantiser(node: ir.Node) -> bool:
    """Whether a node quantises."""
    if node.domain == TENSORRT:
        return node.op_type in (*_DYNAMIC, *(f"{name}QuantizeLinear" for name in _STATIC))
    return node.op_type == "QuantizeLinear" and node.domain in (*ONNX_DOMAINS, MICROSOFT)


def is_dequantiser(node: ir.Node) -> bool:
    """Whether a node dequantises."""
    if node.domain == TENSORRT:
        return node.op_type in [f"{name}DequantizeLinear" for name in (*_STATIC, "TRT_MXFP8")]
    return node.op_type == "DequantizeLinear" and node.domain in (*ONNX_DOMAINS, MICROSOFT)


def is_quantising(node: ir.Node) -> bool:
    """Whether a node quantises or dequantises."""
    return is_quantiser(node) or is_dequantiser(node)


def quantised_type(node: ir.Node) -> ir.DataType:
    """Type that a quantiser returns."""
    for prefix, dtype in _TYPES.items():
        if node.op_type.startswith(prefix):
            return dtype
    stated = attributes.element_type(node, "output_dtype")
    return type_of_input(node, 2) or stated or ir.DataType.UINT8


def standard_form(node: ir.Node, opset: int) -> tuple[onnx.NodeProto, int] | None:
    """A node as an operator of ONNX, with the operator set that has it; None if there is none."""
    made: onnx.NodeProto = ir.to_proto(node)
    if node.domain in ONNX_DOMAINS:
        made.domain = ""
        return made, opset
    if not is_quantising(node) or node.op_type in _DYNAMIC:
        return None
    made.domain = ""
    made.op_type = "QuantizeLinear" if is_quantiser(node) else "DequantizeLinear"
    if node.domain == TENSORRT and is_quantiser(node):
        kept = [entry for entry in made.attribute if entry.name in ("axis", "block_size")]
        del made.attribute[:]
        made.attribute.extend(kept)
        made.attribute.append(
            onnx.helper.make_attribute("output_dtype", quantised_type(node).value)
        )
    return made, _OPSET
