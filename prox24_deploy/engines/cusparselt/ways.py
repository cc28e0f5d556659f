"""The ways to multiply a layer, in 16 or 8 bits, dense or 2:4, and which of them pays most."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prox24_deploy.core.types import Quantize, QuantizedFormat
from prox24_deploy.engines.cusparselt.choice import LEAST_SPEEDUP, MEAN_SPEEDUP
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmTiming

# One model has one of these at most.
EIGHT_BITS: tuple[QuantizedFormat, ...] = get_args(QuantizedFormat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a layer is multiplied."""

    format: GemmFormat
    sparse: bool

    def __str__(self) -> str:
        """As a reader knows it: "fp8 2:4"."""
        return f"{self.format} 2:4" if self.sparse else f"{self.format} dense"


# By format the timings of one layer's GEMM in each of the input shapes.
Timings = Mapping[GemmFormat, Sequence[GemmTiming]]


def times_us(timings: Timings, way: Way) -> tuple[float, ...]:
    """Microseconds of a way in each input shape."""
    return tuple(t.sparse_us if way.sparse else t.dense_us for t in timings[way.format])


def cheapest(timings: Timings, half: GemmFormat, quantize: Quantize, *, sparse: bool) -> Way:
    """The way that pays most over dense 16 bit, over all input shapes.

    A way is left for a later one in the order 16 bit, 16 bit 2:4, 8 bit, 8 bit 2:4 only where that
    pays over it: it costs accuracy.

    Args:
        timings: of the layer.
        half: the 16-bit format of the model.
        quantize: the 8-bit format that the model may use.
        sparse: whether the layer may be 2:4.
    """
    best = Way(format=half, sparse=False)
    for way in ways_of(timings, half, quantize):
        if (sparse or not way.sparse) and _pays(times_us(timings, best), times_us(timings, way)):
            best = way
    return best


def ways_of(timings: Timings, half: GemmFormat, quantize: Quantize) -> list[Way]:
    """The ways of which something is known, from the most to the least accurate."""
    formats: Iterable[GemmFormat] = (half,) if quantize == "none" else (half, quantize)
    return [
        Way(format=format, sparse=sparse)
        for format in formats
        if timings.get(format)
        for sparse in (False, True)
    ]


def _pays(before: Sequence[float], after: Sequence[float]) -> bool:
    gains = [b / a for b, a in zip(before, after, strict=True)]
    mean = math.exp(math.fsum(map(math.log, gains)) / len(gains))
    return mean >= MEAN_SPEEDUP and min(gains) >= LEAST_SPEEDUP
