"""A tiny embedder of sentences, and what its poolings are by definition."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_models import write_tiny_bert
from tiny_sentences import Module, write_modules

Vectors = npt.NDArray[np.float64]


def write_tiny_embedder(path: Path, *modules: Module, **text: Any) -> Path:
    """A tiny BERT encoder of one block with these modules behind it."""
    return write_modules(write_tiny_bert(path, layers=1), *modules, **text)


def pooled(mode: str, states: Vectors) -> Vectors:
    """The vector of one text, by definition, from the states of its real tokens."""
    count = len(states)
    position = np.arange(1, count + 1)[:, None]
    by_definition: dict[str, Vectors] = {
        "mean": states.sum(0) / count,
        "mean_sqrt_len_tokens": states.sum(0) / np.sqrt(count),
        "weightedmean": (states * position).sum(0) / position.sum(),
        "max": states.max(0),
        "cls": states[0],
        "lasttoken": states[-1],
    }
    return by_definition[mode]
