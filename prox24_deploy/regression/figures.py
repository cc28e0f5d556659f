"""The figures of a report that can be held against those of another, each under one name."""

from collections.abc import Iterator
from dataclasses import dataclass

from prox24_deploy.core.intervals import (
    FEWEST,
    around_share,
    exactly,
    map_interval,
    median_interval,
    median_ratio_interval,
    negated,
    paired_difference,
    ratio_of_intervals,
    unpaired_difference,
)
from prox24_deploy.core.records import Estimate, Interval, LatencyRow
from prox24_deploy.report.against_dense import Group, groups_of
from prox24_deploy.report.schema import ChangeKind, Report

# Of kinds of figures that have one, which a name begins with.
_UNITS: dict[str, str] = {"speed-up": "×", "latency": "ms", "size": "bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: what it is called, its value with a 95 % interval, and which way is better.

    `gated` says that the limits of the recipe apply: they leave alone what cannot be worse, the
    latency of a backend that has no sparse kernels and the size of an engine that is but a record.
    `estimate` and `samples` are there for accuracy, `values` has its value per sample, or for
    latency the milliseconds of the runs that were kept.
    """

    name: str
    kind: ChangeKind
    unit: str
    higher_is_better: bool
    value: Interval
    gated: bool = True
    estimate: Estimate | None = None
    values: tuple[float, ...] = ()
    samples: int | None = None

    @property
    def decides(self) -> bool:
        """Whether it is of samples enough to be judged."""
        return self.samples is None or self.samples >= FEWEST


def figures_of(report: Report) -> dict[str, Figure]:
    """Every figure of a report by name; one that is not known or not finite is absent."""
    figures = (
        *_accuracy(report),
        *(figure for row in report.latency for figure in _latency(row)),
        *_sizes(report),
        *_counts(report),
    )
    return {figure.name: figure for figure in figures}


def unit_of(name: str) -> str:
    """The unit of a figure by its name, "" for none."""
    return _UNITS.get(name.partition("/")[0], "")


def metric_groups(report: Report) -> tuple[Group, ...]:
    """The metrics of a report as they were judged."""
    accuracy = report.accuracy
    return groups_of(accuracy.metrics, accuracy.engines, accuracy.tasks)


def row_path(row: LatencyRow) -> str:
    """Backend, graph of two, and shape of a latency row, as in names of figures."""
    graph = "" if row.graph == "model" else f"{row.graph}/"
    sequence = f",sequence={row.sequence}" if row.sequence else ""
    past = f",past={row.past}" if row.past else ""
    return f"{row.backend}/{graph}batch={row.batch}{sequence}{past}"


def worsening(new: Figure, old: Figure, *, paired: bool) -> Interval:
    """How much worse the new figure is, in its unit; negative where it is better.

    `paired` says that accuracy was measured on the same samples.
    """
    if new.kind == "speed-up":
        return _scaled(ratio_of_intervals(new.value, old.value), old.value.value, better=True)
    if new.kind == "latency":
        ratio = median_ratio_interval(new.values, old.values, new.value.value / old.value.value)
        return _scaled(ratio, old.value.value, better=False)
    if new.estimate and old.estimate:
        both = len(new.values) == len(old.values) and len(new.values) > 1
        difference = (
            paired_difference(new.values, old.values)
            if paired and both
            else unpaired_difference(
                new.estimate, old.estimate, min(new.samples or 1, old.samples or 1)
            )
        )
    else:
        difference = exactly(new.value.value - old.value.value)
    return negated(difference) if new.higher_is_better else difference


def without_drift(before: Figure, speed: Figure, speed_before: Figure) -> Interval:
    """How much worse a latency than `before` is once the change of its dense twin is taken out.

    The twins ran in turns, so what slows the whole machine is in both and not in their ratio.
    """
    ratio = ratio_of_intervals(speed_before.value, speed.value)
    return _scaled(ratio, before.value.value, better=False)


def _scaled(ratio: Interval, old: float, *, better: bool) -> Interval:
    """A ratio new / old as an amount by which the new value is worse."""
    change = map_interval(lambda part: old * (part - 1), ratio)
    return negated(change) if better else change


def _accuracy(report: Report) -> Iterator[Figure]:
    for group in metric_groups(report):
        for metric in group.metrics:
            found = metric.estimate
            if found is not None:
                yield Figure(
                    name=group.prefix + metric.name,
                    kind="accuracy",
                    unit="",
                    higher_is_better=metric.higher_is_better,
                    value=around_share(found, metric),
                    estimate=found,
                    values=metric.values,
                    samples=metric.samples,
                )


def _latency(row: LatencyRow) -> Iterator[Figure]:
    path, timing = row_path(row), row.sparse
    yield Figure(
        name=f"speed-up/{path}",
        kind="speed-up",
        unit=_UNITS["speed-up"],
        higher_is_better=True,
        value=row.speedup,
        gated=row.gated,
    )
    yield Figure(
        name=f"latency/{path}",
        kind="latency",
        unit=_UNITS["latency"],
        higher_is_better=False,
        value=median_interval(timing.samples_ms, timing.median_ms),
        gated=row.gated,
        values=timing.samples_ms,
    )


def _sizes(report: Report) -> Iterator[Figure]:
    sizes = {
        "size/onnx sparse": report.sizes.onnx_sparse_bytes,
        "size/packed": report.sizes.packed_bytes,
    }
    records = set()
    for evidence in report.sparsity.engines:
        prefix = f"engines/{evidence.backend}/sparse/"
        files = {n: size for n, size in report.sizes.files.items() if n.startswith(prefix)}
        # A log is as long as the builder is talkative.
        engine = {name: size for name, size in files.items() if not name.endswith(".log")}
        if engine:
            sizes[f"size/engine {evidence.backend}"] = sum(engine.values())
            # Where the ONNX file is what runs, there is but a record of it.
            if all(name.endswith(".json") for name in engine):
                records.add(f"size/engine {evidence.backend}")
    for name, size in sizes.items():
        yield Figure(
            name=name,
            kind="size",
            unit=_UNITS["size"],
            higher_is_better=False,
            value=exactly(size),
            gated=name not in records,
        )


def _counts(report: Report) -> Iterator[Figure]:
    proven = sum(check.expected and check.is_24 for check in report.sparsity.tensors)
    counts = {"pruned": report.pruning.totals.pruned, "proven": proven}
    for name, count in counts.items():
        yield Figure(
            name=f"layers/{name}",
            kind="layers",
            unit="",
            higher_is_better=True,
            value=exactly(count),
        )
    for evidence in report.sparsity.engines:
        if evidence.chosen is not None:
            chosen = exactly(evidence.chosen)
            yield Figure(
                name=f"kernels/{evidence.backend}",
                kind="kernels",
                unit="",
                higher_is_better=True,
                value=chosen,
            )
