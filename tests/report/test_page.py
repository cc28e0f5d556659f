"""The page of a report in a real browser: wide and narrow, light and dark, screen and paper."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Records, make_records, make_row, with_budget, with_not_measured
from chromium import running_chromium
from page_audit import GEOMETRY, View, audit, axe_version, opened, unprinted
from playwright.sync_api import Browser

from prox24_deploy.core.records import Estimate, PairedMetric
from prox24_deploy.regression.baseline import Baseline, updated
from prox24_deploy.regression.compare import held_against
from prox24_deploy.report.plots import error_plots, latency_plot, trend_plot
from prox24_deploy.report.render import render_html
from prox24_deploy.report.schema import Report

pytestmark = pytest.mark.browser

# Widths in pixels of a desktop, of a telephone and of an A4 page.
WIDE, NARROW, PAPER = 1280, 390, 794
# One fault of every kind, as (what stands in the page, what stands there instead).
PLANTED = (
    ("<main>", '<main><img src="data:,">'),
    ("--muted: #5b6169", "--muted: #c0c0c0"),
    ("</main>", '<script src="http://127.0.0.1:9/x.js"></script></main>'),
    ("</main>", "<script>console.warn('old'); undefined.x</script></main>"),
    ("</main>", '<p style="width: 500px">wide</p><a href="#" style="outline: none">go</a></main>'),
    ('<svg role="img" aria-labelledby="errors-0-title errors-0-desc"', '<svg role="img"'),
    ('<title id="errors-0-title">', "<title hidden></title><title>"),
    (
        '<svg role="img" aria-labelledby="errors-1',
        '<svg style="display: none" role="img" aria-labelledby="e',
    ),
    (">dense</text>", f">{'dense ' * 9}</text>"),
    (">milliseconds</text>", f">{'milliseconds ' * 9}</text>"),
    ("</main>", '<div class="scroll"><p style="width: 900px">wide</p></div></main>'),
)
FOUND = (
    r"axe, critical, image-alt:",
    r"axe, serious, color-contrast: .*kicker",
    r"request: http://127\.0\.0\.1:9/x\.js",
    r"script: .*undefined",
    r"console: old",
    r"page: \d+ px wide in 390",
    r"focus on go: no outline",
    r"plots: \d+ of \d+ have a name",
    r"plot .*: 0 x 0",
    r"plot .* is cut",
    r"plot .* overlaps",
    r"scrolling null: not focusable",
    r"scrolling scroll: no region with a label",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as started:
        yield started


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(rich_report())


@pytest.fixture
def page(html: str, tmp_path: Path) -> Path:
    return written(html, tmp_path)


def written(html: str, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def test_a_row_of_a_table_is_a_list_on_a_telephone(browser: Browser, page: Path) -> None:
    with opened(browser, page, View(width=NARROW)) as (shown, _):
        table = shown.get_by_role("region", name="Latency", exact=True)
        cell = table.locator("td[data-title='Speed-up']").first
        assert cell.evaluate("part => getComputedStyle(part, '::before').content") == '"Speed-up"'
        inside = table.evaluate("part => part.scrollWidth <= part.clientWidth")
        # The verdict of the row is seen without scrolling sideways.
        verdict = table.locator("td[data-title='Verdict']").first.bounding_box()
        assert inside
        assert verdict is not None
        assert verdict["x"] >= 0
        assert verdict["x"] + verdict["width"] <= NARROW


def test_the_verdict_in_four_parts_is_on_the_first_screen(browser: Browser, page: Path) -> None:
    for width in (WIDE, NARROW):
        with opened(browser, page, View(width=width)) as (shown, _):
            sentence = shown.locator(".verdict").bounding_box()
            assert sentence is not None
            assert sentence["y"] + sentence["height"] < 350
            tiles = shown.locator(".parts > div").all()
            assert len(tiles) == 4
            tops = [
                tile.evaluate("part => getComputedStyle(part).borderTopColor") for tile in tiles
            ]
            by_name = dict(zip(("sparsity", "export", "accuracy", "speed"), tops, strict=True))
            assert by_name["accuracy"] != by_name["sparsity"] == by_name["export"]


def rich_report() -> Report:
    """A release with every section: a budget, two backends, one not measured, and regressions."""
    records = with_two_backends(make_records(blocks=2, gated=True))
    before = with_not_measured(with_budget(records, max_loss=0.05), alone=False)
    baseline: Baseline | None = None
    for number, value in enumerate((0.814, 0.809, 0.8215, 0.8203), start=1):
        headline, *others = before.evaluate.metrics
        assert isinstance(headline, PairedMetric)
        headline = replace(headline, sparse=Estimate(value=value, standard_error=0.0094))
        accepted = replace(before, evaluate=replace(before.evaluate, metrics=(headline, *others)))
        made = updated(
            accepted.report(),
            baseline,
            reason=f"release {number}, calibrated on the questions of the month before",
            date=f"2026-0{number}-03T08:00:00+00:00",
            keep=10,
        )
        baseline = Baseline(
            source="baseline.json",
            report=made.report,
            reason=made.reason,
            date=made.date,
            history=made.history,
        )
    assert baseline is not None
    return held_against(with_budget(before, max_loss=0.05, cosine=0.9).report(), baseline)


def with_two_backends(records: Records) -> Records:
    rows = records.bench.latency
    others = tuple(replace(row, backend="cusparselt", verdict="inconclusive") for row in rows)
    return replace(records, bench=replace(records.bench, latency=(*rows, *others)))


@pytest.mark.parametrize(
    "view",
    [
        View(WIDE, unfolded=True),
        View(WIDE, "dark"),
        View(NARROW, colours=False),
        # On paper the colours of the dark scheme would be unreadable.
        View(PAPER, "dark", "print"),
    ],
    ids=lambda view: f"{view.width}-{view.scheme}-{view.media}",
)
def test_the_page_has_no_fault(browser: Browser, page: Path, view: View) -> None:
    found = audit(browser, page, view)
    assert (found.faults, found.advice) == ((), ())


def test_the_page_prints(browser: Browser, page: Path) -> None:
    with opened(browser, page, View(PAPER, media="print")) as (shown, heard):
        assert shown.pdf(format="A4").startswith(b"%PDF-")
    assert heard == []


def test_numbers_of_any_size_fit_their_plots(browser: Browser, html: str, tmp_path: Path) -> None:
    """Neither cut nor over each other, in the fonts of this machine."""
    values = (1.2e-5, -0.0021, 0.99971, 12.34501, 15873.2, 1.25e6)
    trends = [
        trend_plot("figure", [("2026-01-01", value), ("this build", value * 1.00002)], index)
        for index, value in enumerate(values)
    ]
    latencies = [
        latency_plot(make_row(1, ms, gated=True, device="CPU"), index)
        for index, ms in enumerate((0.0123, 1.5, 999.0, 123456.0))
    ]
    errors = [error_plots(make_records(blocks).prune.layers)[0] for blocks in (1, 13, 120)]
    figures = "".join(f"<figure>{plot}</figure>" for plot in (*trends, *latencies, *errors))
    path = written(f"{html[: html.index('<main>')]}<main>{figures}</main>", tmp_path)
    with opened(browser, path, View(NARROW)) as (shown, _):
        assert shown.locator("main svg").count() == 13
        assert shown.evaluate(GEOMETRY) == []


def test_axe_is_of_our_time() -> None:
    assert tuple(map(int, axe_version().split("."))) >= (4, 12)


@pytest.fixture(scope="module")
def found_in_broken(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is found on a page with a fault of every kind."""
    html = render_html(make_records(blocks=1).report())
    for there, planted in PLANTED:
        assert there in html
        html = html.replace(there, planted, 1)
    path = written(html, tmp_path_factory.mktemp("broken"))
    return "\n".join(audit(browser, path, View(NARROW)).faults)


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found(found_in_broken: str, fault: str) -> None:
    assert re.search(fault, found_in_broken), found_in_broken


def test_a_table_that_does_not_print_is_found(browser: Browser, html: str, tmp_path: Path) -> None:
    broken = html.replace("content-visibility: visible; block-size: auto;", "")
    with opened(browser, written(broken, tmp_path), View(PAPER, media="print")) as (shown, _):
        assert "table All layers: not printed" in unprinted(shown)
