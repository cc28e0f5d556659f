"""Which inputs of which nodes are weights, and over which of their axes a node sums.

Operators of ONNX and of ONNX Runtime's domain `com.microsoft` are told apart by name, as the
schemas of both describe them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import ONNX_DOMAINS
from prox24_deploy.graph.check.einsum import contraction_of
from prox24_deploy.graph.check.operators import NO_PRODUCT
from prox24_deploy.graph.check.quantisers import MICROSOFT, TENSORRT

Form = Literal["left", "right", "conv", "transposed conv", "recurrent", "einsum", "data", "packed"]


@dataclass(frozen=True, slots=True)
class Operand:
    """One input that is summed over; `zero_point` is the index of the input that holds its zero."""

    index: int
    form: Form
    zero_point: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How a node sums over a weight of one rank.

    `axis` is summed, together with the `joined - 1` axes behind it, and `outputs` run over the
    results. The outermost `groups` equal pieces of `axis` are summed apart from each other.
    """

    axis: int
    outputs: tuple[int, ...]
    groups: int = 1
    joined: int = 1


_BOTH = (Operand(0, "left"), Operand(1, "right"))
_RIGHT = (Operand(1, "right"),)
_CONV = (Operand(0, "data"), Operand(1, "conv"))
_TRANSPOSED_CONV = (Operand(0, "data"), Operand(1, "transposed conv"))
_RECURRENT = (Operand(0, "data"), Operand(1, "recurrent"), Operand(2, "recurrent"))


def _packed(*indices: int) -> tuple[Operand, ...]:
    return tuple(Operand(index, "packed") for index in indices)


_STANDARD: Mapping[str, tuple[Operand, ...]] = {
    "MatMul": _BOTH,
    "Gemm": _BOTH,
    "MatMulInteger": (Operand(0, "left", 2), Operand(1, "right", 3)),
    "QLinearMatMul": (Operand(0, "left", 2), Operand(3, "right", 5)),
    "Conv": _CONV,
    "DeformConv": _CONV,
    "ConvInteger": (Operand(0, "data"), Operand(1, "conv", 3)),
    "QLinearConv": (Operand(0, "data"), Operand(3, "conv", 5)),
    "ConvTranspose": _TRANSPOSED_CONV,
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
}

_CONTRIB: Mapping[str, tuple[Operand, ...]] = {
    "FusedMatMul": _BOTH,
    "FusedMatMulActivation": _BOTH,
    "TransposeMatMul": _BOTH,
    "FusedGemm": _BOTH,
    "GemmFastGelu": _BOTH,
    "GemmFloat8": _BOTH,
    "MatMulInteger16": _BOTH,
    "MatMulIntegerToFloat": (Operand(0, "left", 4), Operand(1, "right", 5)),
    "DynamicQuantizeMatMul": (Operand(1, "right", 3),),
    "QGemm": (Operand(0, "left", 2), Operand(3, "right", 5)),
    "Attention": _RIGHT,
    "PackedAttention": _RIGHT,
    "DecoderMaskedSelfAttention": _RIGHT,
    "QAttention": (Operand(1, "right", 7),),
    "DecoderAttention": (Operand(2, "right"), Operand(3, "right")),
    "LongformerAttention": (Operand(1, "right"), Operand(4, "right")),
    "FusedConv": _CONV,
    "NhwcFusedConv": _CONV,
    "QLinearConv": (Operand(0, "data"), Operand(3, "conv", 5)),
    "ConvTransposeWithDynamicPads": _TRANSPOSED_CONV,
    "AttnLSTM": _RECURRENT,
    "MatMulNBits": _packed(1),
    "MatMulBnb4": _packed(1),
    "MatMulFpQ4": _packed(1),
    "MatMulPacked": _packed(1),
    "MatMulBlockQuantizedFp4Weight": _packed(1),
    "MatMulBlockQuantizedFp8Weight": _packed(1),
    "MatMulNBitsMlp": _packed(3, 6),
    "MatMulNBitsQkv": _packed(3, 6, 9),
    "MatMulNBitsQLoRA": _packed(1, 3, 5),
    "QMoE": _packed(2, 5, 8),
    "MoEPacked": _packed(2, 3, 4),
    "QOrderedMatMul": _packed(2),
}

# These read tables and vectors, or activations alone; no constant of theirs is summed over.
_SUM_NO_WEIGHT = frozenset(
    {
        "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "ComplexMul",
        "ComplexMulConj", "DecoderMaskedMultiHeadAttention", "DequantizeBFP", "DequantizeLinear",
        "DequantizeWithOrder", "EmbedLayerNormalization", "ExpandDims", "FastGelu", "GatedAdd",
        "GatedRMSNorm", "GatherBlockQuantized", "GatherND", "GatherPacked", "Gelu",
        "GemmaRotaryEmbedding", "GridSample", "GroupNorm", "GroupQueryAttention", "LinearAttention",
        "LinearAttentionGate", "MRotaryEmbedding", "MulInteger", "MultiHeadAttention",
        "PackedMultiHeadAttention", "Pad", "PagedAttention", "QEmbedLayerNormalization",
        "QLinearAdd", "QLinearConcat", "QLinearMul", "QLinearWhere", "QuantizeBFP",
        "QuantizeLinear", "QuantizeWithOrder", "QuickGelu", "RelativePositionBias",
        "RMSNormRotary", "RotaryEmbedding", "SkipGroupNorm", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "SparseAttention", "SwiGLU", "TorchEmbedding", "Trilu",
    }
)  # fmt: skip

# TensorRT's quantisers, as graph.arithmetic follows them, and classic machine learning.
_OTHERS_SUM_NO_WEIGHT = {
    TENSORRT: frozenset(
        {
            "TRT_FP4DynamicQuantize", "TRT_FP8DequantizeLinear", "TRT_FP8QuantizeLinear",
            "TRT_INT4DequantizeLinear", "TRT_INT4QuantizeLinear", "TRT_INT8DequantizeLinear",
            "TRT_INT8QuantizeLinear", "TRT_MXFP8DequantizeLinear", "TRT_MXFP8DynamicQuantize",
        }
    ),
    "ai.onnx.ml": frozenset(
        {
            "ArrayFeatureExtractor", "Binarizer", "CastMap", "CategoryMapper", "DictVectorizer",
            "FeatureVectorizer", "Imputer", "LabelEncoder", "Normalizer", "OneHotEncoder", "Scaler",
            "TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "ZipMap",
        }
    ),
    MICROSOFT: _SUM_NO_WEIGHT,
}  # fmt: skip


def weight_operands(node: ir.Node) -> Iterator[Operand]:
    """Inputs of a node that may be weights; every one of a node that is not known."""
    known = _known(node)
    if known is None:
        known = () if sums_no_weight(node) else _packed(*range(len(node.inputs)))
    yield from (operand for operand in known if operand.index < len(node.inputs))


def is_known(node: ir.Node) -> bool:
    """Whether it is known which inputs of a node are weights."""
    return _known(node) is not None


def sums_no_weight(node: ir.Node) -> bool:
    """Whether it is known that a node sums no products over a constant."""
    if node.domain in ONNX_DOMAINS:
        return node.op_type in NO_PRODUCT
    return node.op_type in _OTHERS_SUM_NO_WEIGHT.get(node.domain, ())


def reduction_of(node: ir.Node, operand: Operand, rank: int) -> Reduction | str | None:
    """How a node sums over an operand of some rank, or why that cannot be told; None if it is not.

    Axes: MatMul second input ndim-2, first input the last; Gemm B 1 if transB else 0, A 0 if transA
    else 1; Conv 1, within each group; ConvTranspose 0, within each group; recurrent layers 2.
    """
    found: Reduction | str | None
    match operand.form:
        case "left" | "right":
            found = _of_matrix(node, operand, rank)
        case "conv":
            found = Reduction(axis=1, outputs=(0,))
        case "transposed conv":
            found = Reduction(axis=0, outputs=(1,), groups=attributes.integer(node, "group", 1))
        case "recurrent":
            found = Reduction(axis=2, outputs=(1,))
        case "einsum":
            found = _of_einsum(node, operand.index, rank)
        case "data":
            found = f"{node.op_type} takes it for data, which the check does not prove"
        case _:
            found = f"{node.op_type} keeps it in a form that the check does not read"
    if isinstance(found, Reduction) and max(found.axis, *found.outputs, 0) >= rank:
        return f"its rank {rank} does not fit the node that reads it"
    if isinstance(found, Reduction) and found.groups < 1:
        return f"{node.op_type} has {found.groups} groups"
    return found


def _known(node: ir.Node) -> tuple[Operand, ...] | None:
    if node.domain in ONNX_DOMAINS and node.op_type == "Einsum":
        return tuple(Operand(index, "einsum") for index in range(len(node.inputs)))
    tables = {**dict.fromkeys(ONNX_DOMAINS, _STANDARD), MICROSOFT: _CONTRIB}
    return tables.get(node.domain, {}).get(node.op_type)


def _of_matrix(node: ir.Node, operand: Operand, rank: int) -> Reduction:
    left = operand.form == "left"
    side = "A" if left else "B"
    batch = attributes.integer(node, f"transBatch{side}", 0)
    swap = attributes.integer(node, f"trans{side}", 0)
    order = list(range(rank))
    if rank == 1:
        return Reduction(axis=0, outputs=())
    # FusedMatMul: the first axis moves before the last one, then the last two change places.
    if rank > 2 and batch:
        order = [*order[1:-1], 0, order[-1]]
    if swap:
        order[-2:] = order[-1], order[-2]
    summed, free = (order[-1], order[-2]) if left else (order[-2], order[-1])
    return Reduction(axis=summed, outputs=(free,))


def _of_einsum(node: ir.Node, index: int, rank: int) -> Reduction | str | None:
    found = contraction_of(attributes.text(node, "equation"), index, rank)
    if found is None or isinstance(found, str):
        return found
    return Reduction(axis=found.first, outputs=found.outputs, joined=found.count)
