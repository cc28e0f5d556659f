import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_metrics, make_records, make_row, quantised
from junitparser import JUnitXml
from markdown_it import MarkdownIt
from pydantic import JsonValue

from prox24_deploy.config.limits import GivenLimits, MetricLimits, MetricTable
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.core.intervals import student_95
from prox24_deploy.core.records import Estimate, Interval, LatencyRow, PairedMetric
from prox24_deploy.core.types import Verdict
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.comparability import KEYS
from prox24_deploy.regression.compare import compare_reports, held_against
from prox24_deploy.regression.figures import row_path
from prox24_deploy.regression.views import (
    render_benchmark,
    render_junit,
    render_markdown,
    write_comparison,
)
from prox24_deploy.report.schema import Change, Comparison, Report
from prox24_deploy.report.wording import limits_in_words

COSINE = "embedding cosine"
SPEED_UP = "speed-up/onnxruntime/batch=1,sequence=128"
LATENCY = "latency/onnxruntime/batch=1,sequence=128"
# Standard errors that leave nothing open.
SHARP = 1e-6


def limits(**given: float) -> MetricLimits:
    return MetricLimits.model_validate({k.replace("_", "-"): v for k, v in given.items()})


def with_metric(report: Report, name: str, value: float, error: float = SHARP) -> Report:
    """The report with one metric; perplexity is better when lower, all else when higher."""
    found = Estimate(value=value, standard_error=error)
    metric = PairedMetric(
        name=name,
        higher_is_better=name != "perplexity",
        samples=64,
        dense=None,
        sparse=found,
        difference=None,
    )
    accuracy = report.accuracy.model_copy(update={"metrics": (metric,)})
    return report.model_copy(update={"accuracy": accuracy})


def with_row(report: Report, row: LatencyRow) -> Report:
    return report.model_copy(update={"latency": (row,)})


@pytest.fixture
def report() -> Report:
    return make_records(gated=True).report()


def compared(new: Report, old: Report, table: MetricTable | None = None) -> Comparison:
    return compare_reports(
        new, Baseline(source="before", report=old), limits=GivenLimits(metrics=table or {})
    )


def change_of(found: Comparison, name: str) -> Change:
    return next(change for change in found.changes if change.name == name)


@pytest.mark.parametrize(
    ("given", "before", "after", "verdict"),
    [
        ({"threshold": 0.9}, 0.95, 0.91, "pass"),
        ({"threshold": 0.9}, 0.85, 0.89, "fail"),
        ({"max_degradation": 0.01}, 0.95, 0.945, "pass"),
        ({"max_degradation": 0.01}, 0.95, 0.935, "fail"),
        ({"max_degradation": 0.01}, 0.95, 0.99, "pass"),
        ({"max_degradation_percent": 1}, 0.95, 0.945, "pass"),
        ({"max_degradation_percent": 1}, 0.95, 0.94, "fail"),
        ({"min_improvement": 0.01}, 0.95, 0.97, "pass"),
        ({"min_improvement": 0.01}, 0.95, 0.955, "fail"),
        ({"max_degradation": 0.1, "threshold": 0.9}, 0.95, 0.89, "fail"),
    ],
)
def test_each_limit_at_both_sides_where_higher_is_better(
    report: Report, given: dict[str, float], before: float, after: float, verdict: Verdict
) -> None:
    new, old = (with_metric(report, COSINE, value) for value in (after, before))
    assert change_of(compared(new, old, {"*": limits(**given)}), COSINE).verdict == verdict


@pytest.mark.parametrize(
    ("given", "after", "verdict"),
    [
        ({"threshold": 12.5}, 12.4, "pass"),
        ({"threshold": 12.5}, 12.6, "fail"),
        ({"max_degradation_percent": 5}, 12.5, "pass"),
        ({"max_degradation_percent": 5}, 12.7, "fail"),
        ({"min_improvement": 0.5}, 11.4, "pass"),
        ({"min_improvement": 0.5}, 11.6, "fail"),
    ],
)
def test_the_metric_itself_says_that_lower_is_better(
    report: Report, given: dict[str, float], after: float, verdict: Verdict
) -> None:
    new, old = (with_metric(report, "perplexity", value) for value in (after, 12.0))
    change = change_of(compared(new, old, {"perplexity": limits(**given)}), "perplexity")
    assert change.verdict == verdict
    assert change.worse is not None
    assert change.worse.value == pytest.approx(after - 12.0)


def test_an_interval_that_straddles_its_limit_is_inconclusive(report: Report) -> None:
    new = with_metric(report, COSINE, 0.945, error=0.004)
    old = with_metric(report, COSINE, 0.95, error=0.004)
    found = compared(new, old, {COSINE: limits(max_degradation=0.01)})
    assert change_of(found, COSINE).verdict == "inconclusive"
    assert found.verdict == "inconclusive"
    near = with_metric(report, COSINE, 0.903, error=0.004)
    assert change_of(compared(near, near, {COSINE: limits(threshold=0.9)}), COSINE).verdict == (
        "inconclusive"
    )


@pytest.mark.parametrize(("gap", "verdict"), [(1.9, "pass"), (2.1, "fail")])
def test_standard_errors_are_those_of_the_difference(
    report: Report, gap: float, verdict: Verdict
) -> None:
    error = 0.003
    old = with_metric(report, COSINE, 0.95, error)
    new = with_metric(report, COSINE, 0.95 - gap * error * 2**0.5, error)
    table = {COSINE: limits(max_degradation_standard_errors=2)}
    assert change_of(compared(new, old, table), COSINE).verdict == verdict


def test_limits_are_told_in_words() -> None:
    every = limits(
        threshold=2, max_degradation=0, max_degradation_percent=3,
        max_degradation_standard_errors=2, min_improvement=0.5,
    )  # fmt: skip
    assert limits_in_words(every, higher_is_better=False) == (
        "at most 2, no worse, at most 3 % worse, at most 2 standard errors worse, "
        "at least 0.5 better"
    )
    assert limits_in_words(limits(threshold=2, max_degradation=1), higher_is_better=True) == (
        "at least 2, at most 1 worse"
    )


def test_an_empty_table_lifts_the_gate_and_the_last_glob_wins(report: Report) -> None:
    new, old = with_metric(report, COSINE, 0.5), with_metric(report, COSINE, 0.95)
    assert compared(new, old).verdict == "fail"
    lifted = compared(new, old, {COSINE: MetricLimits()})
    assert (lifted.verdict, change_of(lifted, COSINE).gated) == ("pass", False)
    strict = {COSINE: MetricLimits(), "embedding*": limits(max_degradation=0.01)}
    assert compared(new, old, strict).verdict == "fail"


def test_the_limits_of_the_baseline_apply_and_not_those_of_the_report(report: Report) -> None:
    loose = {"metrics": {"*": {"max-degradation-percent": 90}}}
    new = with_metric(report, COSINE, 0.5)
    new = new.model_copy(update={"options": {**new.options, "limits": loose}})
    assert compared(new, with_metric(report, COSINE, 0.95)).verdict == "fail"
    assert compared(with_metric(report, COSINE, 0.5), with_metric(new, COSINE, 0.95)).verdict == (
        "pass"
    )


def test_a_missing_figure_fails_by_name_unless_nothing_gates_it(report: Report) -> None:
    new = with_metric(report, "other", 0.5)
    found = compared(new, with_metric(report, COSINE, 0.95))
    missing, added = change_of(found, COSINE), change_of(found, "other")
    assert (missing.status, missing.verdict, missing.gated) == ("missing", "fail", True)
    assert (added.status, added.verdict, added.gated) == ("new", "not gated", False)
    assert found.verdict == "fail"
    lifted = compared(new, with_metric(report, COSINE, 0.95), {COSINE: MetricLimits()})
    assert lifted.verdict == "pass"


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_the_verdict_of_the_release_itself_counts(report: Report, verdict: Verdict) -> None:
    first, *rest = report.checks
    broken = first.model_copy(update={"gated": True, "verdict": verdict})
    new = report.model_copy(update={"checks": (broken, *rest)})
    assert compared(with_metric(new, COSINE, 1.0), with_metric(report, COSINE, 1.0)).verdict == (
        verdict
    )


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("layers/pruned", lambda r: pruned(r, r.pruning.totals.pruned - 1)),
        ("layers/proven", lambda r: sparsity(r, tensors=r.sparsity.tensors[1:])),
        ("kernels/onnxruntime", lambda r: chosen(r, 34)),
        ("size/onnx sparse", lambda r: sized(r, 1.06)),
    ],
)
def test_fewer_layers_fewer_kernels_or_a_larger_file_fail(
    report: Report, figure: str, change: Callable[[Report], Report]
) -> None:
    found = compared(change(report), report)
    assert change_of(found, figure).verdict == "fail"
    assert change_of(compared(report, report), figure).verdict == "pass"


def pruned(report: Report, number: int) -> Report:
    totals = report.pruning.totals.model_copy(update={"pruned": number})
    return report.model_copy(
        update={"pruning": report.pruning.model_copy(update={"totals": totals})}
    )


def sparsity(report: Report, **update: Any) -> Report:
    return report.model_copy(update={"sparsity": report.sparsity.model_copy(update=update)})


def chosen(report: Report, number: int | None) -> Report:
    (engine,) = report.sparsity.engines
    return sparsity(report, engines=(replace(engine, chosen=number),))


def sized(report: Report, factor: float) -> Report:
    sizes = report.sizes
    update = {"onnx_sparse_bytes": round(sizes.onnx_sparse_bytes * factor)}
    return report.model_copy(update={"sizes": sizes.model_copy(update=update)})


def test_kernels_that_are_no_longer_known_are_missing(report: Report) -> None:
    found = change_of(compared(chosen(report, None), report), "kernels/onnxruntime")
    assert (found.status, found.verdict) == ("missing", "fail")
    both = compared(chosen(report, None), chosen(report, None))
    assert "kernels/onnxruntime" not in {change.name for change in both.changes}


def row(report: Report, slowdown: float = 0.0, drift: float = 0.0, *, gated: bool = True) -> Report:
    made = make_row(1, 8.4 * (1 + drift), gated=gated, device="NVIDIA H200", slowdown=slowdown)
    return with_row(report, made)


def test_a_slower_sparse_engine_fails_both_figures(report: Report) -> None:
    found = compared(row(report, slowdown=0.2), row(report))
    assert change_of(found, SPEED_UP).verdict == "fail"
    assert change_of(found, LATENCY).verdict == "fail"


def test_what_slows_both_twins_leaves_the_latency_open(report: Report) -> None:
    found = compared(row(report, drift=0.2), row(report))
    assert change_of(found, SPEED_UP).verdict == "pass"
    latency = change_of(found, LATENCY)
    assert latency.verdict == "inconclusive"
    assert "so the machine may have been slower" in latency.message


def test_a_threshold_on_latency_holds_whatever_the_dense_twin_does(report: Report) -> None:
    table = {LATENCY: limits(threshold=9)}
    found = compared(row(report, drift=0.2), row(report), table)
    assert change_of(found, LATENCY).verdict == "fail"


def test_latency_without_sparse_kernels_is_gated_by_a_file_alone(report: Report) -> None:
    new, old = row(report, slowdown=0.5, gated=False), row(report, gated=False)
    assert not change_of(compared(new, old), LATENCY).gated
    assert not change_of(compared(new, old), SPEED_UP).gated
    named = compared(new, old, {"latency/*": limits(max_degradation_percent=10)})
    assert change_of(named, LATENCY).verdict == "fail"


DIFFERENT: dict[str, Callable[[Report], Report]] = {
    "model": lambda r: r.model_copy(update={"model": replace(r.model, architecture="Other")}),
    "recipe": lambda r: r.model_copy(update={"options": {**r.options, "recipe_sha256": "f"}}),
    "evaluation": lambda r: r.model_copy(
        update={
            "accuracy": r.accuracy.model_copy(
                update={"evaluation": replace(r.accuracy.evaluation, sha256="0")}
            )
        }
    ),
    "dtype": lambda r: r.model_copy(update={"options": {**r.options, "dtype": "float32"}}),
    "quantization": lambda r: r.model_copy(
        update={"quantization": quantised(make_records(2)).report().quantization}
    ),
    "shapes": lambda r: r.model_copy(update={"latency": r.latency[:1]}),
    "backend": lambda r: r.model_copy(
        update={"environment": {**r.environment, "onnxruntime": "9.9"}}
    ),
    "device": lambda r: sparsity(r, engines=(replace(r.sparsity.engines[0], device="other"),)),
    "gpu": lambda r: r.model_copy(update={"environment": {**r.environment, "gpu": "other"}}),
    "driver": lambda r: r.model_copy(update={"environment": {**r.environment, "driver": "1"}}),
    "processor": lambda r: r.model_copy(update={"environment": {**r.environment, "cores": "2"}}),
}


@pytest.mark.parametrize("key", KEYS)
def test_unlike_reports_are_refused_by_the_name_of_what_differs(report: Report, key: str) -> None:
    new = DIFFERENT[key](report)
    with pytest.raises(BundleError, match=rf"baseline before: {key} is .* with --allow {key}\.$"):
        compared(new, report)
    found = compare_reports(new, Baseline(source="before", report=report), allow=[key])
    assert [difference.key for difference in found.allowed] == [key]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "evaluation",
            "'other.txt (sha256 012345678901)' and was 'evaluation.txt (sha256 cccccccccccc)'",
        ),
        ("recipe", "'mine.toml (sha256 012345678901)' and was 'of bert (sha256 "),
    ],
)
def test_a_refusal_names_files_and_no_whole_hash(report: Report, key: str, said: str) -> None:
    digest = "0123456789" * 6 + "0123"
    text = replace(report.accuracy.evaluation, sha256=digest, paths=("/somewhere/other.txt",))
    changes: dict[str, dict[str, object]] = {
        "evaluation": {"accuracy": report.accuracy.model_copy(update={"evaluation": text})},
        "recipe": {
            "options": {**report.options, "recipe": "/a/mine.toml", "recipe_sha256": digest}
        },
    }
    with pytest.raises(BundleError) as refused:
        compared(report.model_copy(update=changes[key]), report)
    assert said in str(refused.value)
    assert not re.search(r"[0-9a-f]{16}", str(refused.value))


def test_another_machine_that_was_allowed_gates_no_milliseconds(report: Report) -> None:
    new = DIFFERENT["gpu"](row(report, drift=0.5))
    found = compare_reports(new, Baseline(source="before", report=row(report)), allow=["gpu"])
    assert not change_of(found, LATENCY).gated
    assert change_of(found, SPEED_UP).gated


def test_allow_takes_known_keys_only(report: Report) -> None:
    with pytest.raises(UsageError, match="--allow weather names nothing that is compared"):
        compare_reports(report, Baseline(source="b", report=report), allow=["weather"])


def test_a_regression_that_was_accepted_does_not_count_again(report: Report) -> None:
    old, new = with_metric(report, COSINE, 0.95), with_metric(report, COSINE, 0.5)
    failed = held_against(new, Baseline(source="before", report=old))
    assert failed.verdict == "fail"
    assert compared(failed, failed).verdict == "pass"


def test_encoder_and_decoder_have_latencies_of_their_own() -> None:
    rows = [
        replace(make_row(1, 2.0, gated=True, device="a card"), graph=graph)
        for graph in ("encoder", "decoder", "model")
    ]
    assert [row_path(row) for row in rows] == [
        "onnxruntime/encoder/batch=1,sequence=128",
        "onnxruntime/decoder/batch=1,sequence=128",
        "onnxruntime/batch=1,sequence=128",
    ]


def test_a_report_holds_what_its_comparison_found(report: Report) -> None:
    old = with_metric(report, COSINE, 0.95)
    worse = held_against(with_metric(report, COSINE, 0.5), Baseline(source="before", report=old))
    assert worse.verdict == "fail"
    assert [check.name for check in worse.regressions] == [COSINE]
    assert worse.regressions[0].kind == "baseline"
    assert "limit: at most 2 % worse" in worse.regressions[0].message
    unlike = held_against(DIFFERENT["gpu"](old), Baseline(source="before", report=old))
    assert (unlike.verdict, unlike.baseline) == ("inconclusive", None)
    assert "gpu is" in unlike.warnings[-1]


HOSTILE = '<script>|`x`|[a](b) \x00 & "quotes"'


@pytest.fixture
def hostile(report: Report) -> Comparison:
    new, old = with_metric(report, HOSTILE, 0.5), with_metric(report, HOSTILE, 0.9)
    return compare_reports(
        new, Baseline(source=HOSTILE, report=old, reason=HOSTILE, date="2026-01-01")
    )


def test_markdown_keeps_names_as_they_are(hostile: Comparison) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(render_markdown(hostile))
    inner = [child for token in tokens for child in token.children or ()]
    assert not [
        t for t in (*tokens, *inner) if t.type in {"html_block", "html_inline", "link_open"}
    ]
    rows = [i for i, token in enumerate(tokens) if token.type == "tr_open"]
    cells = [tokens[i + 2].children or [] for i in rows]
    names = [cell[0].content for cell in cells if cell and cell[0].type == "code_inline"]
    assert any(name.startswith("<script>|'x'|[a](b)") for name in names)


def test_junit_keeps_names_as_they_are(hostile: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes(render_junit(hostile))
    names = [case.name for suite in JUnitXml.fromfile(str(path)) for case in suite]
    assert HOSTILE.replace("\x00", "\ufffd") in names
    xml = JUnitXml.fromfile(str(path))
    assert (xml.failures, xml.errors) == (1, 0)


def test_benchmark_has_the_figures_of_which_less_is_better(report: Report) -> None:
    entries = json.loads(render_benchmark(compared(report, report)))
    names = {entry["name"] for entry in entries}
    assert {LATENCY, "size/packed"} <= names
    assert not {SPEED_UP, COSINE, "layers/pruned"} & names
    assert all(entry.keys() == {"name", "unit", "value", "range"} for entry in entries)


def test_written_json_is_the_comparison(report: Report, tmp_path: Path) -> None:
    found = compared(report, report)
    write_comparison(found, tmp_path)
    text = (tmp_path / "compare.json").read_text(encoding="utf-8")
    assert Comparison.model_validate_json(text) == found


def test_without_values_per_sample_the_interval_is_that_of_independent_samples(
    report: Report,
) -> None:
    first = make_metrics()[1]
    assert first.agreement is not None
    change = change_of(compared(report, report), COSINE)
    width = 2 * student_95(first.samples - 1) * 2**0.5 * first.agreement.standard_error
    assert change.worse is not None
    assert change.worse.high - change.worse.low == pytest.approx(width)
    assert isinstance(change.worse, Interval)


@pytest.mark.parametrize(
    ("limits", "where"),
    [
        (7, "options.limits"),
        ([], "options.limits"),
        ({"metrics": 7}, "options.limits.metrics"),
        ({"metrics": {"*": {"max-degradation": "1"}}}, "options.limits.metrics.*.max-degradation"),
        ({"max_slowdown": None}, "options.limits.max_slowdown"),
        ({"slowdown": 1}, "options.limits.slowdown"),
    ],
)
def test_damaged_limits_of_a_baseline_are_named(limits: JsonValue, where: str) -> None:
    report = make_records().report()
    damaged = report.model_copy(update={"options": {**report.options, "limits": limits}})
    message = rf"^Baseline old\.json is damaged at '{re.escape(where)}': .*; restore it\.$"
    with pytest.raises(BundleError, match=message):
        compare_reports(report, Baseline(source="old.json", report=damaged), limits=GivenLimits())
