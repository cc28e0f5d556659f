"""What the command line shows, as rich tables and lines; `cli.py` prints them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from prox24_deploy.artifacts import Estimate, LatencyRow, LayerRecord, Metric, TensorCheck

if TYPE_CHECKING:
    from prox24_deploy.release.environment import Finding


def metric_line(metric: Metric) -> str:
    """One accuracy figure with its standard errors."""
    estimates = {
        "": metric.agreement,
        "dense ": metric.dense,
        "sparse ": metric.sparse,
        "difference ": metric.difference,
    }
    parts = [label + _shown(estimate) for label, estimate in estimates.items() if estimate]
    return f"{metric.name}: {', '.join(parts)} ({metric.samples} samples)"


def layers(records: Sequence[LayerRecord]) -> Table:
    """Relative output error of every pruned layer, and why a layer stayed dense."""
    table = _table("layer", "error", "held out", "note")
    for record in records:
        errors = [
            "" if error is None else f"{error:.4f}"
            for error in (record.relative_error, record.held_out_error)
        ]
        table.add_row(record.name, *errors, record.reason and f"dense: {record.reason}")
    return table


def latency(rows: Sequence[LatencyRow]) -> Table:
    """Median latency of both twins and their ratio with its interval."""
    table = _table("backend", "batch", "seq", "dense ms", "sparse ms", "speed-up", "95 %")
    for row in rows:
        table.add_row(
            row.engine,
            str(row.batch),
            str(row.sequence or ""),
            f"{row.dense.median_ms:.2f}",
            f"{row.sparse.median_ms:.2f}",
            f"{row.speedup.value:.2f}×",
            f"{row.speedup.low:.2f}–{row.speedup.high:.2f}",
        )
    return table


def checks(tensors: Sequence[TensorCheck]) -> Table:
    """Every weight that was looked at; "dense" marks one that nothing declares 2:4."""
    table = _table(
        "module or tensor", "type", "axis", "shape", "density", "2:4", "TensorRT eligible"
    )
    for tensor in tensors:
        table.add_row(
            (tensor.module or tensor.tensor) + tensor.part,
            tensor.dtype,
            str(tensor.axis),
            "×".join(map(str, tensor.shape)),
            f"{tensor.density:.3f}",
            "yes" if tensor.is_24 else f"no: {tensor.reason}" if tensor.expected else "dense",
            "yes" if tensor.eligible else f"no: {tensor.ineligible_reason}",
        )
    return table


def findings(found: Sequence["Finding"]) -> Table:
    """What this machine can do; what is missing stands out, with its remedy."""
    table = _table("what", "found", "if missing")
    for finding in found:
        remedy, style = ("", "") if finding.usable else (finding.remedy, "yellow")
        table.add_row(finding.name, finding.found, remedy, style=style)
    return table


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"


def _table(*headers: str) -> Table:
    """A plain table that folds what does not fit: a name cut short is no name."""
    table = Table(box=None)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
