"""What the command line shows, as rich tables and lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from prox24_deploy.bundle.layout import PRUNED, RECOVERED
from prox24_deploy.cli.terminal import plain
from prox24_deploy.core.backends import NVFP4
from prox24_deploy.core.records import (
    ChannelOrder,
    Estimate,
    ExportResult,
    LatencyRow,
    LayerRecord,
    Metric,
    PairedMetric,
    TensorCheck,
)

# Ratio of sizes from which an estimate of a GEMM is far from what was measured.
_FAR = 4
# Of a name or a reason; a table of many rows has little room for one.
_MOST_OF_A_CELL = 600

if TYPE_CHECKING:
    from prox24_deploy.bundle.environment import Diagnosis
    from prox24_deploy.core.recovery import RecoverResult
    from prox24_deploy.core.rotation import RotateResult
    from prox24_deploy.engines.cusparselt.planning import LayerPlan, ModelTime, Plan
    from prox24_deploy.graph.check.judgement import CheckReport
    from prox24_deploy.regression.baseline import BaselineFile
    from prox24_deploy.report.assemble import Report
    from prox24_deploy.report.schema import Comparison


def metric_line(metric: Metric) -> str:
    """One accuracy figure with its standard errors."""
    estimates: dict[str, Estimate | None] = {"": metric.estimate}
    if isinstance(metric, PairedMetric):
        estimates = {
            "dense ": metric.dense,
            "sparse ": metric.sparse,
            "difference ": metric.difference,
        }
    parts = [label + _shown(estimate) for label, estimate in estimates.items() if estimate]
    return f"{metric.name}: {', '.join(parts)} ({metric.samples} samples)"


def report_head(report: "Report") -> list[str]:
    """What changed and whether it may ship, why, and the figures of a build."""
    totals = report.pruning.totals
    return [
        report.sentence,
        *(f"Accepted loss: {loss}" for loss in report.accepted_losses),
        *(
            f"  {name}: {part.verdict}. {part.reason}"
            for name, part in report.parts.by_name().items()
        ),
        f"Pruned: {totals.pruned} layers proven 2:4, {totals.skipped} left dense",
        *map(metric_line, report.accuracy.metrics),
        *step_lines(report),
        *(
            f"Through {engine.backend}: {metric_line(engine.metrics[0])}"
            for engine in report.accuracy.engines
        ),
        *map(metric_line, report.accuracy.tasks.metrics if report.accuracy.tasks else ()),
    ]


def step_lines(report: "Report") -> list[str]:
    """The headline after every step, and how much is quantised; nothing of a single step."""
    from prox24_deploy.report.steps import step_rows, step_titles

    rows = step_rows(report)
    if not rows:
        return []
    steps = [
        f"{title} {_shown(cell)}"
        for title, cell in zip(step_titles(report), rows[0].cells, strict=True)
        if cell
    ]
    found = f"{rows[0].name} {' → '.join(steps)}"
    if report.quantization is None:
        return [f"Step by step: {found}"]
    layers = report.quantization.layers
    done = sum(not layer.reason for layer in layers)
    form = report.quantization.format.upper()
    return [f"Quantised: {done} of {len(layers)} layers to {form}; {found}"]


def export_line(found: ExportResult, bundle: Path) -> str:
    """What is proven of the files, and how near to PyTorch they are, if that was compared."""
    proven = sum(check.expected and check.is_24 for check in found.sparsity)
    files = " and ".join(str(bundle / model.path) for model in found.sparse)
    differences = [check.max_abs_difference for check in found.numerics]
    near = (
        f"largest difference to PyTorch {max(differences):.2g}"
        if differences
        else f"not compared with PyTorch, for nothing runs {found.sparse[0].dtype} on a CPU"
    )
    return f"{proven} weights proven 2:4 in {files}; {near}."


def recovery_lines(found: "RecoverResult") -> list[str]:
    """How far a recovery came, on what, and what went wrong."""
    losses = [_figure(loss, ".4g") or "not known" for loss in (found.before, found.after)]
    lines = [
        f"Recovered: {found.loss} on withheld samples {' → '.join(losses)}, step {found.kept} of "
        f"{found.steps} kept, {found.seconds:.0f} s on {found.device}"
    ]
    if found.written:
        lines.append(
            f"Trained also on {found.written.tokens:,} tokens that the dense model wrote, "
            f"{found.written.samples} of {found.written.written} rows of which were usable"
        )
    return lines


def rotation_lines(found: "RotateResult") -> list[str]:
    """What rotating a model gave, a sentence each."""
    lines = [
        f"Residual stream of {found.channels} channels rotated: 2:4 now drops "
        f"{found.dropped_after:.1%} of what layers compute, where it dropped "
        f"{found.dropped_before:.1%}.",
        f"It computes what it did: predictions differ by {found.difference:.1g} of the largest in "
        f"float32. As stored they differ by {found.rounded:.1g}, and the most likely token is the "
        f"same at {found.agreement:.2%} of positions.",
    ]
    if found.gained:
        lines.append(
            "Note: The output layer shared the weights of the embeddings and now has its own, "
            f"{found.gained:,} weights more."
        )
    return lines


def order_lines(orders: Sequence[ChannelOrder]) -> list[str]:
    """How many layers read their channels in another order, and what that keeps."""
    moved = [order for order in orders if not order.reason]
    lines = [
        f"Note: {order.layer} reads its channels in their old order, because {order.reason}."
        for order in orders
        if order.reason
    ]
    if not moved:
        return lines
    before, after = (
        sum(kept or 0.0 for kept in share) / len(moved)
        for share in zip(*((order.kept_before, order.kept_after) for order in moved), strict=True)
    )
    return [
        *lines,
        f"Layers that read their channels in another order: {len(moved)}. Two of four keep "
        f"{after:.1%} of their score in it, not {before:.1%}, and the model computes what it did.",
    ]


def layers(records: Sequence[LayerRecord]) -> Table:
    """Relative output error of every pruned layer, and why a layer stayed dense."""
    table = _table("layer", "error", "held out", "note")
    for record in records:
        errors = [
            "" if error is None else f"{error:.4f}"
            for error in (record.relative_error, record.held_out_error)
        ]
        note = f"dense: {record.reason}" if record.reason else record.note
        _add_row(table, record.name, *errors, note)
    return table


def latency(rows: Sequence[LatencyRow]) -> Table:
    """Medians of both twins, their ratio with its interval, and p99 and pace of the sparse one."""
    headers = (
        "backend", "batch", "seq", "past", "dense ms", "sparse ms", "sparse p99", "speed-up",
        "95 %", "tokens/s", "ms/token",
    )  # fmt: skip
    return _without_empty(
        headers,
        [
            (
                row.engine,
                str(row.batch),
                str(row.sequence or ""),
                str(row.past or ""),
                f"{row.dense.median_ms:.2f}",
                f"{row.sparse.median_ms:.2f}",
                f"{row.sparse.p99_ms:.2f}",
                f"{row.speedup.value:.2f}×",
                f"{row.speedup.low:.2f}–{row.speedup.high:.2f}",
                _figure(row.tokens_per_second(row.sparse), ",.0f"),
                _figure(row.ms_per_token(row.sparse), ".4f"),
            )
            for row in rows
        ],
    )


def checks(tensors: Sequence[TensorCheck]) -> Table:
    """Every weight with one of three words: "yes", "no" and "not proven", the last two with why.

    "dense" and "not read" mark what need not be 2:4.
    """
    table = _table(
        "module or tensor", "type", "axis", "shape", "density", "2:4", "TensorRT eligible"
    )
    for tensor in tensors:
        _add_row(
            table,
            (tensor.module or tensor.tensor) + tensor.part,
            tensor.dtype,
            "" if tensor.axis < 0 else str(tensor.axis),
            "×".join(map(str, tensor.shape)),
            f"{tensor.density:.3f}",
            _proof(tensor),
            "yes" if tensor.eligible else f"no: {tensor.ineligible_reason}",
        )
    return table


def part_title(name: str) -> str:
    """What a part of a bundle is, above the table of its weights."""
    kind = "the model in PyTorch" if name in {PRUNED, RECOVERED} else "its sparse twin in ONNX"
    return f"{name}/, {kind}:"


def check_sentences(report: "CheckReport") -> list[str]:
    """How many of the weights were proven, were not and could not be, and which files not read."""
    rest = sum(not tensor.expected for tensor in report.tensors)
    counts = (
        f"Weights proven 2:4: {len(report.proven)}, not 2:4: {len(report.violations)}, not proven: "
        f"{len(report.unproven)}, need not be: {rest}."
    )
    return [counts, *(f"Not read: {name}" for name in report.unread)]


def findings(found: Sequence["Diagnosis"]) -> Table:
    """What this machine can do; what is missing stands out, with its remedy."""
    table = _table("what", "found", "for", "if missing")
    for finding in found:
        remedy, style = ("", "") if finding.usable else (finding.remedy, "yellow")
        _add_row(table, finding.name, finding.found, finding.use, remedy, style=style)
    return table


def comparison(found: "Comparison") -> Table:
    """Every figure against the baseline; what does not pass stands out."""
    # Loads NumPy, which the start of every command need not wait for.
    from prox24_deploy.report.formats import amount

    table = _table("figure", "baseline", "now", "limit", "verdict", "finding")
    styles = {"pass": "", "inconclusive": "yellow", "fail": "red", "not gated": "dim"}
    for change in found.changes:
        values = [amount(value, change.unit) for value in (change.before, change.after)]
        _add_row(
            table,
            change.name,
            *values,
            change.limits,
            change.verdict,
            change.message,
            style=styles[change.verdict],
        )
    return table


def releases(found: "BaselineFile") -> Table:
    """The accepted releases of a baseline, the oldest first, each with a number."""
    table = _table("release", "accepted", "verdict", "reason")
    for number, entry in enumerate(found.history, start=1):
        _add_row(table, str(number), entry.date, entry.verdict, entry.reason)
    return table


def history(found: "BaselineFile") -> Table:
    """Every figure of a baseline over its releases, by the number of each."""
    # Load NumPy, too.
    from prox24_deploy.regression.figures import unit_of
    from prox24_deploy.report.formats import amount

    names = dict.fromkeys(name for entry in found.history for name in entry.figures)
    table = _table("figure", *map(str, range(1, len(found.history) + 1)))
    for name in names:
        figures = (amount(entry.figures.get(name), unit_of(name)) for entry in found.history)
        _add_row(table, name, *figures)
    return table


def plan_layers(plan: "Plan") -> Table:
    """Layers of one kind in one row: same name in their block, same shape, same decision."""
    kinds: dict[tuple[str, int, int, bool, bool], list[LayerPlan]] = {}
    for layer in plan.layers:
        kind = layer.choice.name.rpartition(".")[2]
        size = layer.choice.n, layer.choice.k
        kinds.setdefault((kind, *size, layer.prune, layer.choice.chosen), []).append(layer)
    shapes = [str(planned.shape) for planned in plan.shapes]
    table = _table("layers", "N×K", *shapes, *([plan.metric] if plan.metric else []), "plan")
    for (kind, n, k, prune, chosen), group in kinds.items():
        speedups = [f"{t.speedup:.2f}×" for t in group[0].choice.timings] or ["–"] * len(shapes)
        losses = [layer.loss.value for layer in group if layer.loss]
        loss = [f"{sum(losses):+.4f}" if losses else ""] if plan.metric else []
        dense = "dense: over the budget" if chosen else "dense"
        _add_row(
            table,
            f"{len(group)} × {kind}",
            f"{n}×{k}",
            *speedups,
            *loss,
            "prune" if prune else dense,
        )
    return table


def plan_ways(plan: "Plan") -> Table:
    """Speed-up of every way over dense 16 bit, for layers of one kind in one row."""
    shapes = [str(planned.shape) for planned in plan.shapes]
    table = _table("layers", "N×K", "way", *shapes, "chosen for")
    for (kind, n, k), group in _kinds(plan).items():
        first = group[0]
        title = [f"{len(group)} × {kind}", f"{n}×{k}"]
        for way in first.known_ways:
            gains = [f"{gain:.2f}×" for gain in first.gains(way)]
            chosen = [quantize for quantize, best in first.ways.items() if best == way]
            _add_row(table, *title, str(way), *gains, ", ".join(chosen))
            title = ["", ""]
    return table


def _kinds(plan: "Plan") -> "dict[tuple[str, int, int], list[LayerPlan]]":
    """Layers that have times, by name in their block and size."""
    kinds: dict[tuple[str, int, int], list[LayerPlan]] = {}
    for layer in plan.layers:
        choice = layer.choice
        if choice.timings:
            key = choice.name.rpartition(".")[2], choice.n, choice.k
            kinds.setdefault(key, []).append(layer)
    return kinds


def plan_shapes(plan: "Plan") -> Table:
    """Expected gain of every model at each shape."""
    whole = plan.source == "measured"
    most = "" if whole else " at most"
    rival = [f"over dense fp8{most}"] if "fp8" in plan.profile.formats else []
    headers = (
        "batch", "seq", "past", "model", "expected ms", f"over dense {plan.dtype}{most}", *rival
    )  # fmt: skip
    rows = []
    for shape in plan.shapes:
        title = [str(shape.batch), str(shape.sequence or ""), str(shape.past or "")]
        base = shape.linear_ms if shape.dense_ms is None else shape.dense_ms
        for model in shape.models:
            gains = [model.speedup, shape.over(model, "fp8")][: 1 + len(rival)]
            cells = ("–" if gain is None else f"{gain:.2f}×" for gain in gains)
            rows.append((*title, _model(plan, model), f"{base / model.speedup:.3f}", *cells))
            title = ["", "", ""]
    return _without_empty(headers, rows)


def _model(plan: "Plan", model: "ModelTime") -> str:
    format = plan.dtype if model.quantize == "none" else model.quantize
    return f"{format}, 2:4 where it pays" if model.sparse else f"{format}, dense"


def plan_sentences(plan: "Plan") -> list[str]:
    """What a reader must know of the figures, and the advice."""
    pruned = sum(layer.prune for layer in plan.layers)
    found = []
    if plan.source == "profile":
        found.append(
            f"Times come from a saved profile of {plan.profile.gpu}, nothing was measured here; "
            "they cover the layers above alone, so the whole model gains less."
        )
    if plan.profile.published:
        found.append(plan.profile.published)
    found += _estimates(plan)
    if len(plan.profile.formats) > 1 and any(layer.eight_bit for layer in plan.layers):
        how = "measured by a copy" if plan.profile.copy_rate else "the most that a timed GEMM moved"
        found.append(
            "Times in 8 bits hold an estimate of what rounding inputs takes: 3 bytes of each value "
            f"at {plan.profile.memory_rate / 1e6:.2f} TB/s, {how}."
        )
    found.append(NVFP4)
    also = "" if plan.quantize == "none" else f" and {plan.quantize}"
    where = f"on {plan.profile.gpu} in {plan.dtype}{also}"
    found.append(
        f"Prune {pruned} of {len(plan.layers)} layers {where}."
        if pruned
        else f"Prune nothing: 2:4 does not pay at these shapes {where}."
    )
    return found


def _estimates(plan: "Plan") -> list[str]:
    """How many of the times were not measured, and which of them are little more than a guess."""
    estimated = {
        (timing.format, timing.shape)
        for layer in plan.layers
        for timings in layer.timings.values()
        for timing in timings
        if not timing.measured
    }
    if not estimated:
        return []
    found = [f"{len(estimated)} GEMM shapes are estimated from the nearest measured ones."]
    far = [shape for format, shape in estimated if plan.profile.stretch(shape, format) >= _FAR]
    if far:
        found.append(
            f"{len(far)} of them are {_FAR} times or more larger or smaller in one size than the "
            "nearest: measure them with plan on that GPU before you rely on them."
        )
    return found


def _proof(tensor: TensorCheck) -> str:
    if tensor.is_24:
        return "yes"
    if not tensor.expected:
        return f"not read: {tensor.reason}" if tensor.unproven else "dense"
    return f"{'not proven' if tensor.unproven else 'no'}: {tensor.reason}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"


def _table(*headers: str) -> Table:
    """A plain table that folds what does not fit: a name cut short is no name."""
    table = Table(box=None)
    for header in headers:
        table.add_column(_cell(header), overflow="fold")
    return table


def _without_empty(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that say nothing in any row, as "past" where nothing has one."""
    kept = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    table = _table(*(headers[i] for i in kept))
    for row in rows:
        _add_row(table, *(row[i] for i in kept))
    return table


def _add_row(table: Table, *cells: str | None, style: str = "") -> None:
    """A row in which no name can end a line, or take more of the page than it is worth."""
    table.add_row(*(None if cell is None else _cell(cell) for cell in cells), style=style)


def _cell(text: str) -> Text:
    return plain(text, _MOST_OF_A_CELL)
