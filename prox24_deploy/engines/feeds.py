"""Inputs to time a model on."""

from collections.abc import Callable

import numpy as np

from prox24_deploy.engines.base import Feeds
from prox24_deploy.recipe import Recipe


def random_feeds(recipe: Recipe, vocabulary: int) -> Callable[[int, int, int], Feeds]:
    """Random tokens and a full mask; axes named "batch" and "sequence" take the shape asked for."""

    def make(batch: int, sequence: int, seed: int) -> Feeds:
        generator = np.random.default_rng(seed)
        sizes = {"batch": batch, "sequence": sequence}
        feeds = {}
        for spec in recipe.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.axes]
            high = {"input_ids": vocabulary, "attention_mask": 1}.get(spec.name, 0)
            tokens = generator.integers(vocabulary, size=shape, dtype=np.int64)
            feeds[spec.name] = tokens if high == vocabulary else np.full(shape, high, np.int64)
        return feeds

    return make
