"""Names that many rooms share: types of options, of results and of callbacks."""

from collections.abc import Callable
from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]

# The dense and the sparse model of one build, and everything that is made of both.
Twin = Literal["dense", "sparse"]
TWINS: tuple[Twin, ...] = ("dense", "sparse")

Method = Literal["prox", "ista", "sparsegpt", "wanda", "magnitude"]
Refinement = Literal["auto", "conjugate-gradient", "gradient", "none"]
Preset = Literal["fast", "default", "best"]

Verdict = Literal["pass", "fail", "inconclusive"]
# Of one check; what is without a limit has no verdict.
Judgement = Literal["pass", "fail", "inconclusive", "not gated"]

# Told what is done, how much of it is finished, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress that nobody is told of."""


# What a model is for, by the names that the Hugging Face Hub has for it.
Task = Literal[
    "feature-extraction",
    "text-encoding",
    "text-generation",
    "text-to-text",
    "automatic-speech-recognition",
    "text-classification",
    "token-classification",
    "image-classification",
    "image-feature-extraction",
]
# An encoder and a decoder, which become two graphs.
TWO_GRAPHS = frozenset({"text-to-text", "automatic-speech-recognition"})
# What writes text, one token after the other.
WRITES_TEXT = TWO_GRAPHS | {"text-generation"}
# What gives hidden states of texts, to be pooled into embeddings.
EMBEDS_TEXT = frozenset({"feature-extraction", "text-encoding"})
