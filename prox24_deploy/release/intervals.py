"""How far two measurements lie apart, with 95 % intervals, and what that says about a limit.

All intervals are about the noise within the measurements. What differs between days, such as the
clock of a machine, is in none of them; only a ratio to a twin measured in turns is free of it.
"""

import math
from collections.abc import Sequence

import numpy as np

from prox24_deploy.artifacts import Estimate, Interval, Verdict

NORMAL_95 = 1.96


def exactly(value: float) -> Interval:
    """The interval of a value that has no noise, such as a size."""
    return Interval(value, value, value)


def around(estimate: Estimate) -> Interval:
    """Mean ± 1.96 standard errors."""
    margin = NORMAL_95 * estimate.standard_error
    return Interval(estimate.value, estimate.value - margin, estimate.value + margin)


def standard_error(interval: Interval) -> float:
    """The standard error that a normal 95 % interval of this width stands for."""
    return (interval.high - interval.low) / (2 * NORMAL_95)


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Mean of new − old over the same samples in the same order, with its own standard error.

    What both have in common, such as how hard a text is, cancels; equal values give zero width.

    Raises:
        ValueError: the lengths differ, or there are fewer than two samples.
    """
    if len(new) != len(old) or len(new) < 2:
        raise ValueError(f"{len(new)} and {len(old)} samples are no pairs, expected two or more")
    gaps = np.asarray(new) - np.asarray(old)
    error = float(gaps.std(ddof=1)) / math.sqrt(gaps.size)
    return around(Estimate(float(gaps.mean()), error))


def unpaired_difference(new: Estimate, old: Estimate) -> Interval:
    """New − old as if of independent samples: rather too wide where they share samples.

    The correlation of the same text under two builds is not negative in practice; that is what
    makes it the careful side.
    """
    error = math.hypot(new.standard_error, old.standard_error)
    return around(Estimate(new.value - old.value, error))


def median_interval(
    samples: Sequence[float], value: float, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the median; `value` is the median of all runs, kept or not."""
    medians = _medians(samples, resamples, np.random.default_rng(seed))
    return _with_value(value, *np.percentile(medians, [2.5, 97.5]))


def median_ratio_interval(
    new: Sequence[float],
    old: Sequence[float],
    value: float,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """New / old of two medians of runs that were not in turns: each resampled alone.

    `value` is the ratio of the medians of all runs; a report keeps some of them, so that the
    interval is rather too wide.
    """
    random = np.random.default_rng(seed)
    ratios = _medians(new, resamples, random) / _medians(old, resamples, random)
    return _with_value(value, *np.percentile(ratios, [2.5, 97.5]))


def ratio_of_intervals(new: Interval, old: Interval) -> Interval:
    """New / old of two independent positive estimates, from their 95 % intervals alone.

    The method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008) on
    logarithms: each side adds the margins of its own side in quadrature.
    """
    value = math.log(new.value / old.value)
    below = math.hypot(math.log(new.value / new.low), math.log(old.high / old.value))
    above = math.hypot(math.log(new.high / new.value), math.log(old.value / old.low))
    return Interval(math.exp(value), math.exp(value - below), math.exp(value + above))


def judge(worse: Interval, limit: float) -> Verdict:
    """Pass where the whole interval keeps the limit, fail where none of it does."""
    if worse.high <= limit:
        return "pass"
    return "fail" if worse.low > limit else "inconclusive"


def _medians(
    samples: Sequence[float], resamples: int, random: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    runs = np.asarray(samples, dtype=np.float64)
    draw = random.integers(0, runs.size, size=(resamples, runs.size))
    medians: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.median(runs[draw], axis=1)
    return medians


def _with_value(value: float, low: float, high: float) -> Interval:
    """An interval that holds its value, which may come from more runs than were resampled."""
    return Interval(value, min(float(low), value), max(float(high), value))
