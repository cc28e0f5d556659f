"""The verdict in four parts, and the first line of every view."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import (
    Records,
    all_skipped,
    make_records,
    perplexities,
    with_budget,
    with_latency,
    with_metrics,
    with_not_measured,
    with_numerics_failed,
    with_sparsity_lost,
)
from test_engine_checks import engine

from prox24_deploy.cli.build import exit_code
from prox24_deploy.cli.tables import report_head
from prox24_deploy.config.limits import GivenLimits, Limits, MetricLimits, accepted_loss
from prox24_deploy.core.accuracy import EngineAccuracyResult
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import DirectMetric, Estimate
from prox24_deploy.core.types import Judgement, Verdict
from prox24_deploy.packaging.card import SourceCard, render_card
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.compare import compare_reports, held_against
from prox24_deploy.report.assemble import Report, assemble_report, write_report
from prox24_deploy.report.render import render_html, render_summary

PLAIN = SourceCard(metadata={}, text="")
LIFTED = {"embedding cosine": MetricLimits()}
ONLY_COSINE = {
    "*": MetricLimits(),
    "embedding cosine": MetricLimits.model_validate({"max-degradation-percent": 2.0}),
}


def ruined(windows: int = 64) -> Report:
    """The release of a language model of which pruning made a wreck."""
    metrics = perplexities(11.7, 33.6, windows)
    return with_metrics(make_records(), "text-generation", *metrics).report()


def without_numerics(records: Records) -> Records:
    return replace(records, export=replace(records.export, numerics=()))


def gated_rows(verdict: Verdict) -> Callable[[Records], Records]:
    return lambda records: with_latency(records, verdict, gated=True)


@pytest.mark.parametrize(
    ("change", "parts", "verdict", "code"),
    [
        (lambda r: r, ("pass", "pass", "pass", "not gated"), "pass", 0),
        (gated_rows("pass"), ("pass", "pass", "pass", "pass"), "pass", 0),
        (gated_rows("fail"), ("pass", "pass", "pass", "fail"), "fail", 3),
        (gated_rows("inconclusive"), ("pass", "pass", "pass", "inconclusive"), "inconclusive", 5),
        (without_numerics, ("pass", "not gated", "pass", "not gated"), "pass", 0),
        (with_numerics_failed, ("pass", "fail", "pass", "not gated"), "fail", 3),
        (with_sparsity_lost, ("fail", "pass", "pass", "not gated"), "fail", 4),
        (all_skipped, ("not gated", "pass", "pass", "not gated"), "pass", 0),
        (
            lambda r: with_not_measured(r, alone=True),
            ("pass", "pass", "pass", "not gated"),
            "pass",
            0,
        ),
        (
            lambda r: with_budget(r, 0.02, cosine=0.97),
            ("pass", "pass", "fail", "not gated"),
            "fail",
            3,
        ),
        (
            lambda r: with_metrics(r, "text-generation", *perplexities(11.7, 33.6, 64)),
            ("pass", "pass", "fail", "not gated"),
            "fail",
            3,
        ),
        (
            lambda r: with_metrics(r, "text-generation", *perplexities(11.7, 11.8, 2)),
            ("pass", "pass", "inconclusive", "not gated"),
            "inconclusive",
            5,
        ),
    ],
)
def test_parts_make_the_verdict_and_the_exit_code(
    change: Callable[[Records], Records],
    parts: tuple[Judgement, ...],
    verdict: Verdict,
    code: int,
) -> None:
    report = change(make_records()).report()
    assert tuple(part.verdict for part in report.parts.by_name().values()) == parts
    assert (report.verdict, exit_code(report)) == (verdict, code)
    for part in report.parts.by_name().values():
        assert part.reason.endswith(".")
        assert len(part.reason) > 20


def test_without_a_gate_on_accuracy_nothing_passes() -> None:
    report = make_records().report(GivenLimits(against_dense=LIFTED))
    assert report.parts.accuracy.verdict == "not gated"
    assert report.parts.accuracy.reason == "No metric has a limit against the dense model."
    assert (report.verdict, exit_code(report)) == ("inconclusive", 5)
    assert report.sentence.startswith("Inconclusive on accuracy: STS-B Spearman correlation −0.86")
    assert "without a limit" in report.sentence


def test_every_layer_that_was_pruned_needs_a_proof_of_its_own() -> None:
    records = make_records()
    fewer = replace(records, export=replace(records.export, sparsity=records.export.sparsity[1:]))
    report = fewer.report()
    assert report.parts.sparsity.verdict == "fail"
    (regression,) = report.regressions
    assert regression.name == records.export.sparsity[0].module
    assert "no weight of onnx/sparse/model.onnx is declared to be its 2:4 one" in regression.message
    assert exit_code(report) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r, "Passed: embedding cosine 0.9712, 512 samples; speed not gated"),
        (gated_rows("pass"), "Passed: embedding cosine 0.9712, 512 samples"),
        (
            gated_rows("fail"),
            "Failed on speed: onnxruntime, batch 1, sequence 128: Speed-up 0.900, 95 % interval "
            "0.890 to 0.910, limit 0.980, and it runs no sparse kernel; embedding cosine 0.9712, "
            "512 samples",
        ),
        (
            lambda r: with_sparsity_lost(with_numerics_failed(r)),
            "Failed on sparsity and export: encoder.layer.0.attention.self.query: Not 2:4 along "
            "axis 0 of (384, 384) first at (4, 0): 3 of 4 values are not zero; sparse "
            "last_hidden_state: ONNX Runtime and PyTorch differ by at most 0.5, tolerance 0.01; "
            "embedding cosine 0.9712, 512 samples; speed not gated",
        ),
        (
            lambda r: with_metrics(r, "text-generation", *perplexities(11.7, 33.6, 64)),
            "Failed on accuracy: perplexity +187 %, 11.70 → 33.60, 64 samples; speed not gated",
        ),
        (
            lambda r: with_metrics(r, "text-generation", *perplexities(11.7, 33.6, 2)),
            "Inconclusive on accuracy: perplexity +187 %, 11.70 → 33.60, 2 samples, too few to "
            "tell; speed not gated",
        ),
        (
            lambda r: with_metrics(r, "text-generation", *perplexities(11.7, 12.85, 64)),
            "Inconclusive on accuracy: perplexity +9.83 %, 11.70 → 12.85, 64 samples, too near to "
            "the limit to tell; speed not gated",
        ),
    ],
)
def test_the_sentence_says_what_changed_and_what_decided(
    change: Callable[[Records], Records], sentence: str
) -> None:
    assert change(make_records()).report().sentence == sentence


def first_lines(report: Report, folder: Path) -> dict[str, str]:
    """What a reader sees first in each view."""
    page = render_html(report)
    card = render_card(report, PLAIN).split("---\n")[-1]
    write_report(report, folder)
    return {
        "page": page[page.index('<p class="verdict') : page.index('<dl class="parts">')],
        "summary": render_summary(report).splitlines()[0],
        "card": "\n".join([line for line in card.splitlines() if line][:4]),
        "terminal": report_head(report)[0],
        "json": json.loads((folder / "report.json").read_bytes())["sentence"],
    }


def test_every_view_of_a_ruined_model_says_so_first(tmp_path: Path) -> None:
    """The story: 11.7 became 33.6, and nobody may read "passed" anywhere."""
    report = ruined()
    assert (report.verdict, exit_code(report)) == ("fail", 3)
    for view, text in first_lines(report, tmp_path).items():
        assert "Failed on accuracy: perplexity +187 %, 11.70 → 33.60, 64 samples" in text, view
    assert "did not pass" in first_lines(report, tmp_path)["card"]
    for name in ("report.html", "summary.md", "report.json", "junit.xml"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Passed" not in text, name
    card = render_card(report, PLAIN)
    assert "the verdict of its release report is fail" in card


def test_two_samples_of_a_ruined_model_are_not_enough_to_fail_it_nor_to_pass_it(
    tmp_path: Path,
) -> None:
    report = ruined(windows=2)
    assert (report.verdict, exit_code(report)) == ("inconclusive", 5)
    for view, text in first_lines(report, tmp_path).items():
        assert "Inconclusive on accuracy: perplexity +187 %" in text, view
    assert report.warnings[0] == (
        "Evaluation has 2 samples (1,024 tokens), which decide nothing: at least 30 samples are "
        "advised; pass about 15,360 tokens with --evaluation and --evaluation-tokens 15360."
    )


def test_a_loss_that_was_accepted_passes_and_is_said(tmp_path: Path) -> None:
    metrics = perplexities(11.7, 33.6, 64)
    given = GivenLimits(accepted={"perplexity": accepted_loss("perplexity", "200%")})
    report = with_metrics(make_records(), "text-generation", *metrics).report(given)
    assert (report.verdict, exit_code(report)) == ("pass", 0)
    assert report.accepted_losses == ("perplexity at most 200 % worse than dense",)
    assert report_head(report)[1] == "Accepted loss: perplexity at most 200 % worse than dense"
    views = {
        '<dl class="parts">': render_html(report),
        "| sparsity |": render_summary(report),
        "pruned to 2:4": render_card(report, PLAIN),
    }
    for below, text in views.items():
        place = text.index("Accepted loss: perplexity at most 200 % worse than dense.")
        assert place < text.index(below)


def test_the_order_of_precedence_is_defaults_recipe_file_and_accepted_losses() -> None:
    def verdict(given: GivenLimits, recipe: float | None = None) -> str:
        own = {} if recipe is None else {"perplexity": percent(recipe)}
        limits = Limits.model_validate({"against-dense": own})
        records = with_metrics(make_records(), "text-generation", *perplexities(11.7, 14.0, 64))
        return records.report(given, limits).verdict

    def percent(number: float) -> MetricLimits:
        return MetricLimits.model_validate({"max-degradation-percent": float(number)})

    strict, loose = {"perplexity": percent(15)}, {"perplexity": percent(30)}
    assert verdict(GivenLimits()) == "fail"
    assert verdict(GivenLimits(), recipe=30) == "pass"
    assert verdict(GivenLimits(against_dense=strict), recipe=30) == "fail"
    assert verdict(GivenLimits(against_dense=loose), recipe=15) == "pass"
    assert verdict(GivenLimits(against_dense=loose, accepted=strict)) == "fail"
    assert verdict(GivenLimits(against_dense=strict, accepted=loose)) == "pass"


def test_a_baseline_can_fail_a_part_and_prove_none() -> None:
    report = make_records().report()
    lifted = make_records().report(GivenLimits(against_dense=LIFTED))
    limits = GivenLimits(metrics=ONLY_COSINE)
    held = held_against(lifted, Baseline(source="before", report=report), limits=limits)
    cosine = next(c for c in held.checks if (c.kind, c.name) == ("baseline", "embedding cosine"))
    assert cosine.verdict == "pass"
    assert held.parts.accuracy.verdict == "not gated"
    assert held.verdict == "inconclusive"
    slower = with_latency(make_records(gated=True), "fail", gated=True).report()
    before = Baseline(source="before", report=make_records(gated=True).report())
    found = held_against(slower, before, limits=limits)
    assert found.parts.speed.verdict == "fail"
    assert found.parts.accuracy.verdict == "pass"


def test_compare_holds_a_report_to_other_limits_against_the_dense_model() -> None:
    report = make_records().report()
    strict = {"embedding cosine": MetricLimits(threshold=0.99)}
    for table, verdict in (({}, "pass"), (strict, "fail"), (LIFTED, "inconclusive")):
        given = GivenLimits(source="limits.toml", metrics=ONLY_COSINE, against_dense=table)
        found = compare_reports(report, Baseline(source="before", report=report), limits=given)
        release = found.changes[0]
        assert (release.verdict, found.verdict) == (verdict, verdict)
        assert ("accuracy is not gated" in release.message) == (table is LIFTED)
    wrong = GivenLimits(
        source="limits.toml", against_dense={"embeding cosine": MetricLimits(threshold=1)}
    )
    with pytest.raises(UsageError, match="did you mean 'embedding cosine'"):
        compare_reports(report, Baseline(source="before", report=report), limits=wrong)


def test_accuracy_through_an_engine_counts_as_much_as_that_through_pytorch() -> None:
    records = with_metrics(make_records(), "text-generation", *perplexities(11.7, 12.0, 64))
    through = EngineAccuracyResult(
        engines=(replace(engine(), metrics=perplexities(11.7, 33.6, 16)),)
    )
    report = assemble_report(
        records.model, replace(records.results, accuracy=through), Limits(), options={},
        environment={}, sizes={}, timings={},
    )  # fmt: skip
    assert report.verdict == "fail"
    assert [check.name for check in report.regressions] == ["engine/onnxruntime/perplexity"]
    assert report.sentence.startswith(
        "Failed on accuracy: perplexity through onnxruntime +187 %, 11.70 → 33.60, 16 samples"
    )


def test_nothing_that_has_no_limit_says_that_it_passes(tmp_path: Path) -> None:
    informs = DirectMetric(
        name="KL divergence",
        higher_is_better=False,
        samples=64,
        agreement=Estimate(value=0.5, standard_error=0.1),
    )
    records = with_metrics(
        make_records(), "text-generation", *perplexities(11.7, 12.0, 64), informs
    )
    write_report(records.report(), tmp_path)
    document = json.loads((tmp_path / "report.json").read_bytes())
    told = {check["name"]: check["verdict"] for check in document["checks"]}
    assert told["KL divergence"] == told["onnxruntime, batch 1, sequence 128"] == "not gated"
    assert [row["verdict"] for row in document["latency"]] == ["not gated"] * 2
    assert document["parts"]["speed"]["verdict"] == "not gated"
    assert "gated" not in document["checks"][0]
