"""Inputs to time a model on."""

from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype that numpy knows
import numpy as np

from prox24_deploy.config.recipe import TensorSpec, shape_of
from prox24_deploy.core.types import DType
from prox24_deploy.engines.base import Array, Feeds


def random_feeds(
    inputs: Sequence[TensorSpec], dtype: DType, vocabulary: int
) -> Callable[[int, int, int], Feeds]:
    """Random tokens and a full mask; axes named "batch" and "sequence" take the shape asked for.

    A graph with a cache is fed an empty past, so that what is timed is the prefill of `sequence`
    tokens. A decoder reads the states of an encoder of as many tokens, the axis "source".
    """

    def make(batch: int, sequence: int, seed: int) -> Feeds:
        generator = np.random.default_rng(seed)
        sizes = {"batch": batch, "sequence": sequence, "source": sequence, "past": 0}
        return {
            spec.name: _feed(spec, shape_of(spec, sizes), np.dtype(dtype), vocabulary, generator)
            for spec in inputs
        }

    return make


def _feed(
    spec: TensorSpec,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    vocabulary: int,
    generator: np.random.Generator,
) -> Array:
    tokens = generator.integers(vocabulary, size=shape, dtype=np.int64)
    if spec.dtype == "float":
        return generator.standard_normal(shape).astype(dtype)
    match spec.name:
        case "input_ids":
            return tokens
        case "attention_mask" | "encoder_attention_mask":
            return np.ones(shape, np.int64)
        case "position_ids":
            return np.broadcast_to(np.arange(shape[1]), shape).copy()
        case _:
            return np.zeros(shape, np.int64)
