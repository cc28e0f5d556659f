"""Tables of a report: how a row is read, without the columns that say nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from prox24_deploy.core.accuracy import ParityCheck
from prox24_deploy.core.quantized import LayerQuantization
from prox24_deploy.core.records import (
    EngineEvidence,
    LatencyRow,
    LayerEvidence,
    LayerRecord,
    Metric,
    TensorCheck,
    Timing,
)
from prox24_deploy.report.formats import (
    TINY,
    amount,
    departure,
    estimate,
    known,
    number,
    pace,
    percent,
    ratio,
    seconds,
    shape,
)
from prox24_deploy.report.schema import Change, Check

Row = TypeVar("Row")
# What a cell without a figure shows.
DASH = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column(Generic[Row]):
    """One column: its title, how a row is read, and the class of its cells in the style sheet."""

    title: str
    read: Callable[[Row], str]
    style: str = ""
    # A class that depends on the row, such as its verdict.
    judge: Callable[[Row], str] = lambda _: ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one cell shows, under which title, and its classes."""

    title: str
    text: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table as it is shown."""

    titles: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceGroup:
    """Layers of which an engine made the same, for the same reason."""

    names: tuple[str, ...]
    eligible: bool | None
    chosen: bool | None
    reason: str


def grid(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> Grid:
    """The table of some rows, without the columns that are empty in all of them."""
    texts = {column.title: [column.read(row) for row in rows] for column in columns}
    kept = [
        column
        for place, column in enumerate(columns)
        if place == 0 or any(text not in {"", DASH} for text in texts[column.title])
    ]
    return Grid(
        titles=tuple((column.title, column.style) for column in kept),
        rows=tuple(
            tuple(
                Cell(
                    title=column.title,
                    text=texts[column.title][place],
                    style=" ".join(filter(None, (column.style, column.judge(row)))),
                )
                for column in kept
            )
            for place, row in enumerate(rows)
        ),
    )


def evidence_groups(engine: EngineEvidence) -> list[EvidenceGroup]:
    """Layers of an engine with one fate and one reason in one row, in the order of the first."""
    groups: dict[tuple[bool | None, bool | None, str], list[LayerEvidence]] = {}
    for layer in engine.layers:
        groups.setdefault((layer.eligible, layer.chosen, layer.reason), []).append(layer)
    return [
        EvidenceGroup(
            names=tuple(layer.module for layer in layers),
            eligible=eligible,
            chosen=chosen,
            reason=reason,
        )
        for (eligible, chosen, reason), layers in groups.items()
    ]


def changes(rows: Sequence[Change]) -> Grid:
    """Every figure against the baseline."""
    return grid(
        (
            Column(title="Figure", read=lambda c: c.name, style="name"),
            Column(title="Baseline", read=lambda c: amount(c.before, c.unit), style="n"),
            Column(title="This build", read=lambda c: amount(c.after, c.unit), style="n"),
            Column(title="Limit", read=lambda c: c.limits, style="limit"),
            Column(title="Verdict", read=lambda c: c.verdict, judge=lambda c: _class(c.verdict)),
            Column(title="Finding", read=lambda c: c.message, style="reason"),
        ),
        rows,
    )


def metrics(rows: Sequence[Metric], name: str = "Metric", samples: str = "Samples") -> Grid:
    """Metrics of a dense and a sparse model; `samples` is what they are counted in."""
    return grid(
        (
            Column(title=name, read=lambda m: m.name),
            Column(title="Better", read=_better),
            Column(title=samples, read=lambda m: f"{m.samples:,}", style="n"),
            Column(title="Dense", read=lambda m: estimate(m.dense), style="n"),
            Column(title="Sparse", read=lambda m: estimate(m.sparse), style="n"),
            Column(title="Difference", read=lambda m: estimate(m.difference), style="n"),
            Column(title="Agreement", read=lambda m: estimate(m.agreement), style="n"),
        ),
        rows,
    )


def parity(rows: Sequence[ParityCheck]) -> Grid:
    """Each engine against PyTorch."""
    return grid(
        (
            Column(title="Engine", read=lambda p: p.twin),
            Column(title="Metric", read=lambda p: p.metric),
            Column(title="PyTorch", read=lambda p: estimate(p.torch), style="n"),
            Column(title="Through it", read=lambda p: estimate(p.engine), style="n"),
            Column(
                title="Difference or agreement",
                read=lambda p: departure(p.change, within=p.passed is True),
                style="n",
            ),
            Column(title="Deviation", read=_deviation, style="n"),
            Column(title="At most", read=lambda p: number(p.tolerance), style="n"),
            Column(
                title="Verdict", read=_parity_verdict, judge=lambda p: _class(_parity_verdict(p))
            ),
        ),
        rows,
    )


def latency(rows: Sequence[LatencyRow]) -> Grid:
    """Dense against sparse, shape by shape; the verdict where a narrow page still shows it."""
    return grid(
        (
            Column(title="Backend", read=lambda r: f"{r.engine}, {r.dtype}"),
            Column(title="Batch", read=lambda r: str(r.batch), style="n"),
            Column(title="Sequence", read=lambda r: str(r.sequence or DASH), style="n"),
            Column(title="Past", read=lambda r: str(r.past or DASH), style="n"),
            Column(title="Dense median", read=lambda r: _ms(r.dense.median_ms), style="n"),
            Column(title="Sparse median", read=lambda r: _ms(r.sparse.median_ms), style="n"),
            Column(title="Sparse p99", read=lambda r: _ms(r.sparse.p99_ms), style="n"),
            Column(title="Speed-up", read=lambda r: ratio(r.speedup), style="n pair"),
            Column(title="At least", read=lambda r: f"{1 / (1 + r.limit):.3f}", style="n"),
            Column(title="Verdict", read=lambda r: r.verdict, judge=lambda r: _class(r.verdict)),
            Column(title="Tokens/s, dense", read=lambda r: _pace(r, r.dense), style="n"),
            Column(title="Tokens/s, sparse", read=lambda r: _pace(r, r.sparse), style="n"),
            Column(title="Per token, sparse", read=_per_token, style="n"),
        ),
        rows,
    )


def layers(rows: Sequence[LayerRecord]) -> Grid:
    """What happened to each layer."""
    return grid(
        (
            Column(title="Layer", read=lambda r: r.name, style="name"),
            Column(title="Shape", read=lambda r: shape(r.shape), style="n"),
            Column(title="Status", read=lambda r: r.status),
            Column(title="Calibration", read=lambda r: number(r.relative_error), style="n"),
            Column(title="Held out", read=lambda r: number(r.held_out_error), style="n"),
            Column(title="Iterations", read=lambda r: str(r.iterations or DASH), style="n"),
            Column(title="Time", read=_duration, style="n"),
            Column(title="Reason", read=lambda r: r.reason),
        ),
        rows,
    )


def tensors(rows: Sequence[TensorCheck]) -> Grid:
    """The proof of 2:4 on the exported files."""
    return grid(
        (
            Column(title="Module", read=lambda c: c.module or DASH, style="name"),
            Column(title="Tensor", read=lambda c: c.tensor + c.part, style="name"),
            Column(title="Consumer", read=lambda c: c.op_type),
            Column(title="Type", read=lambda c: c.dtype),
            Column(title="Shape", read=lambda c: shape(c.shape), style="n"),
            Column(title="Axis", read=lambda c: str(c.axis), style="n"),
            Column(title="Density", read=lambda c: percent(c.density), style="n"),
            Column(title="Declared", read=lambda c: known(c.expected)),
            Column(
                title="2:4",
                read=lambda c: known(c.is_24),
                judge=lambda c: "fail" if c.expected and not c.is_24 else "",
            ),
            Column(title="Reason", read=lambda c: c.reason),
            Column(title="Eligible", read=lambda c: known(c.eligible)),
            Column(title="Why not eligible", read=lambda c: c.ineligible_reason),
        ),
        rows,
    )


def checks(rows: Sequence[Check]) -> Grid:
    """Everything that was checked."""
    return grid(
        (
            Column(title="Check", read=lambda c: c.kind),
            Column(title="Name", read=lambda c: c.name, style="name"),
            Column(title="Verdict", read=lambda c: c.verdict, judge=lambda c: _class(c.verdict)),
            Column(title="Finding", read=lambda c: c.message),
        ),
        rows,
    )


def quantized(rows: Sequence[LayerQuantization]) -> Grid:
    """What quantisation did to each layer."""

    def done(text: Callable[[LayerQuantization], str]) -> Callable[[LayerQuantization], str]:
        return lambda row: DASH if row.error is None else text(row)

    return grid(
        (
            Column(title="Layer", read=lambda q: q.name, style="name"),
            Column(title="Largest input", read=done(lambda q: number(q.largest)), style="n"),
            Column(title="Clipped from", read=done(lambda q: number(q.limit)), style="n"),
            Column(title="Clipped", read=done(lambda q: f"{number(100 * q.clipped)} %"), style="n"),
            Column(title="Range by", read=done(lambda q: q.chosen_by)),
            Column(title="Weights", read=done(lambda q: q.rounding)),
            Column(title="Error", read=done(lambda q: number(q.error)), style="n"),
            Column(title="If nearest", read=done(lambda q: number(q.nearest_error)), style="n"),
            Column(title="Scales moved into", read=lambda q: q.moved_into or DASH, style="name"),
            Column(title="Output", read=_output, style="reason"),
            Column(title="Left in 16 bits", read=lambda q: q.reason or DASH, style="reason"),
        ),
        rows,
    )


def _output(row: LayerQuantization) -> str:
    """What became of the output of a quantised layer."""
    if row.output_limit:
        return f"clipped from {number(row.output_limit)}, {row.output_chosen_by}"
    return f"not rounded: {row.output_reason}" if row.output_reason else DASH


def _better(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def _deviation(found: ParityCheck) -> str:
    small = found.passed is True and (found.tolerance or 0) >= TINY
    return f"< {TINY:g}" if small and 0 < (found.deviation or 0) < TINY else number(found.deviation)


def _parity_verdict(found: ParityCheck) -> str:
    if found.passed is None:
        return "not gated"
    return "pass" if found.passed else "fail"


def _parity_class(found: ParityCheck) -> str:
    return _class(_parity_verdict(found))


def _ms(value: float | None) -> str:
    return DASH if value is None else f"{number(value)} ms"


def _pace(row: LatencyRow, twin: Timing) -> str:
    return pace(row.tokens_per_second(twin))


def _per_token(row: LatencyRow) -> str:
    return _ms(row.ms_per_token(row.sparse))


def _duration(layer: LayerRecord) -> str:
    return seconds(layer.seconds) if layer.seconds else DASH


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")
