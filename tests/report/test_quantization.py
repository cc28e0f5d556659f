"""What a report says of a quantised model: every step, every layer, and what was left."""

import html
import math
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Records, make_records, quantised

from prox24_deploy.cli.tables import report_head
from prox24_deploy.report.assemble import load_report, write_report
from prox24_deploy.report.render import render_html, render_summary
from prox24_deploy.report.steps import step_rows, step_titles


@pytest.fixture
def records() -> Records:
    return quantised(make_records(2), "its output would be too wrong: error 0.3 instead of 0.1")


def test_every_metric_is_shown_dense_pruned_and_quantised(records: Records) -> None:
    metrics = records.evaluate.metrics
    worse = tuple(replace(m, samples=m.samples) for m in metrics)
    report = replace(records, evaluate=replace(records.evaluate, metrics=worse)).report()
    assert step_titles(report) == ("dense", "2:4", "2:4 + FP8")
    rows = step_rows(report)
    assert [row.name for row in rows] == [metric.name for metric in metrics]
    assert all(len(row.cells) == 3 for row in rows)
    summary, page = render_summary(report), html.unescape(render_html(report))
    assert "| metric | dense | 2:4 | 2:4 + FP8 |\n|---|---|---|---|\n| " in summary
    for row in rows:
        assert f"| {row.name} |" in summary
    assert "2:4 + FP8</th>" in page


def test_a_layer_is_shown_with_its_range_or_with_why_it_stays(records: Records) -> None:
    report = records.report()
    assert report.quantization is not None
    last = report.quantization.layers[-1]
    page = html.unescape(render_html(report))
    assert "99.99 percentile" in page
    assert last.reason in page
    assert (
        f"1 layer left in 16 bits (its output would be too wrong): {last.name}." in report.warnings
    )
    done = len(report.quantization.layers) - 1
    (line,) = (line for line in report_head(report) if line.startswith("Quantised: "))
    assert line.startswith(f"Quantised: {done} of {done + 1} layers to FP8; ")


def test_the_report_is_read_back_with_what_is_not_finite_as_none(
    records: Records, tmp_path: Path
) -> None:
    assert records.quantize is not None
    first, *others = records.quantize.layers
    broken = (replace(first, error=math.nan), *others)
    report = replace(records, quantize=replace(records.quantize, layers=broken)).report()
    write_report(report, tmp_path)
    read = load_report(tmp_path / "report.json")
    assert read.quantization is not None
    assert read.quantization.layers[0].error is None
    assert read.accuracy.steps[0].name == "pruned"


def test_a_step_that_was_not_taken_is_not_shown(records: Records) -> None:
    layers = tuple(
        replace(layer, status="skipped", reason="nothing is pruned with --method none")
        for layer in records.prune.layers
    )
    report = replace(records, prune=replace(records.prune, layers=layers)).report()
    assert step_titles(report) == ("dense", "FP8")
    assert {len(row.cells) for row in step_rows(report)} == {2}


def test_nothing_is_said_where_nothing_was_quantised() -> None:
    report = make_records(2).report()
    assert report.quantization is None
    assert (step_titles(report), step_rows(report)) == ((), ())
    assert "Quantis" not in render_html(report)
    assert "step by step" not in render_summary(report)
    assert not [line for line in report_head(report) if line.startswith("Quantised")]
