"""Figures, changes and limits of accuracy in words, the same in every view."""

import math

from prox24_deploy.config.limits import MetricLimits
from prox24_deploy.core.metrics import ENGINE, is_bounded, is_in_percent, plain_name
from prox24_deploy.core.records import DirectMetric, Estimate, Interval, Metric, PairedMetric


def said(name: str) -> str:
    """The name of a figure as a sentence has it."""
    if not name.startswith(ENGINE):
        return name
    return f"{plain_name(name)} through {name.split('/')[1]}"


def change_in_words(name: str, metric: Metric) -> str:
    """What became of a metric: "perplexity +187 %, 11.70 → 33.60, 64 samples"."""
    samples = f"{metric.samples:,} sample" + ("" if metric.samples == 1 else "s")
    if isinstance(metric, PairedMetric) and metric.dense and metric.sparse:
        before, after = metric.dense.value, metric.sparse.value
        moved = signed(name, metric, after - before)
        return f"{said(name)} {moved}, {digits(before)} → {digits(after)}, {samples}"
    if isinstance(metric, DirectMetric) and metric.agreement:
        return f"{said(name)} {digits(metric.agreement.value)}, {samples}"
    return f"{said(name)} is not a finite number"


def signed(name: str, metric: Metric, difference: float) -> str:
    """A difference to the dense model: of perplexity in percent, of shares in points."""
    if is_in_percent(name) and metric.dense:
        text = f"{100 * difference / metric.dense.value:+.3g} %"
    elif is_bounded(name, metric.values):
        text = f"{100 * difference:+.3g} points"
    else:
        text = f"{difference:+.3g}"
    return text.replace("-", "−")


def interval_in_words(name: str, metric: Metric, interval: Interval) -> str:
    """A 95 % interval of a difference, or of the value of a direct metric."""
    if isinstance(metric, PairedMetric):
        ends = [signed(name, metric, end) for end in (interval.low, interval.high)]
    else:
        ends = [digits(end) for end in (interval.low, interval.high)]
    return f"95 % interval {ends[0]} to {ends[1]}"


def digits(value: float) -> str:
    """Four significant digits, the zeros among them."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:#.4g}".rstrip(".").replace("-", "−")


def with_error(estimate: Estimate) -> str:
    """A value with its standard error, for a message."""
    return f"{estimate.value:.4g} ± {estimate.standard_error:.2g}"


def limits_in_words(limits: MetricLimits, *, higher_is_better: bool, than: str = "") -> str:
    """Every limit that is given, as a reader of a table wants it; `than` says worse than what."""
    bound = "at least" if higher_is_better else "at most"
    zero = limits.max_degradation == 0
    words = {
        f"{bound} {{:g}}": limits.threshold,
        f"no worse{than}" if zero else f"at most {{:g}} worse{than}": limits.max_degradation,
        f"at most {{:g}} % worse{than}": limits.max_degradation_percent,
        f"at most {{:g}} standard errors worse{than}": limits.max_degradation_standard_errors,
        f"at least {{:g}} better{than}": limits.min_improvement,
    }
    return ", ".join(text.format(value) for text, value in words.items() if value is not None)
