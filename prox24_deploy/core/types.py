"""Names that many rooms share: types of options, of results and of callbacks."""

from collections.abc import Callable
from datetime import timedelta
from typing import Literal, get_args

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[DType, ...] = get_args(DType)

# What weights and activations are rounded to, besides a dtype.
QuantizedFormat = Literal["fp8", "int8"]
# The same as an option.
Quantize = Literal["none", "fp8", "int8"]

# The dense and the sparse model of one build, and everything that is made of both.
Twin = Literal["dense", "sparse"]
TWINS: tuple[Twin, ...] = ("dense", "sparse")

Method = Literal["prox", "ista", "sparsegpt", "wanda", "magnitude"]
# How layers are pruned, if at all.
Pruning = Literal["prox", "ista", "sparsegpt", "wanda", "magnitude", "none"]
Refinement = Literal["auto", "conjugate-gradient", "gradient", "none"]
Preset = Literal["fast", "default", "best"]

# What trains the kept weights of a pruned model.
RecoverOptimizer = Literal["adamw", "adafactor"]

Verdict = Literal["pass", "fail", "inconclusive"]
# Of one check; what is without a limit has no verdict.
Judgement = Literal["pass", "fail", "inconclusive", "not gated"]

# How loud a stage or a block is in a log: below a warning, and above what only --verbose shows.
STEP = 25

# How long processes that share a run wait for the first, which writes text and files meanwhile.
PATIENCE = timedelta(hours=12)

# Told what is done, how much of it is finished, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress that nobody is told of."""
