"""How far two measurements lie apart, with 95 % intervals, and what that says about a limit.

All intervals are about the noise within the measurements. What differs between days, such as the
clock of a machine, is in none of them; only a ratio to a twin measured in turns is free of it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from prox24_deploy.core.metrics import is_bounded
from prox24_deploy.core.records import Estimate, Interval, Metric
from prox24_deploy.core.types import Verdict

NORMAL_95 = NormalDist().inv_cdf(0.975)
# Fewer samples decide nothing: of two, the standard error is itself known to a factor of 30.
FEWEST = 3
# Below it a report says that there are few.
FEW = 30
# A standard error below it comes from rounding.
NO_ERROR = 1e-7
_BADNESS: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")
# From here on the quantile is known to 1e-9 from its expansion.
_MANY_DEGREES = 200


def exactly(value: float) -> Interval:
    """The interval of a value that has no noise, such as a size."""
    return Interval(value=value, low=value, high=value)


def map_interval(scale: Callable[[float], float], interval: Interval) -> Interval:
    """An interval on another scale, which rises with the old one."""
    return Interval(value=scale(interval.value), low=scale(interval.low), high=scale(interval.high))


@lru_cache
def student_95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, so that the mean ± it standard errors holds 95 %.

    Exact to 1e-9. Abramowitz and Stegun, Handbook of Mathematical Functions: 26.7.3 and 26.7.4 give
    the distribution for whole degrees of freedom as a finite sum, which is inverted by bisection;
    above 200 degrees 26.7.5 expands the quantile itself.

    Raises:
        ValueError: `degrees` is below 1.
    """
    if degrees < 1:
        raise ValueError(f"Student's t has no {degrees} degrees of freedom, expected 1 or more")
    if degrees > _MANY_DEGREES:
        z = NORMAL_95
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / degrees + second / degrees**2 + third / degrees**3
    low, high = 0.0, 16.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def around(estimate: Estimate, samples: int) -> Interval:
    """The mean of so many samples ± its standard errors, as many as Student's t says.

    One sample has no standard error, so that its interval has no width: it decides nothing.
    """
    margin = student_95(max(samples - 1, 1)) * estimate.standard_error
    return Interval(value=estimate.value, low=estimate.value - margin, high=estimate.value + margin)


def around_metric(estimate: Estimate, metric: Metric) -> Interval:
    """The interval of an estimate of a metric, at least ± 3 / samples where samples are counted.

    That is where a sample lies between 0 and 1, and each is 0 or 1, or all are equal. Samples that
    agree have no spread, and none is no proof: where none of n samples failed, as many as 3 in n
    may fail with 95 % confidence, for (1 − 3 / n)^n is about 0.05 (the rule of three; Hanley and
    Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249, 1983). One failure
    among many leaves too narrow an interval as well, so that the least width holds for it too.
    """
    interval = around(estimate, metric.samples)
    decided = bool(metric.values) and {*metric.values} <= {0.0, 1.0}
    counted = decided or estimate.standard_error < NO_ERROR
    if not counted or not is_bounded(metric.name, metric.values):
        return interval
    least = 3 / max(metric.samples, 1)
    value = interval.value
    return Interval(
        value=value, low=min(interval.low, value - least), high=max(interval.high, value + least)
    )


def around_share(estimate: Estimate, metric: Metric) -> Interval:
    """The same of a value, not a difference: a mean of samples between 0 and 1 lies there too."""
    interval = around_metric(estimate, metric)
    if not metric.values or not all(0 <= value <= 1 for value in metric.values):
        return interval
    return Interval(value=interval.value, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def standard_error(interval: Interval, samples: int | None) -> float:
    """The standard error of a 95 % interval over so many samples; None stands for very many."""
    errors = NORMAL_95 if samples is None else student_95(max(samples - 1, 1))
    return (interval.high - interval.low) / (2 * errors)


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
    return around(Estimate(value=float(gaps.mean()), standard_error=error), gaps.size)


def unpaired_difference(new: Estimate, old: Estimate, samples: int) -> Interval:
    """New − old as if of independent samples: rather too wide where they share samples.

    The correlation of the same text under two builds is not negative in practice; that is what
    makes it the careful side. `samples` is the smaller number of both, whose degrees of freedom are
    the fewest that the difference can have (Welch).
    """
    error = math.hypot(new.standard_error, old.standard_error)
    return around(Estimate(value=new.value - old.value, standard_error=error), samples)


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
    return Interval(
        value=math.exp(value), low=math.exp(value - below), high=math.exp(value + above)
    )


def negated(interval: Interval) -> Interval:
    """The interval of the negative."""
    # From zero, because -0.0 reads like something.
    return Interval(value=0.0 - interval.value, low=0.0 - interval.high, high=0.0 - interval.low)


def judge(worse: Interval, limit: float) -> Verdict:
    """Pass where the whole interval keeps the limit, fail where none of it does."""
    if worse.high <= limit:
        return "pass"
    return "fail" if worse.low > limit else "inconclusive"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Fail if any fails, else inconclusive if any is, else pass."""
    return max(verdicts, key=_BADNESS.index, default="pass")


def _within(t: float, degrees: int) -> float:
    """Probability that Student's t lies between −t and t."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for i in range(2 + odd, degrees, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + sine * total * (degrees > 1))


def _medians(
    samples: Sequence[float], resamples: int, random: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    runs = np.asarray(samples, dtype=np.float64)
    draw = random.integers(0, runs.size, size=(resamples, runs.size))
    medians: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.median(runs[draw], axis=1)
    return medians


def _with_value(value: float, low: float, high: float) -> Interval:
    """An interval that holds its value, which may come from more runs than were resampled."""
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))
