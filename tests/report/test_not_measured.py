"""Engines that were compiled for other machines: told by name, and failing nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from builders import make_records, with_latency, with_not_measured
from junitparser import JUnitXml

from prox24_deploy.report.assemble import load_report, write_report
from prox24_deploy.report.grids import evidence_groups

REASON = "engines for SM86 cannot run here; take it elsewhere."
ALONE = "No backend measured latency, so nothing here says"


def test_a_backend_that_cannot_run_here_is_a_finding_and_no_failure() -> None:
    report = with_not_measured(make_records(), alone=False).report()
    assert report.verdict == "pass"
    assert [(m.backend, m.reason) for m in report.not_measured] == [("tensorrt-rtx", REASON)]
    assert {row.backend for row in report.latency} == {"onnxruntime"}
    (check,) = [check for check in report.checks if check.name == "tensorrt-rtx"]
    assert (check.kind, check.gated, check.value) == ("latency", False, None)
    assert check.message == f"Latency was not measured: {REASON}"
    told = [text for text in report.warnings if "tensorrt-rtx" in text]
    assert told == [
        "Backend tensorrt-rtx: it is unknown whether it runs sparse kernels (sparse kernels: "
        "unknown, it chooses kernels on the GPU).",
        f"Backend tensorrt-rtx was compiled and its latency not measured: {REASON}",
    ]
    assert not any(text.startswith(ALONE) for text in report.warnings)


def test_without_any_measurement_the_report_says_that_no_gate_was_applied() -> None:
    report = with_not_measured(make_records(), alone=True).report()
    assert report.verdict == "pass"
    assert report.latency == ()
    (alone,) = (text for text in report.warnings if text.startswith(ALONE))
    assert alone.endswith("no gate on latency was applied.")
    # What was left as it was weighs least.
    assert "left dense" in report.warnings[-1]


def test_a_regression_of_another_backend_still_fails() -> None:
    records = with_not_measured(make_records(gated=True), alone=False)
    assert with_latency(records, "fail", gated=True).report().verdict == "fail"


def test_every_view_tells_it(tmp_path: Path) -> None:
    write_report(with_not_measured(make_records(), alone=True).report(), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<p>No latency was measured.</p>" in html
    assert f"<strong>tensorrt-rtx</strong>: not measured. {REASON}" in html
    assert "sparse kernels: unknown" in html
    assert "accelerated" not in html
    assert REASON in (tmp_path / "summary.md").read_text(encoding="utf-8")
    suites = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    (suite,) = [suite for suite in suites if suite.name == "latency"]
    assert (suite.tests, suite.failures, suite.skipped) == (1, 0, 1)
    assert load_report(tmp_path / "report.json").not_measured


@pytest.mark.parametrize("alone", [True, False])
def test_layers_with_the_same_reason_are_one_line_of_the_evidence(
    *, alone: bool, tmp_path: Path
) -> None:
    report = with_not_measured(make_records(), alone=alone).report()
    write_report(report, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = report.sparsity.engines[0]
    section = html[html.index("<h2>Sparse kernels</h2>") :]
    table = section[section.index("<table") : section.index("</table>")]
    (row,) = re.findall(r"<tr><td class=\"name\".*", table)
    assert f"<summary>{len(first.layers)} layers</summary>" in row
    assert ", ".join(layer.module for layer in first.layers) in row
    word = "unknown" if alone else "no"
    assert re.findall(r'data-title="(?:Eligible|Chosen)">(\w+)<', row) == [word, word]
    assert html.index("<h2>Accuracy</h2>") < html.index("<h2>Sparse kernels</h2>")


def test_layers_with_reasons_of_their_own_have_lines_of_their_own() -> None:
    (first, *_) = make_records().report().sparsity.engines
    odd = replace(first.layers[1], reason="too narrow")
    found = evidence_groups(replace(first, layers=(first.layers[0], odd, *first.layers[2:])))
    assert [len(group.names) for group in found] == [len(first.layers) - 1, 1]
    assert found[1].names == (odd.module,)
