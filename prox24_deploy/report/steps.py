"""What a model scored after each step that was done to it, from the dense one to what ships."""

from dataclasses import dataclass

from prox24_deploy.core.records import DirectMetric, Estimate, Metric
from prox24_deploy.report.schema import Report

_PRUNED = "2:4"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One metric, in the order of `step_titles`; None where a model has no figure of its own."""

    name: str
    higher_is_better: bool
    cells: tuple[Estimate | None, ...]


def step_titles(report: Report) -> tuple[str, ...]:
    """The dense model, then every step; empty where there is but one step."""
    if not report.accuracy.steps:
        return ()
    form = report.quantization.format.upper() if report.quantization else ""
    if not report.pruning.totals.pruned:
        return ("dense", form)
    # Each block is fed by those that were reconstructed before it: there is no model without.
    pruned = f"{_PRUNED}, reconstructed" if report.pruning.reconstructed else _PRUNED
    steps = [pruned] if report.recovery is None else [pruned, f"{pruned}, recovered"]
    return ("dense", *steps, *([f"{steps[-1]} + {form}"] if form else []))


def step_rows(report: Report) -> tuple[StepRow, ...]:
    """Every metric of the PyTorch models along the way."""
    if not report.accuracy.steps:
        return ()
    # Where nothing was pruned, that step is the dense model.
    pruned = report.accuracy.steps if report.pruning.totals.pruned else ()
    ways = [*(step.metrics for step in pruned), report.accuracy.metrics]
    return tuple(_row(metrics) for metrics in zip(*ways, strict=True))


def _row(metrics: tuple[Metric, ...]) -> StepRow:
    last = metrics[-1]
    own = [m.agreement if isinstance(m, DirectMetric) else m.sparse for m in metrics]
    return StepRow(name=last.name, higher_is_better=last.higher_is_better, cells=(last.dense, *own))
