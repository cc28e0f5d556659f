import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from builders import (
    KINDS,
    Records,
    all_skipped,
    make_records,
    make_row,
    skipped,
    with_budget,
    with_latency,
    with_layers,
    with_numerics_failed,
    with_sparsity_lost,
)

from prox24_deploy.cli.tables import order_lines
from prox24_deploy.config.limits import Limits
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.records import ChannelOrder, Compilation, Estimate, PairedMetric
from prox24_deploy.core.types import Verdict
from prox24_deploy.report.assemble import (
    SCHEMA_FILE,
    Report,
    load_report,
    report_schema,
    schema_text,
    write_report,
)
from prox24_deploy.report.escape import markdown, prose
from prox24_deploy.report.header import tiles_of
from prox24_deploy.report.schema import parse_report

VIEWS = {"report.json", "report.html", "summary.md", "junit.xml", "benchmark.json"}


@pytest.fixture
def records() -> Records:
    return make_records()


@pytest.fixture
def report(records: Records) -> Report:
    return records.report()


def written(report: Report, out: Path, name: str) -> str:
    write_report(report, out)
    return (out / name).read_text(encoding="utf-8")


def test_top_level_keys_are_the_published_ones(report: Report) -> None:
    assert list(report.model_dump()) == [
        "schema_version", "verdict", "sentence", "parts", "date", "contents_sha256",
        "accepted_losses", "warnings", "model",
        "options", "environment", "pruning", "recovery", "quantization", "accuracy",
        "sparsity", "latency", "not_measured", "sizes", "timings", "checks", "regressions",
        "baseline",
    ]  # fmt: skip


def test_written_report_loads_as_the_same_report(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert load_report(tmp_path / "report.json") == report
    assert {path.name for path in tmp_path.iterdir()} == VIEWS


def test_written_report_is_valid_under_the_shipped_schema(report: Report, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(written(report, tmp_path, "report.json"))
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError, match="'verdict' is a required property"):
        jsonschema.validate(without(document, "verdict"), schema)


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


def test_shipped_schema_is_up_to_date() -> None:
    text = SCHEMA_FILE.read_text(encoding="utf-8")
    assert text == schema_text(), "write it again as the docstring of release/report.py says"
    assert json.loads(text) == report_schema()


def test_same_records_give_the_same_bytes(records: Records, tmp_path: Path) -> None:
    write_report(records.report(), tmp_path / "one")
    write_report(records.report(), tmp_path / "two")
    for name in VIEWS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_totals_and_sizes_are_sums_over_the_records(report: Report) -> None:
    totals = report.pruning.totals
    pruned = [layer for layer in report.pruning.layers if layer.status == "pruned"]
    assert (totals.pruned, totals.skipped) == (35, 1)
    assert totals.parameters == 23 * 384**2 + 11 * 4 * 384**2 + 384**2
    assert totals.density == 0.5
    assert totals.relative_error == pytest.approx(
        sum(layer.relative_error or 0 for layer in pruned) / 35
    )
    assert report.sizes.weights == totals.parameters == 2 * report.sizes.non_zero_weights
    saved = report.sizes.onnx_sparse_bytes - report.sizes.packed_bytes
    assert saved == report.sizes.weights * (2 - 9 / 8)


def test_tied_weights_count_once(records: Records) -> None:
    first = records.export.sparsity[0]
    tied = (first, replace(first, node="other"))
    doubled = replace(records, export=replace(records.export, sparsity=tied))
    assert doubled.report().sizes.weights == math.prod(first.shape)


def test_parts_of_one_tensor_count_each_with_its_own_size(records: Records) -> None:
    first = records.export.sparsity[0]
    parts = tuple(replace(first, part=part, shape=(8, 4)) for part in ("[:, 0:4]", "[:, 4:8]"))
    split = replace(records, export=replace(records.export, sparsity=parts))
    sizes = split.report().sizes
    assert (sizes.weights, sizes.non_zero_weights) == (64, 32)


def test_accuracy_spells_out_the_headline_and_the_agreement(report: Report) -> None:
    accuracy = report.accuracy
    assert accuracy.metric == "STS-B Spearman correlation"
    assert accuracy.sparse == Estimate(value=0.8117, standard_error=0.0094)
    assert (accuracy.agreement_metric, accuracy.agreement) == (
        "embedding cosine",
        Estimate(value=0.9712, standard_error=0.0009),
    )


def test_limits_and_conditions_are_kept(report: Report) -> None:
    limits = Limits().over_defaults("feature-extraction", [])
    assert report.options["limits"] == limits.as_json()
    assert report.environment["conditions"] == {
        "gpu": "no NVIDIA GPU",
        "cpu": "Some Processor",
        "load average": "0.51 0.40 0.38",
    }


@pytest.mark.parametrize(
    ("change", "verdict", "regressions"),
    [
        (lambda r: r, "pass", []),
        (with_sparsity_lost, "fail", ["encoder.layer.0.attention.self.query"]),
        (with_numerics_failed, "fail", ["sparse last_hidden_state"]),
        (lambda r: with_latency(r, "pass", gated=True), "pass", []),
        (lambda r: with_latency(r, "inconclusive", gated=True), "inconclusive", []),
        (lambda r: with_latency(r, "fail", gated=False), "pass", []),
        (lambda r: with_latency(r, "inconclusive", gated=False), "pass", []),
        (
            lambda r: with_latency(r, "fail", gated=True),
            "fail",
            [f"onnxruntime, batch {batch}, sequence 128" for batch in (1, 8)],
        ),
        (
            lambda r: with_sparsity_lost(with_latency(r, "inconclusive", gated=True)),
            "fail",
            ["encoder.layer.0.attention.self.query"],
        ),
        (
            lambda r: replace(r, export=replace(r.export, sparsity=())),
            "fail",
            [f"encoder.layer.{i}.{kind}" for i in range(6) for kind in KINDS][:-1],
        ),
    ],
)
def test_verdict_and_regressions(
    records: Records,
    change: Callable[[Records], Records],
    verdict: Verdict,
    regressions: list[str],
    tmp_path: Path,
) -> None:
    report = change(records).report()
    assert report.verdict == verdict
    assert [check.name for check in report.regressions] == regressions
    write_report(report, tmp_path)
    for name in ("report.html", "summary.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert ("Regressions" in text) == bool(regressions)
        undecided = any(check.gated and check.verdict == "inconclusive" for check in report.checks)
        assert ("Undecided checks" in text) == undecided


def test_regression_says_what_is_wrong_where(records: Records) -> None:
    (regression,) = with_sparsity_lost(records).report().regressions
    assert (regression.value, regression.limit, regression.verdict) == (0.5, 0.5, "fail")
    assert regression.message == (
        "Not 2:4 along axis 0 of (384, 384) first at (4, 0): 3 of 4 values are not zero"
    )


def test_slow_sparse_engine_fails_where_it_is_gated(records: Records) -> None:
    row = make_row(1, 8.4, gated=True, device="GPU", slowdown=0.05)
    slow = replace(records, bench=replace(records.bench, latency=(row,)))
    (regression,) = slow.report().regressions
    assert regression.limit == 1 / 1.02
    assert "limit 0.980" in regression.message


def builtin_text(records: Records) -> Records:
    text = replace(records.prune.calibration, kind="builtin")
    return replace(records, prune=replace(records.prune, calibration=text))


def written_text(records: Records) -> Records:
    """Calibrated on its own text, and held to that which is built in."""
    text = replace(records.prune.calibration, kind="written", paths=())
    changed = replace(records, prune=replace(records.prune, calibration=text))
    return evaluated_on("split")(changed)


def ordered(records: Records) -> Records:
    """One layer reads its channels in another order, one could not."""
    moved, left = (
        ChannelOrder(
            layer=f"encoder.layer.{i}.output.dense",
            tensors=("encoder.layer.0.intermediate.dense.bias",) if not reason else (),
            kept_before=None if reason else 0.875,
            kept_after=None if reason else 0.9,
            order_sha256="" if reason else "d" * 64,
            reason=reason,
        )
        for i, reason in enumerate(("", "its 6 channels do not divide"))
    )
    return replace(records, prune=replace(records.prune, orders=(moved, left)))


def few_tokens(records: Records) -> Records:
    text = replace(records.prune.calibration, tokens=4096)
    layers = tuple(replace(layer, rows=4096) for layer in records.prune.layers)
    return replace(records, prune=replace(records.prune, calibration=text, layers=layers))


def few_images(records: Records) -> Records:
    """Fifty images of 50 patches each."""
    fewer = few_tokens(records)
    images = replace(fewer.prune.calibration, tokens=50, unit="image")
    layers = tuple(replace(layer, rows=2500) for layer in fewer.prune.layers)
    return replace(fewer, prune=replace(fewer.prune, calibration=images, layers=layers))


def few_transcripts(records: Records) -> Records:
    source = replace(records.prune.calibration, samples=50, targets=20, unit="recording")
    return replace(records, prune=replace(records.prune, calibration=source))


def exported_as(dtype: Any) -> Callable[[Records], Records]:
    def change(records: Records) -> Records:
        export = records.export
        (sparse,) = export.sparse
        return replace(records, export=replace(export, sparse=(replace(sparse, dtype=dtype),)))

    return change


def evaluated_on(kind: Any) -> Callable[[Records], Records]:
    def change(records: Records) -> Records:
        text = replace(records.evaluate.evaluation, kind=kind)
        return replace(records, evaluate=replace(records.evaluate, evaluation=text))

    return change


def without_targets(stage: str) -> Callable[[Records], Records]:
    """Twelve texts of one stage have no target; all others do."""

    def change(records: Records) -> Records:
        prune, evaluate = records.prune, records.evaluate
        calibration, evaluation = (
            replace(text, samples=512, targets=500 if stage == name else 512)
            for name, text in (("prune", prune.calibration), ("evaluate", evaluate.evaluation))
        )
        prune = replace(prune, calibration=calibration)
        return replace(records, prune=prune, evaluate=replace(evaluate, evaluation=evaluation))

    return change


def kernels_chosen(records: Records, chosen: int) -> Records:
    (evidence,) = records.compile.evidence
    evidence = replace(evidence, chosen=chosen, summary="dense kernels timed faster")
    compiled = replace(records.compile, evidence=(evidence,))
    return with_latency(replace(records, compile=compiled), "pass", gated=True)


def no_kernel_chosen(records: Records) -> Records:
    return kernels_chosen(records, 0)


def test_an_engine_without_a_sparse_kernel_says_so_where_it_passes(records: Records) -> None:
    sparse = kernels_chosen(records, 3).report()
    dense = no_kernel_chosen(records).report()
    for report, told in ((sparse, False), (dense, True)):
        assert report.parts.speed.verdict == "pass"
        assert ("it runs no sparse kernel" in report.parts.speed.reason) is told
        assert ("no sparse kernel runs" in tiles_of(report)[3].line) is told


def test_an_engine_is_told_from_that_of_another_graph(records: Records) -> None:
    (row, *_), (evidence,) = records.bench.latency, records.compile.evidence
    decoder = replace(evidence, graph="decoder", chosen=0)
    encoder = replace(evidence, graph="encoder", chosen=3)
    for graph, dense in (("decoder", True), ("encoder", False), ("model", False)):
        assert replace(row, graph=graph).runs_dense((decoder, encoder)) is dense


def test_an_order_is_in_the_report_and_on_the_terminal(records: Records) -> None:
    report = ordered(records).report()
    assert [order.kept_after for order in report.pruning.orders] == [0.9, None]
    assert order_lines(report.pruning.orders) == [
        "Note: encoder.layer.1.output.dense reads its channels in their old order, because its 6 "
        "channels do not divide.",
        "Layers that read their channels in another order: 1. Two of four keep 90.0% of their "
        "score in it, not 87.5%, and the model computes what it did.",
    ]
    assert order_lines(report.pruning.orders[1:]) == order_lines(report.pruning.orders)[:1]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (builtin_text, "English text that ships with Python.*--calibration PATH"),
        (written_text, "calibrated on text that it wrote itself.*--calibration PATH"),
        (written_text, "measured on built-in text"),
        (ordered, r"1 layer left with its channels in their old order \(its 6 channels do not"),
        (few_tokens, r"4,096 tokens, .* fewer than 10 inputs per feature to 5 layers.*15,360 tok"),
        (few_images, r"50 images, .* fewer than 10 .* to 35 layers of up to 1,536 .* 308 images"),
        (exported_as("float32"), "float32, for which TensorRT has no sparse kernels.*float16"),
        (exported_as("bfloat16"), "bfloat16 files were not checked"),
        (evaluated_on("split"), "measured on held-out calibration text.*--evaluation PATH"),
        (evaluated_on("builtin"), "measured on built-in text"),
        (without_targets("prune"), r"12 of 512 texts came .* was calibrated on writing .* JSONL"),
        (without_targets("evaluate"), r"12 of 512 texts .* the decoder was evaluated on writing"),
        (
            few_transcripts,
            r"30 of 50 recordings came without .* calibrated .* \.txt file beside each",
        ),
        (all_skipped, r"36 layers left dense \(too small\): .* and 28 more in the table of layers"),
        (no_kernel_chosen, "it runs no sparse kernels .dense kernels timed faster"),
    ],
)
def test_warning_is_given_when_it_applies_and_only_then(
    records: Records, change: Callable[[Records], Records], warning: str, tmp_path: Path
) -> None:
    assert not any(re.search(warning, text) for text in records.report().warnings)
    changed = change(records).report()
    (found,) = [text for text in changed.warnings if re.search(warning, text)]
    write_report(changed, tmp_path)
    assert str(prose(found)) in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert markdown(found) in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_default_warnings_name_the_skipped_layer_and_the_ungated_backend(report: Report) -> None:
    assert report.warnings == (
        "Backend onnxruntime has no sparse kernels: dense and sparse are expected to take the same "
        "time, and its latency does not gate the release.",
        "1 layer left dense (listed under ignore in the recipe): encoder.layer.5.output.dense.",
    )


def test_unknown_sparse_kernels_are_reported_as_unknown(records: Records) -> None:
    (evidence,) = records.compile.evidence
    unknown = replace(evidence, eligible=None, chosen=None, summary="the builder does not say")
    changed = replace(records, compile=replace(records.compile, evidence=(unknown,)))
    warnings = with_latency(changed, "pass", gated=True).report().warnings
    assert warnings[0] == (
        "Backend onnxruntime: it is unknown whether it runs sparse kernels "
        "(the builder does not say)."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 5000, r"is not readable JSON \(it nests deeper than 100 levels\)"),
        ('{"schema_version": 2, "x": NaN}', "holds a number that is not finite"),
        ("[1]", "has schema_version None, expected 2"),
        ('{"schema_version": 1}', "has schema_version 1, expected 2; build the bundle again"),
        ('{"schema_version": 2}', "is damaged at 'verdict': Field required"),
    ],
)
def test_report_that_cannot_be_loaded(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(BundleError, match="No such file"):
        load_report(path)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        load_report(path)


def test_unknown_key_is_an_error(report: Report, tmp_path: Path) -> None:
    document = json.loads(written(report, tmp_path, "report.json"))
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**document, "speed": list(range(99))}), encoding="utf-8")
    with pytest.raises(BundleError, match=r"'speed': Extra inputs are not permitted, got \[0, 1"):
        load_report(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_accuracy_that_is_not_finite_fails_the_release(
    records: Records, value: float, tmp_path: Path
) -> None:
    headline, *rest = records.evaluate.metrics
    assert isinstance(headline, PairedMetric)
    broken = replace(
        headline, sparse=Estimate(value=value, standard_error=0.1), values=(value, 1.0)
    )
    changed = replace(records, evaluate=replace(records.evaluate, metrics=(broken, *rest)))
    report = changed.report()
    assert (report.verdict, report.accuracy.sparse) == ("fail", None)
    assert report.accuracy.metrics[0].values == ()
    (regression,) = report.regressions
    assert regression.message == f"dense 0.8203, sparse {value}; a figure is not finite"
    write_report(report, tmp_path)
    assert load_report(tmp_path / "report.json") == report


def test_layer_error_or_difference_that_is_not_finite_fails_the_release(
    records: Records, tmp_path: Path
) -> None:
    first, *rest = records.prune.layers
    changed = with_layers(records, (replace(first, held_out_error=math.inf), *rest))
    wrong = replace(records.export.numerics[0], max_abs_difference=math.nan, passed=False)
    changed = replace(changed, export=replace(changed.export, numerics=(wrong,)))
    report = changed.report()
    assert report.pruning.layers[0].held_out_error is None
    assert [(check.kind, check.value) for check in report.regressions] == [
        ("pruning", None),
        ("numerics", None),
    ]
    write_report(report, tmp_path)
    assert load_report(tmp_path / "report.json") == report


def test_other_figure_that_is_not_finite_is_refused_and_nothing_is_written(
    report: Report, tmp_path: Path
) -> None:
    broken = report.model_copy(update={"timings": {"prune": math.nan}})
    with pytest.raises(BundleError, match=r"'timings\.prune'"):
        write_report(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("max_loss", "verdict"), [(0.031, "pass"), (0.029, "inconclusive"), (0.02, "fail")]
)
def test_the_limit_of_a_budget_gates_the_loss_on_evaluation_text(
    records: Records, tmp_path: Path, max_loss: float, verdict: Verdict
) -> None:
    """The cosine is 0.97 ± 0.001: the loss 0.030 lies within, about and beyond the limits."""
    report = with_budget(records, max_loss, cosine=0.97).report()
    assert report.verdict == verdict
    (check,) = [check for check in report.checks if "--max-loss" in check.name]
    assert check.value == pytest.approx(0.03)
    assert check.limit == max_loss
    assert "17 of 35 layers costs 0.03 ± 0.001 1 - embedding cosine" in check.message
    page = written(report, tmp_path, "report.html")
    assert "17 of 35 layers were pruned" in page
    assert load_report(tmp_path / "report.json") == report


def test_a_budget_without_a_limit_of_loss_gates_nothing(records: Records, tmp_path: Path) -> None:
    report = with_budget(records, None).report()
    assert report.verdict == "pass"
    assert not any("--max-loss" in check.name for check in report.checks)
    assert ">limit<" not in written(report, tmp_path, "report.html")


def test_a_budget_of_a_decoder_is_held_to_the_difference_of_log_perplexity(
    records: Records,
) -> None:
    budgeted = with_budget(records, 0.25)
    assert budgeted.prune.sensitivity is not None
    prune = replace(
        budgeted.prune,
        sensitivity=replace(budgeted.prune.sensitivity, metric="log-perplexity"),
    )
    metric = PairedMetric(
        name="log-perplexity",
        higher_is_better=False,
        samples=64,
        dense=Estimate(value=2.5, standard_error=0.05),
        sparse=Estimate(value=2.8, standard_error=0.05),
        difference=Estimate(value=0.3, standard_error=0.01),
    )
    evaluate = replace(budgeted.evaluate, metrics=(metric,))
    report = replace(budgeted, prune=prune, evaluate=evaluate).report()
    assert report.verdict == "fail"
    assert report.regressions[0].value == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no metric among"):
        replace(budgeted, prune=prune).report()


def test_layers_over_a_budget_share_one_warning(records: Records) -> None:
    reason = "over the budget of --max-loss 0.1: pruned alone it costs"
    layers = [
        skipped(layer, f"{reason} 0.{i + 2} ± 0.01 log-perplexity")
        for i, layer in enumerate(records.prune.layers[:3])
    ]
    report = with_layers(records, (*layers, *records.prune.layers[3:])).report()
    (warning,) = [text for text in report.warnings if "budget" in text]
    assert warning.startswith("3 layers left dense (over the budget of --max-loss 0.1): encoder.")


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300])
@pytest.mark.parametrize("key", ["median_ms", "samples_ms", "speedup"])
def test_times_that_cannot_have_been_measured_are_damage(key: str, value: float) -> None:
    made = json.loads(make_records().report().model_dump_json())
    row = made["latency"][0]
    if key == "speedup":
        row["speedup"]["low"] = value
    else:
        row["sparse"][key] = value if key == "median_ms" else [value]
    with pytest.raises(BundleError, match=r"is damaged at 'latency': .* cannot have been measured"):
        parse_report(json.dumps(made).encode(), "r.json")
    row["sparse"]["samples_ms"] = []
    with pytest.raises(BundleError, match="is damaged at 'latency'"):
        parse_report(json.dumps(made).encode(), "r.json")


def test_layers_whose_error_says_nothing_are_warned_of_by_name() -> None:
    records = make_records()
    first, second, *others = records.prune.layers
    notes = ("all its weights are zero", "its inputs are all zero")
    layers = (replace(first, note=notes[0]), replace(second, note=notes[1]), *others)
    report = replace(records, prune=replace(records.prune, layers=layers)).report()
    assert f"The error says nothing of 1 layer ({notes[0]}): {first.name}." in report.warnings
    assert f"The error says nothing of 1 layer ({notes[1]}): {second.name}." in report.warnings


def test_experts_with_few_tokens_are_named_those_with_the_fewest_first() -> None:
    records = make_records()
    first, second, *others = records.prune.layers
    few, none = replace(first, rows=9, pull=0.5), replace(second, rows=0, pull=1.0)
    report = replace(records, prune=replace(records.prune, layers=(few, none, *others))).report()
    (told,) = [text for text in report.warnings if "of experts" in text]
    assert told.startswith(
        "2 layers of experts had fewer than 4/3 calibration tokens per feature and kept closer to "
        f"the dense weights: {second.name} (0 for {second.shape[1]:,}), {first.name} (9 for "
    )
    # What all layers lack is not told by an expert that nothing reaches.
    assert not any(
        second.name in text or "1,000,000" in text for text in report.warnings if text != told
    )


def test_an_engine_that_is_not_compiled_is_named_with_the_reason() -> None:
    records = make_records()
    engines = tuple(
        replace(engine, backend="cusparselt", compilation=Compilation(reason=reason))
        for engine, reason in zip(records.compile.engines, ("--eager", ""), strict=True)
    )
    report = replace(records, compile=replace(records.compile, engines=engines)).report()
    (found,) = (warning for warning in report.warnings if "torch.compile" in warning)
    assert found.startswith("The dense engine of backend cusparselt runs without torch.compile (--")
