"""Limits that name nothing: refused by name with the nearest one, or a row that does not pass."""

import pytest
from builders import make_records, perplexities, with_metrics

from prox24_deploy.config.limits import GivenLimits, Limits, MetricLimits, MetricTable
from prox24_deploy.core.errors import UsageError
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.compare import compare_reports, held_against
from prox24_deploy.regression.figures import figures_of
from prox24_deploy.regression.views import render_junit, render_markdown
from prox24_deploy.report.binding import (
    NO_FIGURE,
    expected_metrics,
    part_of,
    require_expected,
    require_figures,
)
from prox24_deploy.report.schema import Report

TIGHT = MetricLimits(threshold=0.0)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_records(gated=True).report()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("perplexty", "did you mean 'perplexity'?"),
        ("Perplexity", "did you mean 'perplexity'?"),
        ("engine/onnxruntime/perplexty", "did you mean 'engine/onnxruntime/perplexity'?"),
        ("lm-eval/hellaswag/acc", "the figures are perplexity, engine/onnxruntime/perplexity."),
        ("", "the figures are perplexity"),
    ],
)
def test_a_name_that_is_no_figure_is_refused_with_the_nearest(name: str, advice: str) -> None:
    known = ["perplexity", "engine/onnxruntime/perplexity"]
    with pytest.raises(UsageError) as caught:
        require_figures([name], known, "Limits file x.toml")
    assert str(caught.value).startswith(f"Limits file x.toml names {name!r}, which is no figure")
    assert advice in str(caught.value)


def test_known_names_globs_and_the_plain_name_of_an_engines_metric_are_taken() -> None:
    require_figures(
        ["perplexity", "engine/x/perplexity", "perp*", "nothing like it*", "latency/x/batch=1"],
        ["engine/x/perplexity", "latency/x/*"],
        "source",
    )


def expected(**tables: MetricTable) -> None:
    recipe = Limits.model_validate({"metrics": tables.pop("recipe", {})})
    metrics = expected_metrics("text-generation", labelled=False, harness=False)
    given = GivenLimits(source="x.toml", **tables)
    require_expected(given, recipe, metrics, ["tensorrt"], ["lm-eval/old/acc"])


def test_before_any_work_every_figure_that_may_come_is_known() -> None:
    names = (
        "perplexity", "engine/tensorrt/KL divergence", "latency/tensorrt/batch=1,sequence=8",
        "speed-up/tensorrt/decoder/batch=1", "size/engine tensorrt", "size/packed",
        "layers/proven", "kernels/tensorrt", "lm-eval/old/acc",
    )  # fmt: skip
    fine = dict.fromkeys(names, TIGHT)
    expected(metrics=fine, recipe=fine)
    expected(against_dense={"perplexity": TIGHT, "engine/tensorrt/top-1 agreement": TIGHT})


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("metrics", "word error rate", "Limits file x.toml names 'word error rate'"),
        ("metrics", "kernels/tensorrt-rtx", "did you mean 'kernels/tensorrt'"),
        ("recipe", "accuracy", r"The recipe's \[limits.metrics\] names 'accuracy'"),
        ("against_dense", "size/packed", "Limits file x.toml names 'size/packed'"),
        ("accepted", "perplexty", "--accept-loss names 'perplexty'.*did you mean 'perplexity'"),
        ("accepted", "lm-eval/arc/acc", "--accept-loss names 'lm-eval/arc/acc'"),
    ],
)
def test_before_any_work_a_figure_that_cannot_come_is_refused(
    kind: str, name: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        expected(**{kind: {name: TIGHT}})


def test_tasks_of_the_harness_may_be_named_before_their_metrics_are_known() -> None:
    metrics = expected_metrics("text-generation", labelled=False, harness=True)
    given = GivenLimits(source="x.toml", accepted={"lm-eval/arc/acc": TIGHT})
    require_expected(given, Limits(), metrics, ["onnxruntime"], [])


def test_a_report_is_not_made_with_a_limit_of_a_metric_that_was_not_measured() -> None:
    """Also where only the measurement tells: labels that were not there, a task's own metric."""
    records = with_metrics(make_records(), "text-generation", *perplexities(11.7, 11.8, 64))
    for given in (
        GivenLimits(accepted={"accuracy": TIGHT}),
        GivenLimits(source="x.toml", against_dense={"accuracy": TIGHT}),
    ):
        with pytest.raises(UsageError, match="names 'accuracy', which is no figure"):
            records.report(given)
    with pytest.raises(UsageError, match=r"The recipe's .* names 'accuracy'"):
        records.report(limits=Limits.model_validate({"against-dense": {"accuracy": TIGHT}}))


def test_a_glob_against_the_dense_model_that_matches_nothing_is_a_row_that_does_not_pass() -> None:
    given = GivenLimits(source="x.toml", against_dense={"acc*": TIGHT, "none*": MetricLimits()})
    made = make_records().report(given)
    (check,) = [check for check in made.checks if check.kind == "limits"]
    assert (check.name, check.part, check.verdict) == ("acc*", "accuracy", "inconclusive")
    assert check.message.startswith(NO_FIGURE)
    assert made.verdict == "inconclusive"
    assert "acc*: The limit matches no figure" in made.parts.accuracy.reason


def test_a_name_in_a_file_for_compare_that_no_report_has_is_refused(report: Report) -> None:
    given = GivenLimits(source="limits.toml", metrics={"embedding cosin": TIGHT})
    with pytest.raises(UsageError, match=r"limits\.toml names .* mean 'embedding cosine'\?"):
        compare_reports(report, Baseline(source="before", report=report), limits=given)
    with pytest.raises(UsageError, match="mean 'embedding cosine'"):
        held_against(report, Baseline(source="before", report=report), limits=given)


def test_a_glob_of_a_file_or_of_the_baselines_recipe_that_matches_nothing_is_a_row(
    report: Report,
) -> None:
    everything = {name: MetricLimits() for name in figures_of(report)}
    given = GivenLimits(source="limits.toml", metrics={**everything, "perp*": TIGHT})
    found = compare_reports(report, Baseline(source="before", report=report), limits=given)
    row = found.changes[-1]
    assert (row.name, row.status, row.verdict) == ("perp*", "unmatched", "inconclusive")
    assert found.verdict == "inconclusive"
    assert NO_FIGURE in render_markdown(found)
    assert b"perp*" in render_junit(found)
    own = Limits.model_validate({"metrics": {"perp*": TIGHT}})
    applied = own.over_defaults("feature-extraction", []).as_json()
    old = report.model_copy(update={"options": {**report.options, "limits": applied}})
    again = compare_reports(
        report,
        Baseline(source="before", report=old),
        limits=GivenLimits(source="", metrics=everything),
    )
    assert [c.name for c in again.changes if c.status == "unmatched"] == ["perp*"]
    plain = compare_reports(report, Baseline(source="before", report=report))
    assert not [c for c in plain.changes if c.status == "unmatched"]


def test_a_limit_for_a_figure_that_the_baseline_lacks_is_judged_or_left_open(
    report: Report,
) -> None:
    metrics = report.accuracy.metrics
    old = report.model_copy(
        update={"accuracy": report.accuracy.model_copy(update={"metrics": metrics[:1]})}
    )
    for limits, verdict in (
        ({"threshold": 0.9}, "pass"),
        ({"threshold": 0.99}, "fail"),
        ({"max-degradation": 0.1}, "inconclusive"),
    ):
        table = {"embedding cosine": MetricLimits.model_validate(limits)}
        given = GivenLimits(source="limits.toml", metrics=table)
        found = compare_reports(report, Baseline(source="before", report=old), limits=given)
        change = next(c for c in found.changes if c.name == "embedding cosine")
        assert (change.status, change.verdict) == ("new", verdict)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("latency/x/batch=1", "speed"), ("speed-up/*", "speed"), ("kernels/x", "speed"),
        ("layers/proven", "sparsity"), ("size/packed", "export"), ("perplexity", "accuracy"),
        ("engine/x/perplexity", "accuracy"), ("*", "accuracy"),
    ],
)  # fmt: skip
def test_every_figure_counts_for_one_part(name: str, part: str) -> None:
    assert part_of(name) == part
