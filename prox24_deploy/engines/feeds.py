"""Inputs to time a model on."""

from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype that numpy knows
import numpy as np

from prox24_deploy.config.recipe import TensorSpec, shape_of
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType
from prox24_deploy.engines.base import Array, Feeds


def random_feeds(
    inputs: Sequence[TensorSpec], dtype: DType, vocabulary: int
) -> Callable[[Shape, int], Feeds]:
    """Random tokens, past keys and values, and a full mask, by the sizes of the shape asked for.

    What is made takes that shape and a seed. Past keys and values are the same for every seed, as
    they are gigabytes, and stay from one step to the next where a model decodes.
    """
    pasts: dict[str, Array] = {}

    def past(spec: TensorSpec, shape: Shape) -> Array:
        known = pasts.get(spec.name)
        if known is None or known.shape != shape_of(spec, shape.sizes):
            generator = np.random.default_rng(len(pasts))
            known = _feed(spec, shape, np.dtype(dtype), vocabulary, generator)
            pasts[spec.name] = known
        return known

    def make(shape: Shape, seed: int) -> Feeds:
        generator = np.random.default_rng(seed)
        return {
            spec.name: past(spec, shape)
            if "past" in spec.axes
            else _feed(spec, shape, np.dtype(dtype), vocabulary, generator)
            for spec in inputs
        }

    return make


def _feed(
    spec: TensorSpec,
    asked: Shape,
    dtype: np.dtype[np.generic],
    vocabulary: int,
    generator: np.random.Generator,
) -> Array:
    shape = shape_of(spec, asked.sizes)
    if spec.dtype == "float":
        return generator.standard_normal(shape, np.float32).astype(dtype)
    match spec.name:
        case "input_ids":
            return generator.integers(vocabulary, size=shape, dtype=np.int64)
        case "attention_mask" | "encoder_attention_mask":
            return np.ones(shape, np.int64)
        case "position_ids":
            return np.broadcast_to(asked.past + np.arange(shape[1]), shape).copy()
        case _:
            return np.zeros(shape, np.int64)
