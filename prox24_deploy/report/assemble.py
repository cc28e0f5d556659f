"""Assemble the report from the records of the stages and write its five files.

`report.json` is the single source; HTML, Markdown, JUnit and benchmark.json are views of it. The
schema that the package ships is written again by

    python -c "from prox24_deploy.report.assemble import *; SCHEMA_FILE.write_text(schema_text())"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from prox24_deploy.config.limits import GivenLimits, Limits
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import (
    BenchResult,
    DirectMetric,
    Estimate,
    ExportResult,
    LayerRecord,
    Metric,
    ModelInfo,
    PruneResult,
)
from prox24_deploy.core.results import BuildResults
from prox24_deploy.latency.measure import latency_verdict
from prox24_deploy.report.against_dense import Group, Judged, by_name, groups_of, judge_metrics
from prox24_deploy.report.binding import require_named, unmatched_checks
from prox24_deploy.report.checks import find_checks, find_warnings
from prox24_deploy.report.engine_checks import engine_checks, engine_warnings
from prox24_deploy.report.recovery_checks import remedies
from prox24_deploy.report.render import render_benchmark, render_html, render_junit, render_summary
from prox24_deploy.report.sample_checks import sample_warnings
from prox24_deploy.report.schema import (
    SCHEMA_FILE,
    Accuracy,
    Check,
    Pruning,
    PruningTotals,
    Quantization,
    Report,
    Sizes,
    Sparsity,
    load_report,
    parse_report,
    report_schema,
    schema_text,
)
from prox24_deploy.report.task_checks import task_warnings
from prox24_deploy.report.verdict import judge_parts, sentence_of, whole_verdict
from prox24_deploy.report.wording import limits_in_words, said

__all__ = [
    "SCHEMA_FILE",
    "Check",
    "Report",
    "assemble_report",
    "load_report",
    "report_schema",
    "schema_text",
    "write_report",
]

_NOTHING_GIVEN = GivenLimits()
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}


def assemble_report(
    model: ModelInfo,
    results: BuildResults,
    limits: Limits,
    *,
    given: GivenLimits = _NOTHING_GIVEN,
    options: Mapping[str, JsonValue],
    environment: Mapping[str, JsonValue],
    sizes: Mapping[str, int],
    timings: Mapping[str, float],
) -> Report:
    """Make the report of one build; pure.

    `sizes` maps paths in the bundle to bytes and `timings` stages to seconds. `limits` are those of
    the recipe; those that apply are kept with the options, the conditions of the measurement with
    the environment. An error or metric that is not finite becomes None and fails the release.

    Raises:
        UsageError: a limit that is no default names a metric that was not measured.
    """
    groups = groups_of(results.evaluate.metrics, results.accuracy.engines, results.tasks)
    figures = by_name(groups)
    require_named(given, limits, figures)
    applied = limits.over_defaults(model.task, figures, given)
    results = replace(results, bench=_judged_bench(results.bench, applied.max_slowdown))
    judged = judge_metrics(groups, applied.against_dense)
    found = (*find_checks(results), *engine_checks(results.accuracy))
    checks = (*(j.check for j in judged), *found, *unmatched_checks(given, limits, figures))
    parts = judge_parts(checks)
    return Report(
        verdict=whole_verdict(parts),
        sentence=sentence_of(parts, checks, groups),
        parts=parts,
        accepted_losses=_accepted(given, groups),
        warnings=_warnings(results, judged),
        model=model,
        options={**options, "limits": applied.as_json()},
        environment={**environment, "conditions": {**results.bench.conditions}},
        pruning=_pruning(results.prune, results.export),
        recovery=results.recover,
        quantization=_quantization(results.quantize),
        accuracy=_accuracy(results),
        sparsity=Sparsity(tensors=results.export.sparsity, engines=results.compile.evidence),
        latency=results.bench.latency,
        not_measured=results.bench.not_measured,
        sizes=_sizes(results.export, sizes),
        timings=dict(timings),
        checks=checks,
        regressions=tuple(check for check in checks if check.verdict == "fail"),
    )


def write_report(report: Report, out: Path) -> None:
    """Write `report.json` and its four views into `out`, each by atomic rename.

    What is written is read back first, so that nothing is replaced by a report that cannot be
    loaded; `report.json` comes last and so vouches for the others.

    Raises:
        BundleError: a figure is not finite, so that JSON cannot hold it.
    """
    data = (report.model_dump_json(indent=2) + "\n").encode()
    parse_report(data, str(out / "report.json"))
    write_atomic(out / "report.html", render_html(report).encode())
    write_atomic(out / "summary.md", render_summary(report).encode())
    write_atomic(out / "junit.xml", render_junit(report))
    write_atomic(out / "benchmark.json", render_benchmark(report))
    write_atomic(out / "report.json", data)


def _judged_bench(bench: BenchResult, limit: float) -> BenchResult:
    """Latencies judged by the limit that applies now, which may be another than when measured."""
    return replace(
        bench,
        latency=tuple(
            replace(
                row,
                limit=limit,
                verdict=latency_verdict(row.speedup, limit) if row.gated else "not gated",
            )
            for row in bench.latency
        ),
    )


def _warnings(results: BuildResults, judged: Sequence[Judged]) -> tuple[str, ...]:
    """By weight: what leaves accuracy open, then speed, then what was left out and why."""
    accuracy, speed, rest = find_warnings(results)
    return (
        *remedies(results, judged),
        *sample_warnings(judged, results.evaluate.evaluation, results.accuracy.engines),
        *accuracy,
        *engine_warnings(results.accuracy, results.evaluate.metrics),
        *task_warnings(results.tasks),
        *speed,
        *rest,
    )


def _accepted(given: GivenLimits, groups: Sequence[Group]) -> tuple[str, ...]:
    """The limits that were widened by name, in words."""
    better = {
        name: metric.higher_is_better
        for group in groups
        for metric in group.metrics
        for name in (metric.name, group.prefix + metric.name)
    }
    return tuple(
        f"{said(name)} {limits_in_words(limits, higher_is_better=better[name], than=' than dense')}"
        for name, limits in given.accepted.items()
    )


def _pruning(prune: PruneResult, export: ExportResult) -> Pruning:
    layers = tuple(_finite_layer(layer) for layer in prune.layers)
    pruned = [layer for layer in layers if layer.status == "pruned"]
    weights, non_zero = _weight_counts(export)
    totals = PruningTotals(
        pruned=len(pruned),
        skipped=len(layers) - len(pruned),
        parameters=sum(math.prod(layer.shape) for layer in pruned),
        density=non_zero / weights if weights else None,
        relative_error=_mean([layer.relative_error for layer in pruned]),
        held_out_error=_mean([layer.held_out_error for layer in pruned]),
    )
    return Pruning(
        method=prune.method,
        preset=prune.preset,
        target=prune.target,
        device=prune.device,
        calibration=prune.calibration,
        held_out=prune.held_out,
        damping=prune.damping,
        reconstructed=prune.reconstructed,
        sensitivity=prune.sensitivity,
        orders=prune.orders,
        seconds=prune.seconds,
        layers=layers,
        totals=totals,
    )


def _quantization(found: QuantizeResult | None) -> Quantization | None:
    if found is None:
        return None
    return Quantization(
        format=found.format,
        calibration=found.calibration,
        withheld=found.withheld,
        seconds=found.seconds,
        layers=tuple(
            replace(layer, error=_finite(layer.error), nearest_error=_finite(layer.nearest_error))
            for layer in found.layers
        ),
        training=found.training,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _accuracy(results: BuildResults) -> Accuracy:
    through, tasks = results.accuracy, results.tasks
    metrics = tuple(_finite_metric(metric) for metric in results.evaluate.metrics)
    headline = metrics[0]
    compared = next(
        (m for m in metrics if isinstance(m, DirectMetric) and m.agreement is not None), None
    )
    return Accuracy(
        metric=headline.name,
        higher_is_better=headline.higher_is_better,
        samples=headline.samples,
        dense=headline.dense,
        sparse=headline.sparse,
        difference=headline.difference,
        agreement_metric=compared.name if compared else None,
        agreement=compared.agreement if compared else None,
        metrics=metrics,
        evaluation=results.evaluate.evaluation,
        engines=tuple(
            replace(engine, metrics=tuple(map(_finite_metric, engine.metrics)))
            for engine in through.engines
        ),
        engines_not_measured=through.not_measured,
        engines_failed=through.failed,
        tasks=tasks and replace(tasks, metrics=tuple(map(_finite_metric, tasks.metrics))),
        steps=tuple(
            replace(step, metrics=tuple(map(_finite_metric, step.metrics)))
            for step in results.evaluate.steps
        ),
    )


def _finite_layer(layer: LayerRecord) -> LayerRecord:
    """JSON has no infinity; the failed check of the layer tells what became None."""
    return replace(
        layer,
        relative_error=_finite(layer.relative_error),
        held_out_error=_finite(layer.held_out_error),
    )


def _finite_metric(metric: Metric) -> Metric:
    """As for a layer: the failed check of the metric tells what became None."""
    values = metric.values if all(map(math.isfinite, metric.values)) else ()
    if isinstance(metric, DirectMetric):
        return replace(metric, agreement=_finite_estimate(metric.agreement), values=values)
    return replace(
        metric,
        dense=_finite_estimate(metric.dense),
        sparse=_finite_estimate(metric.sparse),
        difference=_finite_estimate(metric.difference),
        values=values,
    )


def _finite_estimate(estimate: Estimate | None) -> Estimate | None:
    parts = (estimate.value, estimate.standard_error) if estimate else ()
    return estimate if all(math.isfinite(part) for part in parts) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sizes(export: ExportResult, files: Mapping[str, int]) -> Sizes:
    weights, non_zero = _weight_counts(export)
    plain = weights * BYTES_PER_VALUE[export.sparse[0].dtype]
    dense, sparse = (sum(model.size_bytes for model in t) for t in (export.dense, export.sparse))
    packed = plain // 2 + weights // 8
    return Sizes(
        onnx_dense_bytes=dense,
        onnx_sparse_bytes=sparse,
        packed_bytes=sparse - plain + packed,
        weights=weights,
        non_zero_weights=non_zero,
        files=dict(files),
    )


def _weight_counts(export: ExportResult) -> tuple[int, int]:
    """Values of the 2:4 tensors in the sparse file, and how many are not zero; tied ones once."""
    proven = {
        # The two graphs of an encoder-decoder may both have a tensor of some name.
        (check.module, check.tensor, check.part): check
        for check in export.sparsity
        if check.expected and check.is_24
    }
    counts = {name: math.prod(check.shape) for name, check in proven.items()}
    non_zero = sum(round(check.density * counts[name]) for name, check in proven.items())
    return sum(counts.values()), non_zero
