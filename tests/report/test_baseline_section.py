"""The section of the page about the baseline, as a reader of any kind meets it."""

import re
from dataclasses import replace

import pytest
from builders import make_records
from markupsafe import escape

from prox24_deploy.regression.baseline import Baseline, updated
from prox24_deploy.regression.compare import held_against
from prox24_deploy.report.plots import trend_plot
from prox24_deploy.report.render import render_html, render_junit, render_summary, trends
from prox24_deploy.report.schema import Report

HOSTILE = "<b>first</b> & best"


@pytest.fixture
def report() -> Report:
    plain = make_records(gated=True).report()
    baseline: Baseline | None = None
    for number in (1, 2, 3):
        date = f"2026-01-0{number}T00:00:00+00:00"
        made = updated(plain, baseline, reason=f"{number} {HOSTILE}", date=date, keep=10)
        baseline = Baseline(
            source="baseline.json",
            report=made.report,
            reason=made.reason,
            date=made.date,
            history=made.history,
        )
    assert baseline is not None
    return held_against(plain, baseline)


def section(report: Report) -> str:
    page = render_html(report)
    start = page.index("<h2>Against the baseline</h2>")
    return page[start : page.index("</section>", start)]


def test_every_change_has_a_row_and_the_reason_is_text(report: Report) -> None:
    text = section(report)
    assert report.baseline is not None
    for change in report.baseline.changes:
        assert f'<td class="name" data-title="Figure">{escape(change.name)}</td>' in text
    assert str(escape(f"3 {HOSTILE}")) in text
    assert HOSTILE not in text
    assert "free of drift and decides" in text


def test_every_trend_is_a_drawing_with_words_and_a_row_of_the_table(report: Report) -> None:
    text = section(report)
    assert report.baseline is not None
    found = trends(report.baseline)
    titles = [trend.title for trend in found]
    assert "size/onnx sparse, MiB" in titles
    assert "latency/onnxruntime/batch=1,sequence=128, ms" in titles
    drawings = re.findall(r'<svg role="img" aria-labelledby="(trend-\d+)-title \1-desc"', text)
    assert len(drawings) == len(found) == len(set(drawings))
    for trend in found:
        assert [label for label, _ in trend.points] == [
            "2026-01-01", "2026-01-02", "2026-01-03", "this build",
        ]  # fmt: skip
        assert f'<th scope="row">{trend.title}</th>' in text
    assert re.findall(r'<th scope="col" class="n">(2026-01-0\d) 00:00</th>', text) == [
        "2026-01-01", "2026-01-02", "2026-01-03",
    ]  # fmt: skip
    assert '<td class="n">0.9712</td>' in text


def test_bytes_are_told_so_that_they_can_be_read(report: Report) -> None:
    assert report.baseline is not None
    (size,) = (c for c in report.baseline.changes if c.name == "size/onnx sparse")
    assert size.message == "43.4 MiB, was 43.4 MiB: unchanged"
    assert '<td class="n" data-title="Baseline">43.4 MiB</td>' in section(report)
    assert '<td class="n" data-title="This build">43.4 MiB</td>' in section(report)


def test_a_page_without_a_baseline_has_no_such_section() -> None:
    assert "Against the baseline" not in render_html(make_records().report())


def test_a_plain_report_as_baseline_has_a_table_and_no_trend(report: Report) -> None:
    plain = make_records(gated=True).report()
    text = section(held_against(plain, Baseline(source="old/report.json", report=plain)))
    assert "old/report.json. Verdict" in text
    assert "trend-0" not in text
    assert "Figures of accepted releases" not in text


def test_the_other_views_tell_of_a_regression_too(report: Report) -> None:
    records = make_records(gated=True)
    metrics = list(records.evaluate.metrics)
    assert metrics[1].agreement is not None
    metrics[1] = replace(metrics[1], agreement=replace(metrics[1].agreement, value=0.5))
    worse = replace(records, evaluate=replace(records.evaluate, metrics=tuple(metrics)))
    plain = make_records(gated=True).report()
    found = held_against(worse.report(), Baseline(source="b", report=plain))
    assert "baseline `embedding cosine`: 0.5, was 0.9712" in render_summary(found)
    assert b'<testsuite name="baseline"' in render_junit(found)


def test_a_flat_trend_still_has_an_axis() -> None:
    drawn = trend_plot("flat", [("a", 0.0), ("b", 0.0)], 0)
    assert drawn.count("<circle") == 2
    assert 'class="grid"' in drawn


def test_rounding_is_no_trend() -> None:
    drawn = trend_plot("flat", [("a", 1.0), ("b", 1.0 + 2e-16), ("c", 1.0 - 1e-16)], 0)
    heights = {float(y) for y in re.findall(r'cy="([0-9.]+)"', drawn)}
    assert len(heights) == 1
