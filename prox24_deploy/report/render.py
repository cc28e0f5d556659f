"""Views of a report: HTML, Markdown, JUnit and benchmark.json."""

import importlib.resources
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from junitparser import Failure, Skipped, TestCase

from prox24_deploy.core.records import DirectMetric, LatencyRow, LayerRecord
from prox24_deploy.core.types import Judgement
from prox24_deploy.report import grids
from prox24_deploy.report.checks import row_name
from prox24_deploy.report.escape import (
    class_name,
    code,
    drawing,
    markdown,
    plain_name,
    prose,
    shown,
    xml_text,
)
from prox24_deploy.report.formats import (
    amount,
    count,
    estimate,
    known,
    number,
    pace,
    percent,
    place,
    ratio,
    seconds,
    shape,
    size,
)
from prox24_deploy.report.header import figures_of, tiles_of
from prox24_deploy.report.junit import junit_xml
from prox24_deploy.report.plots import (
    bar_plot,
    error_plots,
    latency_plot,
    recovery_plot,
    sensitivity_plot,
    trend_plot,
)
from prox24_deploy.report.schema import KINDS, Check, Comparison, Headline, Part, Report, Sizes
from prox24_deploy.report.steps import step_rows, step_titles

WORST_LAYERS = 5
# For dashboards on which less is better.
_VERDICT_VALUES = {"pass": 0, "not gated": 1, "inconclusive": 2, "fail": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A figure over accepted releases, in a unit that keeps its numbers short."""

    name: str
    title: str
    scale: float
    points: tuple[tuple[str, float], ...]

    def of(self, entry: Headline) -> float | None:
        """What it was in one release."""
        value = entry.figures.get(self.name)
        return None if value is None else self.scale * value


def render_html(report: Report) -> str:
    """One page that needs no other file, no script and no network."""
    budget, recovery = report.pruning.sensitivity, report.recovery
    plots = {
        "sensitivity": [drawing(sensitivity_plot(budget))] if budget else [],
        "recovery": [drawing(recovery_plot(recovery))] if recovery and recovery.curve else [],
        "errors": [drawing(plot) for plot in error_plots(report.pruning.layers)],
        "latency": [drawing(latency_plot(row, i)) for i, row in enumerate(report.latency)],
        "sizes": [drawing(plot) for plot in _size_plots(report.sizes)],
        "trends": [drawing(plot) for plot in _trend_plots(report.baseline)],
    }
    template = _environment(html=True).get_template("report.html.jinja")
    return template.render(**_view(report), plots=plots)


def render_summary(report: Report) -> str:
    """Markdown for the summary of a CI job."""
    return _environment(html=False).get_template("summary.md.jinja").render(**_view(report))


def render_markdown(template: str, view: Mapping[str, Any]) -> str:
    """Fill a Markdown template of this package."""
    return _environment(html=False).get_template(template).render(view)


def render_junit(report: Report) -> bytes:
    """A suite with the parts of the verdict, then one for each kind of check.

    What has no limit, or is open, is skipped with its reason.
    """
    parts = [_part_case(n, part) for n, part in report.parts.by_name().items()]
    kinds = [(kind, [check for check in report.checks if check.kind == kind]) for kind in KINDS]
    suites = [(kind, map(_test_case, checks)) for kind, checks in kinds if checks]
    return junit_xml("prox24-deploy", [("verdict", parts), *suites])


def render_benchmark(report: Report) -> bytes:
    """Figures of which less is better, as [{name, unit, value, range}] for dashboards."""
    entries = [*_latency_entries(report), *_error_entries(report)]
    sizes = {"dense": report.sizes.onnx_dense_bytes, "sparse": report.sizes.onnx_sparse_bytes}
    entries += [_entry(f"onnx {twin} size", "bytes", size, "") for twin, size in sizes.items()]
    entries += _accuracy_entries(report)
    entries += [
        _entry(f"verdict, {name}", "0 pass to 3 fail", _VERDICT_VALUES[part.verdict], part.verdict)
        for name, part in report.parts.by_name().items()
    ]
    return (json.dumps(entries, indent=2) + "\n").encode()


def worst_layers(report: Report, number: int = WORST_LAYERS) -> list[LayerRecord]:
    """Pruned layers with the largest held-out error (calibration error where there is none)."""

    def error(layer: LayerRecord) -> float:
        known = layer.relative_error if layer.held_out_error is None else layer.held_out_error
        return -1.0 if known is None else known

    pruned = [layer for layer in report.pruning.layers if layer.status == "pruned"]
    return sorted(pruned, key=error, reverse=True)[:number]


_FILTERS: tuple[Callable[..., str], ...] = (
    number, estimate, ratio, size, amount, count, pace, seconds, percent, shape, known, place,
    markdown, code, plain_name, class_name, prose,
)  # fmt: skip


def _environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=html,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update({function.__name__: function for function in _FILTERS})
    return environment


def _template(name: str) -> str:
    folder = importlib.resources.files("prox24_deploy.report") / "templates"
    return folder.joinpath(name).read_text(encoding="utf-8")


def _view(report: Report) -> dict[str, Any]:
    expected = [check for check in report.sparsity.tensors if check.expected]
    telling = _telling(report.latency)
    return {
        "report": report,
        "name": report.model.title,
        "undecided": _undecided(report),
        "expected": expected,
        "proven": sum(check.is_24 for check in expected),
        "eligible": sum(check.eligible for check in expected),
        "worst": worst_layers(report),
        "speedups": _speedups(telling),
        "telling": telling,
        "step_titles": step_titles(report),
        "step_rows": step_rows(report),
        "trends": trends(report.baseline) if report.baseline else [],
        "row_name": row_name,
        "grids": grids,
        "tiles": tiles_of(report),
        "figures": figures_of(report),
        "environment": _flat(report.environment),
        "options": _flat(report.options),
    }


def _undecided(report: Report) -> list[Check]:
    return [check for check in report.checks if check.verdict == "inconclusive"]


def _telling(latency: Sequence[LatencyRow]) -> list[LatencyRow]:
    """The rows of backends that have sparse kernels; all of them where none has."""
    return [row for row in latency if row.gated] or list(latency)


def _speedups(latency: Sequence[LatencyRow]) -> str:
    values = sorted(row.speedup.value for row in latency)
    if not values:
        return "not measured"
    low, high = f"{values[0]:.2f}×", f"{values[-1]:.2f}×"
    return low if low == high else f"{low} to {high}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined with spaces, lists with commas."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key} "))
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(place(str(item)) for item in value)
        else:
            flat[prefix + key] = "–" if value is None else place(str(value))
    return flat


def _size_plots(sizes: Sizes) -> list[str]:
    files = [
        ("ONNX, dense", sizes.onnx_dense_bytes, size(sizes.onnx_dense_bytes), "dense"),
        ("ONNX, 2:4", sizes.onnx_sparse_bytes, size(sizes.onnx_sparse_bytes), "sparse"),
        ("2:4 packed (computed)", sizes.packed_bytes, size(sizes.packed_bytes), "computed"),
    ]
    weights = [
        ("in the 2:4 tensors", sizes.weights, count(sizes.weights), "dense"),
        ("of them not zero", sizes.non_zero_weights, count(sizes.non_zero_weights), "sparse"),
    ]
    return [
        bar_plot("file-sizes", "File sizes", files),
        bar_plot("weight-counts", "Numbers of weights", weights),
    ]


def _trend_plots(comparison: Comparison | None) -> list[str]:
    """A drawing for each figure that has a past: accepted releases, and this one last."""
    if comparison is None:
        return []
    return [trend_plot(t.title, t.points, i) for i, t in enumerate(trends(comparison))]


def trends(comparison: Comparison) -> list[Trend]:
    """Every figure with a past, which ends in what it is now."""
    found = []
    for change in comparison.changes:
        unit, scale = ("MiB", 2.0**-20) if change.unit == "bytes" else (change.unit, 1.0)
        trend = Trend(
            name=change.name,
            title=f"{change.name}, {unit}" if unit else change.name,
            scale=scale,
            points=(),
        )
        past = [(entry.date[:10], trend.of(entry)) for entry in comparison.history]
        known = [(date, value) for date, value in past if value is not None]
        if known and change.after is not None:
            points = (*known, ("this build", scale * change.after))
            found.append(replace(trend, points=points))
    return found


def _test_case(check: Check) -> TestCase:
    return _judged_case(check.name, check.kind, check.verdict, check.message)


def _part_case(name: str, part: Part) -> TestCase:
    return _judged_case(name, "verdict", part.verdict, f"{part.verdict}: {part.reason}")


def _judged_case(name: str, kind: str, verdict: Judgement, message: str) -> TestCase:
    case = TestCase(xml_text(name), f"prox24-deploy.{kind}")
    if verdict in {"not gated", "inconclusive"}:
        case.result = [Skipped(xml_text(message))]
    elif verdict == "fail":
        case.result = [Failure(xml_text(message), kind)]
    return case


def _latency_entries(report: Report) -> list[dict[str, Any]]:
    """Medians, and time per token with the pace beside it, of which more is better."""
    entries = []
    for row in report.latency:
        for twin, timing in (("dense", row.dense), ("sparse", row.sparse)):
            name = f"{row_name(row)}, {twin}"
            spread = f"p90 {timing.p90_ms:.4g}"
            entries.append(_entry(f"{name} median", "ms", timing.median_ms, spread))
            each = row.ms_per_token(timing)
            if each is not None:
                tokens = f"{pace(row.tokens_per_second(timing))} tokens/s"
                entries.append(_entry(f"{name} per token", "ms", each, tokens))
    return entries


def _error_entries(report: Report) -> list[dict[str, Any]]:
    totals = report.pruning.totals
    errors = {"calibration": totals.relative_error, "held-out": totals.held_out_error}
    return [
        _entry(f"mean {text} error", "relative", error, "")
        for text, error in errors.items()
        if error is not None
    ]


def _accuracy_entries(report: Report) -> list[dict[str, Any]]:
    """The headline where less of it is better, and what is missing to agreement with the dense.

    Through PyTorch and through each engine.
    """
    accuracy = report.accuracy
    named = [("", accuracy.metrics), *((f", {e.backend}", e.metrics) for e in accuracy.engines)]
    headlines = [
        _entry(f"sparse {m.name}{engine}", "", m.sparse.value, f"± {m.sparse.standard_error:.3g}")
        for engine, metrics in named
        for m in metrics[:1]
        if m.sparse and not m.higher_is_better
    ]
    agreements = [
        _entry(
            f"1 - {m.name}{engine}",
            "",
            1 - m.agreement.value,
            f"± {m.agreement.standard_error:.3g}",
        )
        for engine, metrics in named
        for m in metrics
        if isinstance(m, DirectMetric) and m.agreement and m.higher_is_better
    ]
    return headlines + agreements


def _entry(name: str, unit: str, value: float, spread: str) -> dict[str, Any]:
    return {"name": name, "unit": unit, "value": value, "range": spread}
