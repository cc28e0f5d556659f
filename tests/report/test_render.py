import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import (
    Records,
    all_skipped,
    make_records,
    with_latency,
    with_layers,
    with_numerics_failed,
    with_sparsity_lost,
)
from junitparser import JUnitXml

from prox24_deploy.core.records import DirectMetric, Estimate, PairedMetric
from prox24_deploy.report import grids
from prox24_deploy.report.assemble import Report, load_report, write_report
from prox24_deploy.report.formats import departure, estimate, seconds, size

HOSTILE = 'encoder.layer.0.<script>alert("1")</script>|`&\x00'
VOID = {"meta", "br", "img", "link", "hr", "input"}


@pytest.fixture
def records() -> Records:
    return make_records()


@pytest.fixture
def report(records: Records) -> Report:
    return records.report()


def written(report: Report, out: Path, name: str) -> str:
    write_report(report, out)
    return (out / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("blocks", [1, 6, 37])
def test_page_is_self_contained_and_names_every_layer(blocks: int, tmp_path: Path) -> None:
    report = make_records(blocks, gated=True).report()
    html = written(report, tmp_path, "report.html")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & dict(page.attributes).keys()
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?://|//\w|@import|url\(", html)
    for layer in report.pruning.layers:
        assert page.text.count(layer.name) >= 1


def test_page_shows_verdict_then_figures_then_warnings(report: Report, tmp_path: Path) -> None:
    text = " ".join(Page(written(report, tmp_path, "report.html")).text)
    order = [
        "Passed: embedding cosine 0.9712, 512 samples; speed not gated", "Every pruned weight is",
        "−0.86 points, 0.8203 → 0.8117", "dense 0.8203 ± 0.0091", "sparse 0.8117 ± 0.0094", "1.00×",
        "Warnings",
    ]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_every_plot_has_a_title_and_a_description_of_its_own(
    report: Report, tmp_path: Path
) -> None:
    page = Page(written(report, tmp_path, "report.html"))
    identities = [value for name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    labels = [value for name, value in page.attributes if name == "aria-labelledby"]
    assert {part for label in labels for part in label.split()} <= set(identities)
    assert page.tags.count("desc") == 6 + 2 + 2


def test_hostile_layer_name_stays_text(records: Records, tmp_path: Path) -> None:
    first, *rest = records.prune.layers
    layers = (replace(first, name=HOSTILE), *rest)
    sparsity = (replace(records.export.sparsity[0], module=HOSTILE), *records.export.sparsity[1:])
    changed = replace(
        with_layers(records, layers), export=replace(records.export, sparsity=sparsity)
    )
    worst = replace(layers[0], relative_error=5.0, held_out_error=6.0)
    report = with_layers(changed, (worst, *rest)).report()
    html = written(report, tmp_path, "report.html")
    assert "script" not in Page(html.replace("\x00", "")).tags
    assert "<script" not in html
    table = [
        line for line in written(report, tmp_path, "summary.md").splitlines() if "alert" in line
    ]
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 5
    suites = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert any(case.name.startswith("encoder.layer.0.<scr") for suite in suites for case in suite)
    assert load_report(tmp_path / "report.json") == report


def test_html_says_which_weights_are_eligible_and_why_the_others_are_not(
    records: Records, tmp_path: Path
) -> None:
    first, *rest = records.export.sparsity
    reason = "K = 24 is not a multiple of 16"
    odd = replace(first, part="[:, 0:4]", eligible=False, ineligible_reason=reason)
    changed = replace(records, export=replace(records.export, sparsity=(odd, *rest)))
    html = written(changed.report(), tmp_path, "report.html")
    assert "TensorRT may take a sparse kernel for 34 of them" in html
    (line,) = [line for line in html.splitlines() if reason in line]
    assert f"{first.tensor}[:, 0:4]</td>" in line
    assert f'"Eligible">no</td><td data-title="Why not eligible">{reason}</td></tr>' in line


def test_junit_has_a_case_for_each_check(records: Records, tmp_path: Path) -> None:
    failing = with_numerics_failed(with_sparsity_lost(records))
    report = with_latency(failing, "inconclusive", gated=True).report()
    write_report(report, tmp_path)
    xml = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert {suite.name: (suite.tests, suite.failures, suite.skipped) for suite in xml} == {
        "verdict": (4, 2, 1),
        "sparsity": (35, 1, 0),
        "numerics": (2, 1, 0),
        "accuracy": (3, 0, 2),
        "latency": (2, 0, 2),
    }
    assert (xml.tests, xml.failures, xml.skipped) == (46, 4, 5)
    parts, *others = list(xml)
    told = {case.name: case.result[0].message for case in parts if case.result}
    assert told["sparsity"].startswith("fail: encoder.layer.0.attention.self.query: Not 2:4 along")
    assert told["speed"].startswith("inconclusive: onnxruntime, batch 1, sequence 128: Speed-up")
    assert told.keys() == {"sparsity", "export", "speed"}
    messages = [case.result[0].message for suite in others for case in suite if case.result]
    assert messages[0].startswith("Not 2:4 along axis 0")


def test_ungated_latency_is_skipped_even_if_it_fails(records: Records, tmp_path: Path) -> None:
    write_report(with_latency(records, "fail", gated=False).report(), tmp_path)
    xml = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    (suite,) = [suite for suite in xml if suite.name == "latency"]
    assert (suite.tests, suite.failures, suite.skipped) == (2, 0, 2)


def test_benchmark_entries_are_figures_of_which_less_is_better(
    records: Records, tmp_path: Path
) -> None:
    perplexity = PairedMetric(
        name="perplexity",
        higher_is_better=False,
        samples=64,
        dense=Estimate(value=12.0, standard_error=0.3),
        sparse=Estimate(value=13.5, standard_error=0.4),
        difference=Estimate(value=1.5, standard_error=0.1),
    )
    evaluate = replace(records.evaluate, metrics=(perplexity,))
    report = replace(records, evaluate=evaluate).report()
    entries = json.loads(written(report, tmp_path, "benchmark.json"))
    assert all(set(entry) == {"name", "unit", "value", "range"} for entry in entries)
    by_name = {entry["name"]: entry for entry in entries}
    assert len(by_name) == len(entries) == 2 * 4 + 2 + 2 + 1 + 4
    assert (by_name["verdict, speed"]["value"], by_name["verdict, speed"]["range"]) == (
        1,
        "not gated",
    )
    assert by_name["sparse perplexity"]["value"] == 13.5
    assert by_name["sparse perplexity"]["range"] == "± 0.4"
    sparse = by_name["onnxruntime, batch 1, sequence 128, sparse median"]
    assert sparse["value"] == report.latency[0].sparse.median_ms
    assert sparse["unit"] == "ms"


def test_summary_lists_the_worst_five_layers_in_order(report: Report, tmp_path: Path) -> None:
    summary = written(report, tmp_path, "summary.md")
    section = summary.split("### Layers with the largest error")[1].split("###")[0]
    names = re.findall(r"`([^`]+)`", section)
    errors = {layer.name: layer.held_out_error or 0.0 for layer in report.pruning.layers}
    assert names == sorted(errors, key=lambda name: -errors[name])[:5]


def test_report_without_latency_or_pruned_layers_can_be_written(
    records: Records, tmp_path: Path
) -> None:
    agreement_only = replace(records.evaluate, metrics=records.evaluate.metrics[1:])
    bare = replace(
        all_skipped(records),
        evaluate=agreement_only,
        bench=replace(records.bench, latency=()),
    )
    report = bare.report()
    assert report.pruning.totals.relative_error is None
    assert report.pruning.totals.density is None
    assert report.accuracy.dense is None
    write_report(report, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    assert "No latency was measured." in text
    assert "not measured" in text


def test_figures_are_written_with_the_digits_they_deserve() -> None:
    assert estimate(Estimate(value=0.81234, standard_error=0.0094)) == "0.8123 ± 0.0094"
    assert estimate(Estimate(value=-12.3456, standard_error=3.0)) == "−12.3 ± 3.0"
    assert estimate(Estimate(value=0.5, standard_error=0.0)) == "0.5"
    assert estimate(Estimate(value=1 - 3e-13, standard_error=2e-14)) == "1"
    assert estimate(Estimate(value=0.5, standard_error=2e-6)) == "0.5000000 ± 0.0000020"
    assert estimate(None) == "–"
    assert [size(value) for value in (12, 45_612_345, 3e9, 5e12)] == [
        "12 bytes", "43.5 MiB", "2.79 GiB", "4,657 GiB",
    ]  # fmt: skip
    assert [seconds(value) for value in (0.6, 93.24, 200.4)] == ["0.6 s", "93.2 s", "3 min 20 s"]


def test_no_view_that_is_read_tells_a_path_of_this_machine(
    records: Records, tmp_path: Path
) -> None:
    text = replace(records.prune.calibration, paths=("/home/somebody/secret/calibration.txt",))
    changed = replace(
        records,
        model=replace(records.model, path="/home/somebody/models/all-MiniLM-L6-v2"),
        prune=replace(records.prune, calibration=text, held_out=text),
        evaluate=replace(records.evaluate, evaluation=text),
    )
    made = changed.report()
    options = {**made.options, "recipe": "/home/somebody/bert.toml", "allow": ["/home/somebody/x"]}
    write_report(made.model_copy(update={"options": options}), tmp_path)
    for name in ("report.html", "summary.md"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert "somebody" not in page
        assert "all-MiniLM-L6-v2" in page
    assert "bert.toml" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_view_says_when_by_what_and_of_which_files(records: Records, tmp_path: Path) -> None:
    made = records.report().model_copy(
        update={
            "date": "2026-11-28T14:02:11+00:00",
            "contents_sha256": "0123456789abcdef" * 4,
            "environment": {"prox24-deploy": "9.8.7"},
        }
    )
    write_report(made, tmp_path)
    for name in ("report.html", "summary.md"):
        text = " ".join((tmp_path / name).read_text(encoding="utf-8").split())
        assert "2026-11-28 14:02 UTC, prox24-deploy 9.8.7; baseline none" in text
        assert "0123456789abcdef" in text


def test_agreement_of_embeddings_and_of_neighbours_is_in_every_view(
    records: Records, tmp_path: Path
) -> None:
    write_report(records.report(), tmp_path)
    names = [m.name for m in records.evaluate.metrics if isinstance(m, DirectMetric)]
    assert len(names) == 2
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    entries = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    told = {entry["name"]: entry["value"] for entry in entries}
    for metric in records.evaluate.metrics:
        if isinstance(metric, DirectMetric) and metric.agreement:
            assert f"| {metric.name} (sparse against dense) |" in summary
            assert told[f"1 - {metric.name}"] == 1 - metric.agreement.value


def test_columns_that_say_nothing_are_left_out(records: Records) -> None:
    shown = grids.latency(records.report().latency)
    titles = [title for title, _ in shown.titles]
    assert "Past" not in titles
    assert "Sequence" in titles
    assert [len(row) for row in shown.rows] == [len(titles)] * 2
    assert grids.grid((grids.Column(title="A", read=str),), [""]).titles == (("A", ""),)


def test_departures_within_their_tolerance_have_no_more_digits_than_they_deserve() -> None:
    tiny = Estimate(value=-3.2e-8, standard_error=1e-9)
    assert departure(tiny, within=True) == "< 0.001"
    assert departure(tiny, within=False) == estimate(tiny)
    assert departure(Estimate(value=0.0, standard_error=0.0), within=True) == "0"
    large = Estimate(value=0.02, standard_error=0.001)
    assert departure(large, within=True) == estimate(large)
