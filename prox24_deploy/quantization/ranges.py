"""From which magnitude on the inputs of a layer are clipped: candidates, from what was seen.

A range that holds the largest input wastes numbers on what hardly ever comes; one that clips too
much distorts what matters. So several are tried, and withheld samples choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.quantization.formats import NumberFormat, exact_scale

_PERCENTILES = (99.9, 99.99, 99.999)
# Limits tried for the least squared error, as shares of the largest magnitude.
_SHARES = tuple(0.85**i for i in range(1, 24))
# Values of a sample that this is computed on.
_MOST_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRange:
    """A scale for the inputs of a layer, and how it was found."""

    scale: float
    chosen_by: str


def input_ranges(rows: Tensor, largest: float, form: NumberFormat) -> list[InputRange]:
    """Candidates, the widest first, each scale once.

    Args:
        rows: a sample of the inputs, (tokens, d).
        largest: magnitude over all inputs, positive and finite.
        form: that they are to be rounded to.
    """
    sizes = _thinned(rows.abs())
    limits = {"maximum": largest}
    limits |= dict(zip((f"{p} percentile" for p in _PERCENTILES), _percentiles(sizes), strict=True))
    limits["least squared error"] = _least_error(_thinned(rows), largest, form)
    found: dict[float, InputRange] = {}
    for chosen_by, limit in limits.items():
        scale = scale_for(limit, form)
        found.setdefault(scale, InputRange(scale=scale, chosen_by=chosen_by))
    return sorted(found.values(), key=lambda each: -each.scale)


def scale_for(limit: float, form: NumberFormat) -> float:
    """The scale by which `limit` becomes the largest number of a format."""
    return float(exact_scale(torch.tensor(limit / form.largest)))


def _thinned(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat[:: max(1, -(-flat.numel() // _MOST_VALUES))]


def _percentiles(sizes: Tensor) -> Sequence[float]:
    ordered = sizes.sort().values
    last = len(ordered) - 1
    return [float(ordered[round(last * percent / 100)]) for percent in _PERCENTILES]


def _least_error(values: Tensor, largest: float, form: NumberFormat) -> float:
    def error(limit: float) -> float:
        scale = scale_for(limit, form)
        rounded = form.values(form.numbers(values, scale), scale)
        return float((rounded - values).square().double().sum())

    return min((largest, *(largest * share for share in _SHARES)), key=error)
