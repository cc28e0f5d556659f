"""Which operators of ONNX do what, as far as the proof needs to tell them apart.

The sets name the operators of ONNX's own domain up to operator set 26; one that no set names, as a
later set may add, counts as one that may sum over any of its inputs.
"""

# Products, norms and the like make activations: what they return is no weight any more.
ACTIVATIONS = frozenset(
    {
        "AffineGrid", "Attention", "AveragePool", "BatchNormalization", "CausalConvWithState",
        "Col2Im", "Conv", "ConvInteger", "ConvTranspose", "DFT", "DeformConv", "Det", "Einsum",
        "GRU", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample",
        "GroupNormalization", "Hardmax", "InstanceNormalization", "LRN", "LSTM",
        "LayerNormalization", "LinearAttention", "LogSoftmax", "LpNormalization", "LpPool",
        "MatMul", "MatMulInteger", "MaxPool", "MaxRoiPool", "MaxUnpool",
        "MeanVarianceNormalization", "QLinearConv", "QLinearMatMul", "RMSNormalization", "RNN",
        "Resize", "RoiAlign", "STFT", "Softmax", "Upsample",
    }
)  # fmt: skip

# These return indices, truth values, lengths or noise, which no constant reaches as a weight.
UNRELATED = frozenset(
    {
        "And", "ArgMax", "ArgMin", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
        "BitwiseXor", "BlackmanWindow", "ConstantOfShape", "Equal", "EyeLike", "Greater",
        "GreaterOrEqual", "HammingWindow", "HannWindow", "ImageDecoder", "IsInf", "IsNaN", "Less",
        "LessOrEqual", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
        "NonMaxSuppression", "NonZero", "Not", "OneHot", "OptionalHasElement", "Or", "RandomNormal",
        "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "RegexFullMatch",
        "SequenceEmpty", "SequenceLength", "Shape", "Size", "SoftmaxCrossEntropyLoss",
        "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique", "Xor",
    }
)  # fmt: skip

# Each of these maps zero to zero, element by element.
ZERO_KEEPING = frozenset(
    {
        "Abs", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Elu", "Erf", "Floor",
        "Gelu", "HardSwish", "LeakyRelu", "Mish", "Neg", "PRelu", "Relu", "Round", "Selu", "Shrink",
        "Sign", "Sin", "Sinh", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip

ELEMENTWISE = (ZERO_KEEPING - {"Shrink"}) | {
    "Acos", "Acosh", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "CastLike", "Clip", "Cos", "Cosh", "DequantizeLinear", "Div", "Equal",
    "Exp", "Greater", "GreaterOrEqual", "HardSigmoid", "Identity", "IsInf", "IsNaN", "Less",
    "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Not", "Or", "Pow", "QuantizeLinear",
    "Reciprocal", "Sigmoid", "Softplus", "Sub", "Sum", "Where", "Xor",
}  # fmt: skip
_MOVING = frozenset(
    {
        "Compress", "Concat", "ConstantOfShape", "CumSum", "DepthToSpace", "Expand", "EyeLike",
        "Flatten", "Gather", "GatherElements", "OneHot", "Pad", "Range", "Reshape", "Shape", "Size",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
    }
)  # fmt: skip
_REDUCING = frozenset(
    {
        "ArgMax", "ArgMin", "LogSoftmax", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
        "ReduceSumSquare", "Softmax",
    }
)  # fmt: skip
PRODUCTS = frozenset({"Gemm", "MatMul"})
# The reference evaluator goes through these element by element.
SLOW = frozenset({"GatherND", "ScatterElements", "ScatterND"})
# What the check computes where all inputs are constant.
COMPUTED = ELEMENTWISE | _MOVING | _REDUCING | PRODUCTS | SLOW
# The shape of their result depends on what an input holds.
SHAPED_BY_DATA = frozenset(
    {
        "Compress", "ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape", "Slice",
        "Split", "Squeeze", "Tile", "Unsqueeze", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
        "ReduceSumSquare",
    }
)  # fmt: skip

# Of these inputs alone the result has elements; the others say where, how many or how large.
_FIRST = (0,)
DATA_INPUTS = {
    "ArrayFeatureExtractor": _FIRST, "BitCast": _FIRST, "Cast": _FIRST, "CastLike": _FIRST,
    "CenterCropPad": _FIRST, "Clip": _FIRST, "Compress": _FIRST, "CumProd": _FIRST,
    "CumSum": _FIRST, "DepthToSpace": _FIRST, "DequantizeLinear": _FIRST, "Expand": _FIRST,
    "Gather": _FIRST, "GatherElements": _FIRST, "GatherND": _FIRST, "Pad": _FIRST,
    "QuantizeLinear": _FIRST, "Reshape": _FIRST, "ReverseSequence": _FIRST, "Scatter": (0, 2),
    "ScatterElements": (0, 2), "ScatterND": (0, 2), "SequenceAt": _FIRST, "SequenceErase": _FIRST,
    "SequenceInsert": (0, 1), "Slice": _FIRST, "SpaceToDepth": _FIRST, "Split": _FIRST,
    "SplitToSequence": _FIRST, "Squeeze": _FIRST, "TensorScatter": (0, 1), "Tile": _FIRST,
    "TopK": _FIRST, "Trilu": _FIRST, "Unsqueeze": _FIRST, "Where": (1, 2),
}  # fmt: skip
_MORE_MOVES = frozenset(
    {
        "CenterCropPad", "ConcatFromSequence", "Optional", "OptionalGetElement", "ReverseSequence",
        "RotaryEmbedding", "Scatter", "SequenceAt", "SequenceConstruct", "SequenceErase",
        "SequenceInsert", "SequenceMap", "SplitToSequence", "SwiGLU", "TensorScatter", "TopK",
        "BitCast", "CumProd", "Dropout", "DynamicQuantizeLinear", "If", "Loop", "Scan", "Shrink",
        "Constant",
    }
)  # fmt: skip

# Operators of ONNX that sum no products over a constant of theirs.
NO_PRODUCT = (
    UNRELATED | _MORE_MOVES | (COMPUTED - PRODUCTS) | frozenset(
        {
            "AffineGrid", "AveragePool", "BatchNormalization", "Col2Im", "DFT", "Det",
            "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample",
            "GroupNormalization", "Hardmax", "InstanceNormalization", "LRN", "LayerNormalization",
            "LpNormalization", "LpPool", "MaxPool", "MaxRoiPool", "MaxUnpool",
            "MeanVarianceNormalization", "RMSNormalization", "Resize", "RoiAlign", "STFT",
            "Upsample",
        }
    )
)  # fmt: skip
