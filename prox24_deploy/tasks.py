"""What a model is for, by the names that the Hugging Face Hub has for it."""

from typing import Literal

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
