"""Which layers are worth holding compressed: decided by measured times, one reason for each."""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import get_args

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.engines.cusparselt.linear import LayerUse, shape_obstacle
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmTiming, GpuProfile

NOT_24 = "not 2:4"
# Over all shapes asked for, a layer must win by 2 % in the mean and lose no more than 2 % in any.
MEAN_SPEEDUP, LEAST_SPEEDUP = 1.02, 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """Whether a layer runs sparse, and why.

    `timings` has its GEMM in each input shape; it is empty where cuSPARSELt cannot run the layer.
    """

    name: str
    n: int
    k: int
    timings: tuple[GemmTiming, ...]
    chosen: bool
    reason: str

    @property
    def eligible(self) -> bool:
        """Whether cuSPARSELt can run the layer at all."""
        return bool(self.timings)

    @property
    def algorithms(self) -> dict[int, int]:
        """Number of the fastest algorithm by rows of activations."""
        return {timing.shape.m: timing.algorithm for timing in self.timings}


def gemm_obstacle(use: LayerUse, format: GemmFormat) -> str:
    """Why cuSPARSELt cannot run a layer in a format, whatever its weight; "" where it can."""
    if not use.gemms:
        return "a convolution, and cuSPARSELt multiplies matrices only"
    return shape_obstacle(use.n, use.k, format)


def choose(
    uses: Iterable[LayerUse], profile: GpuProfile, pruned: Container[str], format: GemmFormat
) -> tuple[LayerChoice, ...]:
    """Decide for each layer from the times in `profile`, measured or estimated, in a format.

    A layer that is not in `pruned` is not 2:4, or not meant to be, and stays dense.
    """
    choices = []
    for use in uses:
        obstacle = gemm_obstacle(use, format) if use.name in pruned else NOT_24
        timings = () if obstacle else tuple(profile.timing(shape, format) for shape in use.gemms)
        chosen = bool(timings) and _pays(timings)
        reason = obstacle or _said(timings, format, chosen=chosen)
        choices.append(
            LayerChoice(
                name=use.name, n=use.n, k=use.k, timings=timings, chosen=chosen, reason=reason
            )
        )
    return tuple(choices)


def _pays(timings: tuple[GemmTiming, ...]) -> bool:
    mean = math.exp(math.fsum(math.log(t.speedup) for t in timings) / len(timings))
    return mean >= MEAN_SPEEDUP and min(t.speedup for t in timings) >= LEAST_SPEEDUP


def _compared(timings: tuple[GemmTiming, ...]) -> str:
    """How much faster layers are that do not pay: a little, or not in every shape."""
    return "slower" if any(t.speedup < 1 for t in timings) else "hardly faster"


def _said(timings: tuple[GemmTiming, ...], format: GemmFormat, *, chosen: bool) -> str:
    shown = ", ".join(f"{t.speedup:.2f}× at {t.shape.m} rows" for t in timings)
    how = "timed" if all(t.measured for t in timings) else "estimated"
    what = "faster" if chosen else _compared(timings)
    than = f" than dense {format}" if format in get_args(QuantizedFormat) else ""
    return f"{how} {what}{than}: {shown}"
