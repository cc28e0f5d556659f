"""Accuracy through engines in checks, warnings, figures and every view of the report."""

import json
from dataclasses import replace

import pytest
from builders import make_records

from prox24_deploy.config.limits import DEFAULT_METRICS, Limits, limits_of
from prox24_deploy.core.accuracy import (
    DecodeAccuracy,
    EngineAccuracy,
    EngineAccuracyResult,
    ParityCheck,
    RowsCheck,
)
from prox24_deploy.core.records import DirectMetric, Estimate, NotMeasured, PairedMetric
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.compare import compare_reports
from prox24_deploy.report.assemble import Report, assemble_report
from prox24_deploy.report.engine_checks import engine_checks, engine_warnings
from prox24_deploy.report.render import render_benchmark, render_html, render_junit, render_summary
from prox24_deploy.report.schema import parse_report

VALUES = (3.0, 3.2, 3.4, 3.1)
METRICS = (
    PairedMetric(
        name="perplexity",
        higher_is_better=False,
        samples=4,
        dense=Estimate(value=20.0, standard_error=0.5),
        sparse=Estimate(value=21.0, standard_error=0.5),
        difference=None,
        values=VALUES,
    ),
    DirectMetric(
        name="KL divergence",
        higher_is_better=False,
        samples=4,
        agreement=Estimate(value=0.2, standard_error=0.01),
    ),
)
CLOSE = ParityCheck(
    twin="sparse",
    metric="log-perplexity",
    samples=4,
    torch=Estimate(value=3.0, standard_error=0.1),
    engine=Estimate(value=3.001, standard_error=0.1),
    difference=Estimate(value=0.001, standard_error=0.0001),
    agreement=None,
    deviation=0.0008,
    tolerance=0.01,
    passed=True,
)
FAR = replace(
    CLOSE,
    engine=Estimate(value=3.5, standard_error=0.1),
    difference=Estimate(value=0.5, standard_error=0.1),
    deviation=0.3,
    passed=False,
)
TOLD = ParityCheck(
    twin="dense",
    metric="top-1 agreement",
    samples=4,
    torch=None,
    engine=None,
    difference=None,
    agreement=Estimate(value=0.99, standard_error=0.01),
    deviation=None,
    tolerance=None,
    passed=None,
)
LOST = ParityCheck(
    twin="dense",
    metric="KL divergence",
    samples=4,
    torch=None,
    engine=None,
    difference=None,
    agreement=None,
    deviation=None,
    tolerance=0.01,
    passed=False,
)


EQUAL = RowsCheck(twin="dense", rows=4, difference=0.0, tolerance=0.01, passed=True)
ROUNDED = replace(EQUAL, twin="sparse", difference=0.0025)
TORN = replace(EQUAL, twin="sparse", difference=0.75, passed=False)


def engine(
    *parity: ParityCheck, longest: int | None = None, rows: tuple[RowsCheck, ...] = (EQUAL,)
) -> EngineAccuracy:
    return EngineAccuracy(
        backend="onnxruntime",
        device="CPU <x>",
        dtype="float16",
        samples=4,
        tokens=256,
        available=16,
        longest=longest,
        metrics=METRICS,
        parity=parity,
        seconds=1.5,
        equal_rows=rows,
    )


def report_of(result: EngineAccuracyResult) -> Report:
    records = make_records()
    plain = records.report()
    made = assemble_report(
        records.model, replace(records.results, accuracy=result), Limits(),
        options=plain.options, environment={}, sizes={}, timings={},
    )  # fmt: skip
    return parse_report(made.model_dump_json().encode(), "memory")


def test_a_departure_fails_and_what_informs_does_not_gate() -> None:
    checks = engine_checks(EngineAccuracyResult(engines=(engine(CLOSE, FAR, TOLD, LOST),)))
    assert [(c.name, c.gated, c.verdict) for c in checks] == [
        ("onnxruntime sparse log-perplexity", True, "pass"),
        ("onnxruntime sparse log-perplexity", True, "fail"),
        ("onnxruntime dense top-1 agreement", False, "not gated"),
        ("onnxruntime dense KL divergence", True, "fail"),
        ("onnxruntime dense equal rows", True, "pass"),
    ]
    assert "Engine 3.5, PyTorch 3, difference 0.5 ± 0.1 over 4 samples" in checks[1].message
    assert "do not ship it, export with another --dtype" in checks[1].message
    assert "a figure that is not finite" in checks[3].message
    report = report_of(EngineAccuracyResult(engines=(engine(FAR),)))
    assert report.verdict == "fail"
    assert [check.name for check in report.regressions] == ["onnxruntime sparse log-perplexity"]


def test_equal_rows_with_unequal_outputs_fail() -> None:
    result = EngineAccuracyResult(engines=(engine(rows=(EQUAL, ROUNDED, TORN)),))
    checks = engine_checks(result)
    assert [(c.value, c.limit, c.verdict) for c in checks] == [
        (0.0, 0.01, "pass"), (0.0025, 0.01, "pass"), (0.75, 0.01, "fail"),
    ]  # fmt: skip
    assert "4 equal rows of one batch give outputs that are equal bit by bit" in checks[0].message
    assert checks[1].message.endswith("differ by 0.0025 of the largest, as rounding may explain")
    assert "which rounding does not explain; do not ship this engine" in checks[2].message
    report = report_of(result)
    assert (report.verdict, [check.name for check in report.regressions]) == (
        "fail", ["onnxruntime sparse equal rows"],
    )  # fmt: skip
    page = render_html(report)
    assert "through the dense engine: equal outputs, bit by bit." in page
    assert "outputs differ by 0.75 of the largest, at most 0.01: fail." in page


def test_engines_of_one_row_are_not_checked_and_that_is_said() -> None:
    result = EngineAccuracyResult(engines=(engine(CLOSE, rows=()),))
    (warning,) = engine_warnings(result, METRICS)
    assert "was not checked, they take one row; pass --shapes batch=1,2" in warning


def test_what_cannot_run_is_told_and_what_breaks_fails() -> None:
    missing = NotMeasured(backend="tensorrt-rtx", reason="this machine has no NVIDIA GPU")
    broken = NotMeasured(backend="onnxruntime", reason="output 'logits' is NaN")
    result = EngineAccuracyResult(not_measured=(missing,))
    report = report_of(result)
    assert report.verdict == "pass"
    assert "Accuracy through backend tensorrt-rtx was not measured: this machine" in "".join(
        report.warnings
    )
    for text in (render_html(report), render_summary(report), render_junit(report).decode()):
        assert "tensorrt-rtx" in text
    report = report_of(EngineAccuracyResult(failed=(broken,)))
    assert report.verdict == "fail"
    assert "could not be measured: output 'logits' is NaN" in report.regressions[0].message
    assert "no usable output" in render_html(report)
    assert "no usable output" in render_summary(report)


def test_samples_that_were_cut_are_said() -> None:
    assert not list(engine_warnings(EngineAccuracyResult(engines=(engine(CLOSE),)), METRICS))
    (warning,) = engine_warnings(
        EngineAccuracyResult(engines=(engine(CLOSE, longest=128),)), METRICS
    )
    assert "samples cut to 128 tokens" in warning


def test_a_metric_that_engines_lack_is_named() -> None:
    asked = (replace(METRICS[0], name="word error rate"), *METRICS)
    (warning,) = engine_warnings(EngineAccuracyResult(engines=(engine(CLOSE),)), asked)
    assert warning.startswith("Not measured through the engines of backend onnxruntime")
    assert warning.endswith(": word error rate.")


def test_every_view_shows_the_engine() -> None:
    report = report_of(EngineAccuracyResult(engines=(engine(CLOSE, FAR, TOLD),)))
    html = render_html(report)
    assert "Through onnxruntime, float16" in html
    assert "CPU &lt;x&gt;" in html
    assert "on 4 of 16 samples" in html
    assert '<td class="not-gated" data-title="Verdict">not gated</td>' in html
    assert "| perplexity through onnxruntime (4 of 16 samples; deviates from PyTorch)" in (
        render_summary(report)
    )
    entries = {entry["name"]: entry["value"] for entry in json.loads(render_benchmark(report))}
    assert entries["sparse perplexity, onnxruntime"] == 21.0


def test_decoding_is_judged_and_shown_beside_reading_at_once() -> None:
    decode = DecodeAccuracy(samples=4, tokens=64, past=47, metrics=METRICS, parity=(CLOSE, FAR))
    found = replace(engine(CLOSE), decode=decode)
    checks = engine_checks(EngineAccuracyResult(engines=(found,)))
    assert [(check.name, check.verdict) for check in checks] == [
        ("onnxruntime sparse log-perplexity", "pass"),
        ("onnxruntime sparse log-perplexity, decoding", "pass"),
        ("onnxruntime sparse log-perplexity, decoding", "fail"),
        ("onnxruntime dense equal rows", "pass"),
    ]
    report = report_of(EngineAccuracyResult(engines=(found,)))
    assert report.verdict == "fail"
    html = render_html(report)
    assert "the last 64 tokens in all, decoded one at a time" in html
    assert "keys and values of at least 47 before" in html
    assert "through onnxruntime, decoding (64 tokens of 4 samples; deviates from PyTorch)" in (
        render_summary(report)
    )


@pytest.mark.parametrize(("worse", "verdict"), [(0.0, "pass"), (0.01, "pass"), (0.5, "fail")])
def test_compare_holds_the_engine_to_its_baseline(worse: float, verdict: str) -> None:
    old = report_of(EngineAccuracyResult(engines=(engine(CLOSE),)))
    value = 21.0 * (1 + worse)
    slower = replace(
        METRICS[0],
        sparse=Estimate(value=value, standard_error=0.5),
        values=tuple(v * (1 + worse) * 21 / 3.175 for v in VALUES),
    )
    before = replace(METRICS[0], values=tuple(v * 21 / 3.175 for v in VALUES))
    made = [
        report.model_copy(
            update={
                "accuracy": report.accuracy.model_copy(
                    update={"engines": (replace(engine(CLOSE), metrics=(one, METRICS[1])),)}
                )
            }
        )
        for report, one in ((old, before), (old, slower))
    ]
    baseline = Baseline(source="baseline.json", report=made[0])
    found = compare_reports(made[1], baseline)
    changes = {change.name: change for change in found.changes}
    assert changes["engine/onnxruntime/perplexity"].verdict == verdict
    assert changes["engine/onnxruntime/perplexity"].limits == "at most 5 % worse"
    assert changes["engine/onnxruntime/KL divergence"].limits == "at most 20 % worse"


def test_an_engine_that_is_no_longer_measured_fails_by_name() -> None:
    old = report_of(EngineAccuracyResult(engines=(engine(CLOSE),)))
    new = report_of(EngineAccuracyResult())
    found = compare_reports(new, Baseline(source="baseline.json", report=old))
    changes = {change.name: change for change in found.changes}
    assert changes["engine/onnxruntime/perplexity"].status == "missing"
    assert changes["engine/onnxruntime/perplexity"].verdict == "fail"
    assert limits_of(DEFAULT_METRICS, "engine/x/perplexity") is not None
