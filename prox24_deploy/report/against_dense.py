"""Hold accuracy to that of the dense model: a verdict for every metric; pure.

A limit passes where the whole 95 % interval keeps it, fails where none of it does, and is
inconclusive in between. Both models saw the same samples, so the interval is that of the paired
difference, where the metric has one. A metric without a limit informs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prox24_deploy.config.limits import MetricLimits, MetricTable, dense_limits_of
from prox24_deploy.core.accuracy import EngineAccuracy, TaskScores
from prox24_deploy.core.intervals import (
    FEW,
    FEWEST,
    around_metric,
    around_share,
    exactly,
    judge,
    map_interval,
    negated,
    unpaired_difference,
    worst,
)
from prox24_deploy.core.metrics import ENGINE, HARNESS, limit_scale
from prox24_deploy.core.records import DirectMetric, Estimate, Interval, Metric, PairedMetric
from prox24_deploy.core.types import Verdict
from prox24_deploy.report.schema import Check
from prox24_deploy.report.wording import (
    change_in_words,
    interval_in_words,
    limits_in_words,
)

# More samples than that many times those at hand are no advice.
_MOST_MORE = 1000


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics measured together; `prefix` is what their figures are called by before the name."""

    prefix: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A metric with its check; `wanted` is how many samples would decide it where it is open."""

    metric: Metric
    group: Group
    check: Check
    wanted: int | None = None


def by_name(groups: Sequence[Group]) -> dict[str, Metric]:
    """Metrics by the names of their figures."""
    return {group.prefix + metric.name: metric for group in groups for metric in group.metrics}


def groups_of(
    metrics: tuple[Metric, ...], engines: Sequence[EngineAccuracy], tasks: TaskScores | None
) -> tuple[Group, ...]:
    """The metrics through PyTorch, through every engine, and of the harness."""
    return (
        Group("", metrics),
        *(Group(f"{ENGINE}{engine.backend}/", engine.metrics) for engine in engines),
        *((Group(HARNESS, tasks.metrics),) if tasks else ()),
    )


def judge_metrics(groups: Sequence[Group], table: MetricTable) -> tuple[Judged, ...]:
    """One for each metric of each group, by the limits of a table against the dense model."""
    return tuple(_judged(metric, group, table) for group in groups for metric in group.metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """A metric where it is judged: perplexity by its logarithm, any other as it is.

    `worse` says how much worse the sparse model is than the dense one, with `error` as its standard
    error, and is None for a metric that compares the two directly. `value` is that of the sparse
    model, or of the comparison.
    """

    higher_is_better: bool
    value: Interval
    worse: Interval | None = None
    error: float = 0.0
    dense: float | None = None
    logarithmic: bool = False

    def step(self, amount: float) -> float:
        """How far `amount` of the metric, from the dense value on, is on this scale."""
        if not self.logarithmic or self.dense is None:
            return amount
        share = amount / self.dense
        return math.log1p(share) if share > -1 else -math.inf

    def place(self, value: float) -> float:
        """Where a value of the metric lies on this scale."""
        if not self.logarithmic:
            return value
        return math.log(value) if value > 0 else -math.inf

    def shown(self, interval: Interval) -> Interval:
        """An interval of `worse` as a difference sparse − dense in units of the metric."""
        if not self.logarithmic or self.dense is None:
            return negated(interval) if self.higher_is_better else interval
        dense = self.dense
        return map_interval(lambda worse: dense * math.expm1(worse), interval)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """One limit: its verdict, the value of the metric that it allows, and how far away it is.

    `distance` is that of the point estimate from the limit and `margin` the half of the interval
    that looks at it, both on the scale of the metric.
    """

    verdict: Verdict
    allowed: float | None
    distance: float = 0.0
    margin: float = 0.0


def _judged(metric: Metric, group: Group, table: MetricTable) -> Judged:
    name = group.prefix + metric.name
    change = change_in_words(name, metric)
    if not _is_finite(metric):
        return Judged(
            metric=metric, group=group, check=_check(name, None, None, "fail", _broken(metric))
        )
    value = _value(metric)
    limits = dense_limits_of(table, name)
    if limits is None:
        told = f"{change}; not gated, it informs"
        return Judged(
            metric=metric, group=group, check=_check(name, value, None, "not gated", told)
        )
    words = limits_in_words(limits, higher_is_better=metric.higher_is_better, than=" than dense")
    scale = _scale(metric, group)
    bounds = list(_bounds(limits, scale))
    if (scale.worse is None and limits.threshold is None) or not bounds:
        told = (
            f"{change}; limit: {words}, which does not apply to a metric that compares the models "
            "directly; give a threshold"
        )
        return Judged(
            metric=metric, group=group, check=_check(name, value, None, "inconclusive", told)
        )
    allowed = _strictest(bounds, metric)
    if metric.samples < FEWEST:
        told = f"{change}; limit: {words}; fewer than {FEWEST} samples decide nothing"
        return Judged(
            metric=metric,
            group=group,
            check=_check(name, value, allowed, "inconclusive", told),
            wanted=FEW,
        )
    verdict = worst(bound.verdict for bound in bounds)
    told = f"{change}; {_interval(name, metric, scale)}; limit: {words}"
    wanted = _wanted(bounds, metric.samples) if verdict == "inconclusive" else None
    return Judged(
        metric=metric, group=group, check=_check(name, value, allowed, verdict, told), wanted=wanted
    )


def _check(
    name: str, value: float | None, limit: float | None, verdict: Verdict | str, message: str
) -> Check:
    return Check.model_validate(
        {
            "name": name,
            "part": "accuracy",
            "kind": "accuracy",
            "value": value,
            "limit": limit,
            "verdict": verdict,
            "message": message,
        }
    )


def _is_finite(metric: Metric) -> bool:
    """Whether it has all that it should have, and numbers; a report has None for any other."""
    direct = isinstance(metric, DirectMetric)
    estimates = (metric.agreement,) if direct else (metric.dense, metric.sparse)
    return all(
        e is not None and math.isfinite(e.value) and math.isfinite(e.standard_error)
        for e in estimates
    )


def _broken(metric: Metric) -> str:
    known: dict[str, Estimate | None] = {"agreement": metric.agreement}
    if isinstance(metric, PairedMetric):
        known = {"dense": metric.dense, "sparse": metric.sparse}
    figures = ", ".join(f"{key} {part.value:.4g}" for key, part in known.items() if part)
    return f"{figures or metric.name}; a figure is not finite"


def _value(metric: Metric) -> float | None:
    return metric.estimate.value if metric.estimate else None


def _scale(metric: Metric, group: Group) -> _Scale:
    if isinstance(metric, DirectMetric):
        value = around_share(_given(metric.agreement, metric), metric)
        return _Scale(higher_is_better=metric.higher_is_better, value=value)
    pairs = [m for m in group.metrics if isinstance(m, PairedMetric)]
    logs = next((m for m in pairs if m.name == limit_scale(metric.name)), None)
    logarithmic = logs is not None and logs.difference is not None
    found = logs if logs and logarithmic else metric
    dense, sparse = _given(found.dense, found), _given(found.sparse, found)
    if found.difference:
        error = found.difference.standard_error
        difference = around_metric(found.difference, found)
    else:
        error = math.hypot(dense.standard_error, sparse.standard_error)
        difference = unpaired_difference(sparse, dense, found.samples)
    return _Scale(
        higher_is_better=metric.higher_is_better,
        value=around_share(sparse, found),
        worse=negated(difference) if metric.higher_is_better else difference,
        error=error,
        dense=_given(metric.dense, metric).value,
        logarithmic=logarithmic,
    )


def _given(estimate: Estimate | None, metric: Metric) -> Estimate:
    """A figure of a metric that `_is_finite`."""
    if estimate is None:
        raise ValueError(f"metric {metric.name} lacks a figure")
    return estimate


def _bounds(limits: MetricLimits, scale: _Scale) -> Iterator[_Bound]:
    """Every limit that is given and applies."""
    if limits.threshold is not None:
        value, bound = scale.value, scale.place(limits.threshold)
        if scale.higher_is_better:
            value, bound = negated(value), -bound
        yield _bound(value, bound, limits.threshold)
    if scale.worse is None or scale.dense is None:
        return
    amounts = [
        limits.max_degradation,
        None
        if limits.max_degradation_percent is None
        else limits.max_degradation_percent / 100 * abs(scale.dense),
        None if limits.min_improvement is None else -limits.min_improvement,
    ]
    for amount in amounts:
        if amount is not None:
            allowed = scale.dense - amount if scale.higher_is_better else scale.dense + amount
            yield _bound(scale.worse, scale.step(amount), allowed)
    if limits.max_degradation_standard_errors is not None:
        # The limit is a statement about noise already.
        bound = limits.max_degradation_standard_errors * scale.error
        yield _Bound(verdict=judge(exactly(scale.worse.value), bound), allowed=None)


def _bound(worse: Interval, bound: float, allowed: float) -> _Bound:
    distance = abs(worse.value - bound)
    margin = worse.high - worse.value if worse.value <= bound else worse.value - worse.low
    return _Bound(verdict=judge(worse, bound), allowed=allowed, distance=distance, margin=margin)


def _strictest(bounds: Sequence[_Bound], metric: Metric) -> float | None:
    allowed = [bound.allowed for bound in bounds if bound.allowed is not None]
    if not allowed:
        return None
    return max(allowed) if metric.higher_is_better else min(allowed)


def _interval(name: str, metric: Metric, scale: _Scale) -> str:
    found = scale.value if scale.worse is None else scale.shown(scale.worse)
    return interval_in_words(name, metric, found)


def _wanted(bounds: Sequence[_Bound], samples: int) -> int | None:
    """Samples with which the interval would no longer hold a limit, were all else the same.

    An interval narrows with the root of the samples.
    """
    open_bounds = [bound for bound in bounds if bound.verdict == "inconclusive"]
    ratios = [
        bound.margin / bound.distance if bound.distance else math.inf for bound in open_bounds
    ]
    more = max(ratios, default=math.inf) ** 2
    return max(FEW, math.ceil(samples * more)) if more <= _MOST_MORE else None
