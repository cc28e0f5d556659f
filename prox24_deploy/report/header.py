"""What a reader sees first: the verdict in four tiles, and the figures as changes."""

from collections.abc import Sequence
from dataclasses import dataclass

from prox24_deploy.core.records import DirectMetric, Metric, PairedMetric
from prox24_deploy.core.types import Judgement
from prox24_deploy.report.formats import estimate
from prox24_deploy.report.schema import Check, Report
from prox24_deploy.report.wording import digits, signed

# Of the metrics that compare both models directly, as many stand in the header.
_MOST_FIGURES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One part of the verdict: its colour follows from `verdict`, and `line` says of what."""

    name: str
    verdict: Judgement
    line: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of accuracy as a change, and what it is made of."""

    title: str
    change: str
    note: str


def tiles_of(report: Report) -> tuple[Tile, ...]:
    """The four parts in the order of the stages."""
    lines = {
        "sparsity": _proven(report),
        "export": _compared(report.checks),
        "accuracy": _gated_by(report.checks),
        "speed": _timed_on(report),
    }
    return tuple(
        Tile(name=name, verdict=part.verdict, line=lines[name], reason=part.reason)
        for name, part in report.parts.by_name().items()
    )


def figures_of(report: Report) -> tuple[Figure, ...]:
    """The headline, and beside one that compares the models directly the next that does.

    That is nearest-neighbour agreement for models that embed.
    """
    first, *others = report.accuracy.metrics
    found = [first]
    if isinstance(first, DirectMetric):
        found += [m for m in others if isinstance(m, DirectMetric)][: _MOST_FIGURES - 1]
    return tuple(map(_figure, found))


def _figure(metric: Metric) -> Figure:
    better = "higher" if metric.higher_is_better else "lower"
    title = f"{metric.name}, {better} is better"
    samples = f"{metric.samples:,} sample" + ("" if metric.samples == 1 else "s")
    if isinstance(metric, PairedMetric) and metric.dense and metric.sparse:
        before, after = metric.dense.value, metric.sparse.value
        moved = signed(metric.name, metric, after - before)
        return Figure(
            title=title,
            change=f"{moved}, {digits(before)} → {digits(after)}",
            note=f"dense {estimate(metric.dense)}, sparse {estimate(metric.sparse)}, {samples}",
        )
    note = f"sparse against dense, {samples}"
    return Figure(title=title, change=estimate(metric.agreement), note=note)


def _proven(report: Report) -> str:
    expected = [check for check in report.sparsity.tensors if check.expected]
    if not expected:
        return "nothing was pruned"
    return f"{sum(check.is_24 for check in expected)} of {len(expected)} weights proven 2:4"


def _compared(checks: Sequence[Check]) -> str:
    held = [c for c in checks if c.part == "export" and c.gated]
    if not held:
        return "not compared with PyTorch"
    good = sum(check.verdict == "pass" for check in held)
    return f"{good} of {len(held)} comparisons with PyTorch hold"


def _gated_by(checks: Sequence[Check]) -> str:
    """By what accuracy is gated: limits against the dense model, and figures of a baseline."""
    own = [check for check in checks if check.part == "accuracy" and check.gated]
    against = sum(check.kind == "baseline" for check in own)
    dense = sum(check.kind == "accuracy" for check in own)
    said = [
        f"{number} {noun}" + ("" if number == 1 else "s")
        for number, noun in ((dense, "limit"), (against, "figure"))
    ]
    gates = [f"{said[0]} against the dense model"] if dense else []
    gates += [f"{said[1]} of the baseline"] if against else []
    return f"gated by {' and '.join(gates)}" if gates else "not gated"


def _timed_on(report: Report) -> str:
    """The GPU on which engines with sparse kernels were timed, or what the baseline gates."""
    timed = [row for row in report.latency if row.gated]
    devices = list(dict.fromkeys(row.device for row in timed))
    if devices:
        dense = all(row.runs_dense(report.sparsity.engines) for row in timed)
        return f"measured on {' and '.join(devices)}{', no sparse kernel runs' if dense else ''}"
    held = sum(check.part == "speed" and check.gated for check in report.checks)
    figures = f"{held} figure{'' if held == 1 else 's'}"
    against = f"; gated by {figures} of the baseline" if held else ""
    return f"not measured on a GPU{against}"
