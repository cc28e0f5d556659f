"""Turn the records of a build into warnings and checks."""

import math
from collections.abc import Iterator, Mapping, Sequence

from prox24_deploy.core.intervals import FEWEST, around
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import (
    BenchResult,
    ChannelOrder,
    CompileResult,
    Engine,
    EngineEvidence,
    Estimate,
    EvaluateResult,
    ExportResult,
    LatencyRow,
    LayerRecord,
    Metric,
    NotMeasured,
    NumericsCheck,
    PruneResult,
    Sensitivity,
    TensorCheck,
    TextSource,
)
from prox24_deploy.core.results import BuildResults
from prox24_deploy.core.types import Verdict
from prox24_deploy.report.recovery_checks import recovery_warnings, training_warnings
from prox24_deploy.report.schema import Check

TOKENS_PER_FEATURE = 10
NAMES_IN_A_SENTENCE = 8
# What was compared, as a check says it.
EXPORTED = "ONNX Runtime and PyTorch"
COMPRESSED = "The compressed engine and the same weights multiplied dense"
# A clock below this share of the highest seen is said to be unsteady.
STEADY_CLOCK = 0.9


def find_warnings(results: BuildResults) -> tuple[tuple[str, ...], ...]:
    """One sentence for each thing that a reader must know before trusting the figures.

    In three parts: of accuracy, of speed, and of what was left as it was.
    """
    prune, bench = results.prune, results.bench
    accuracy = (
        *_text_warnings(prune, results.evaluate),
        *_token_warnings(prune),
        *_doubt_warnings(prune.layers),
        *_expert_warnings(prune.layers),
        *recovery_warnings(results.recover, results.evaluate),
        *training_warnings(results.quantize),
    )
    speed = (
        *_backend_warnings(results.compile, bench.latency),
        *_compilation_warnings(results.compile.engines),
        *_unmeasured_warnings(bench),
        *_clock_warnings(bench.latency),
        *_dtype_warnings(results.export),
    )
    left = (
        *prune.notes,
        *_skipped_warnings(prune.layers),
        *_order_warnings(prune.orders),
        *_unquantized_warnings(results.quantize),
    )
    return accuracy, speed, left


def find_checks(results: BuildResults) -> tuple[Check, ...]:
    """Everything that was checked but the metrics, gated or not, in the order of the stages."""
    prune, export, bench = results.prune, results.export, results.bench
    return (
        *_layer_checks(prune.layers),
        *_presence_checks(prune, export),
        *(_sparsity_check(check) for check in export.sparsity if check.expected),
        *(_numerics_check(check, check.twin, EXPORTED) for check in export.numerics),
        *(
            _numerics_check(check, evidence.backend, COMPRESSED)
            for evidence in results.compile.evidence
            for check in evidence.numerics
        ),
        *_budget_checks(prune.sensitivity, results.evaluate.metrics),
        *(_latency_check(row, results.compile.evidence) for row in bench.latency),
        *(_unmeasured_check(missing) for missing in bench.not_measured),
    )


def row_name(row: LatencyRow) -> str:
    """Name of a latency row: engine and shape."""
    sequence = f", sequence {row.sequence}" if row.sequence else ""
    past = f", past {row.past}" if row.past else ""
    return f"{row.engine}, batch {row.batch}{sequence}{past}"


def _text_warnings(prune: PruneResult, evaluate: EvaluateResult) -> Iterator[str]:
    if prune.calibration.kind == "builtin":
        yield (
            "The model was calibrated on the English text that ships with Python, not on text of "
            "your domain; pass your own with --calibration PATH."
        )
    if prune.calibration.kind == "written":
        yield (
            "The model was calibrated on text that it wrote itself, for want of other; text of "
            "your domain may serve it better, pass it with --calibration PATH."
        )
    yield from _target_warnings(prune.calibration, "calibrated")
    yield from _target_warnings(evaluate.evaluation, "evaluated")
    if evaluate.evaluation.kind != "file":
        built_in = "builtin" in {prune.calibration.kind, evaluate.evaluation.kind}
        built_in = built_in or prune.calibration.kind == "written"
        origin = "built-in" if built_in else "held-out calibration"
        unit = evaluate.evaluation.unit
        what = "text" if unit == "token" else f"{unit}s"
        yield (
            f"Accuracy was measured on {origin} {what}; pass {what} or a task of your own with "
            "--evaluation PATH."
        )


def _target_warnings(text: TextSource, done: str) -> Iterator[str]:
    if text.targets is None or text.targets == text.samples:
        return
    yield (
        f"{text.samples - text.targets:,} of {text.samples:,} {text.modality.lacking}, so the "
        f"decoder was {done} on {text.modality.stand_in}"
    )


def _token_warnings(prune: PruneResult) -> Iterator[str]:
    starved = [
        layer
        for layer in prune.layers
        if layer.status == "pruned"
        # Of experts with far fewer another warning tells.
        and not layer.pull
        and layer.rows < TOKENS_PER_FEATURE * layer.shape[1]
    ]
    if starved:
        worst = max(starved, key=lambda layer: layer.shape[1] / max(layer.rows, 1))
        source, width = prune.calibration, worst.shape[1]
        advised = math.ceil(source.tokens * TOKENS_PER_FEATURE * width / max(worst.rows, 1))
        yield (
            f"Calibration has {source.tokens:,} {source.unit}s, which give fewer than "
            f"{TOKENS_PER_FEATURE} inputs per feature to {_counted(len(starved), 'layer')} of up "
            f"to {width:,} features; at least {advised:,} {source.unit}s are advised."
        )


def _skipped_warnings(layers: Sequence[LayerRecord]) -> Iterator[str]:
    left = {layer.name: layer.reason for layer in layers if layer.status == "skipped"}
    yield from _left_warnings(left, "dense")


def _order_warnings(orders: Sequence[ChannelOrder]) -> Iterator[str]:
    left = {order.layer: order.reason for order in orders if order.reason}
    yield from _left_warnings(left, "with its channels in their old order")


def _unquantized_warnings(found: QuantizeResult | None) -> Iterator[str]:
    layers = found.layers if found else ()
    left = {layer.name: layer.reason for layer in layers if layer.reason}
    yield from _left_warnings(left, "in 16 bits")


def _left_warnings(reasons: Mapping[str, str], how: str) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        # What follows a colon is about one layer; the table of layers has it.
        by_reason.setdefault(reason.partition(":")[0], []).append(name)
    for reason, names in by_reason.items():
        yield f"{_counted(len(names), 'layer')} left {how} ({reason}): {_named(names)}."


def _doubt_warnings(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """Layers whose error of 0, or any, tells nothing, by the reason."""
    for note in dict.fromkeys(layer.note for layer in layers if layer.note):
        names = [layer.name for layer in layers if layer.note == note]
        layers_in_words = _counted(len(names), "layer")
        yield f"The error says nothing of {layers_in_words} ({note}): {_named(names)}."


def _expert_warnings(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """Layers of experts to which too few tokens were routed, those with the fewest first."""
    pulled = sorted((layer for layer in layers if layer.pull), key=lambda layer: -layer.pull)
    if pulled:
        names = [f"{each.name} ({each.rows} for {each.shape[1]:,})" for each in pulled]
        yield (
            f"{_counted(len(pulled), 'layer')} of experts had fewer than 4/3 calibration tokens "
            f"per feature and kept closer to the dense weights: {_named(names)}; calibrate on more "
            "tokens, or leave them dense with --exclude."
        )


def _dtype_warnings(export: ExportResult) -> Iterator[str]:
    if export.sparse[0].dtype == "float32":
        yield (
            "The ONNX files are float32, for which TensorRT has no sparse kernels; export with "
            "--dtype float16 to run sparse."
        )
    if export.sparse[0].dtype == "bfloat16":
        yield (
            "The numerics of the bfloat16 files were not checked, because ONNX Runtime has no "
            "bfloat16 kernels on CPU."
        )


def _backend_warnings(compiled: CompileResult, latency: Sequence[LatencyRow]) -> Iterator[str]:
    gates = {row.backend: row.gated for row in latency}
    for backend, gated in gates.items():
        if not gated:
            yield (
                f"Backend {backend} has no sparse kernels: dense and sparse are expected to take "
                "the same time, and its latency does not gate the release."
            )
    for evidence in compiled.evidence:
        if gates.get(evidence.backend, True) and evidence.chosen in (0, None):
            known = "it is unknown whether it runs" if evidence.chosen is None else "it runs no"
            yield f"Backend {evidence.backend}: {known} sparse kernels ({evidence.summary})."


def _compilation_warnings(engines: Sequence[Engine]) -> Iterator[str]:
    for engine in engines:
        if engine.compilation is not None and (reason := engine.compilation.reason):
            yield (
                f"The {engine.twin} engine of backend {engine.backend} runs without torch.compile "
                f"({reason}), kernel by kernel, and is not the fastest that PyTorch has."
            )


def _unmeasured_warnings(bench: BenchResult) -> Iterator[str]:
    for missing in bench.not_measured:
        yield f"Backend {missing.backend} was compiled and its latency not measured: " + (
            missing.reason
        )
    if not bench.latency and bench.not_measured:
        yield (
            "No backend measured latency, so nothing here says whether the sparse model is slower "
            "or faster, and no gate on latency was applied."
        )


def _clock_warnings(latency: Sequence[LatencyRow]) -> Iterator[str]:
    """What kept the GPU from a steady clock, for each row that it concerns."""
    for row in latency:
        if (clocks := row.clocks) is None:
            continue
        unsteady = clocks.sm_mhz_low < STEADY_CLOCK * clocks.sm_mhz_high
        if clocks.slowed_by or unsteady:
            reasons = f", slowed by {' and '.join(clocks.slowed_by)}" if clocks.slowed_by else ""
            yield (
                f"The GPU ran at {clocks.sm_mhz_low} to {clocks.sm_mhz_high} MHz{reasons} while "
                f"{row_name(row)} was timed; absolute latencies may not repeat, the ratio is of "
                "runs in turns."
            )


def _layer_checks(layers: Sequence[LayerRecord]) -> Iterator[Check]:
    """A failed check for each layer whose error is not finite, which no average may hide."""
    for layer in layers:
        errors = (layer.relative_error, layer.held_out_error)
        if any(error is not None and not math.isfinite(error) for error in errors):
            yield Check(
                name=layer.name,
                part="accuracy",
                kind="pruning",
                value=None,
                limit=None,
                verdict="fail",
                message="The error of the layer is not a finite number; prune on more text, or "
                "leave the layer dense with ignore in the recipe",
            )


def _presence_checks(prune: PruneResult, export: ExportResult) -> Iterator[Check]:
    """A failed check for each pruned layer whose weight the files do not declare 2:4."""
    declared = {check.module for check in export.sparsity if check.expected}
    files = " and ".join(model.path for model in export.sparse)
    for layer in prune.layers:
        if layer.status == "pruned" and layer.name not in declared:
            yield Check(
                name=layer.name,
                part="sparsity",
                kind="sparsity",
                value=None,
                limit=0.5,
                verdict="fail",
                message=f"The layer was pruned, but no weight of {files} is declared to be its 2:4 "
                "one; export the pruned model again",
            )


def _sparsity_check(check: TensorCheck) -> Check:
    message = f"2:4 along axis {check.axis} of {check.shape}, density {check.density:.3f}"
    if not check.is_24:
        where = f" first at {check.first_violation}" if check.first_violation else ""
        message = f"Not 2:4 along axis {check.axis} of {check.shape}{where}: {check.reason}"
    return Check(
        name=check.module or check.tensor,
        part="sparsity",
        kind="sparsity",
        value=check.density,
        limit=0.5,
        verdict="pass" if check.is_24 else "fail",
        message=message,
    )


def _numerics_check(check: NumericsCheck, who: str, compared: str) -> Check:
    return Check(
        name=f"{who} {check.output}",
        part="export",
        kind="numerics",
        value=check.max_abs_difference if math.isfinite(check.max_abs_difference) else None,
        limit=check.tolerance,
        verdict="pass" if check.passed else "fail",
        message=f"{compared} differ by at most {check.max_abs_difference:.3g}, tolerance "
        f"{check.tolerance:.3g}",
    )


def _budget_checks(budget: Sensitivity | None, metrics: Sequence[Metric]) -> Iterator[Check]:
    """The loss on evaluation text against the limit that chose the layers on calibration text."""
    if budget is None or budget.max_loss is None:
        return
    loss, samples = _loss(budget.metric, metrics)
    # The limit chose the layers by the mean, so that the mean is what has to keep it.
    verdict: Verdict = "pass" if loss.value <= budget.max_loss else "inconclusive"
    if samples < FEWEST:
        verdict = "inconclusive"
    elif around(loss, samples).low > budget.max_loss:
        verdict = "fail"
    yield Check(
        name=f"{budget.metric} within --max-loss",
        part="accuracy",
        kind="budget",
        value=loss.value if math.isfinite(loss.value) else None,
        limit=budget.max_loss,
        verdict=verdict,
        message=f"Pruning {budget.chosen} of {len(budget.layers)} layers costs {loss.value:.4g} ± "
        f"{loss.standard_error:.2g} {budget.metric} on evaluation text, limit {budget.max_loss:g}",
    )


def _loss(name: str, metrics: Sequence[Metric]) -> tuple[Estimate, int]:
    """The loss of a budget among the metrics: a difference, a figure of both models, or 1 - it.

    With it, of how many samples it is the mean.
    """
    for metric in metrics:
        if metric.name == name and (found := metric.change):
            return found, metric.samples
        if f"1 - {metric.name}" == name and (found := metric.agreement):
            return Estimate(
                value=1 - found.value, standard_error=found.standard_error
            ), metric.samples
    raise ValueError(f"no metric among {[m.name for m in metrics]} tells the {name} of a budget")


def _latency_check(row: LatencyRow, evidence: Sequence[EngineEvidence]) -> Check:
    least = 1 / (1 + row.limit)
    speedup = row.speedup
    gate = f"limit {least:.3f}" if row.gated else "not gated, because there are no sparse kernels"
    if row.gated and row.runs_dense(evidence):
        gate += ", and it runs no sparse kernel"
    return Check(
        name=row_name(row),
        part="speed",
        kind="latency",
        value=speedup.value,
        limit=least,
        verdict=row.verdict,
        message=f"Speed-up {speedup.value:.3f}, 95 % interval {speedup.low:.3f} to "
        f"{speedup.high:.3f}, {gate}",
    )


def _unmeasured_check(missing: NotMeasured) -> Check:
    """What was asked for and delivered, but cannot run here, is told and fails nothing."""
    return Check(
        name=missing.backend,
        part="speed",
        kind="latency",
        value=None,
        limit=None,
        verdict="not gated",
        message=f"Latency was not measured: {missing.reason}",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_A_SENTENCE])
    rest = len(names) - NAMES_IN_A_SENTENCE
    return f"{shown} and {rest} more in the table of layers" if rest > 0 else shown
