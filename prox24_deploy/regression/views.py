"""Views of a comparison for pipelines: JSON, Markdown, JUnit and benchmark.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from junitparser import Error, Failure, Skipped, TestCase

from prox24_deploy.bundle.layout import MANIFEST_FILE
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import UsageError
from prox24_deploy.report.escape import code, markdown, xml_text
from prox24_deploy.report.formats import amount
from prox24_deploy.report.junit import junit_xml
from prox24_deploy.report.schema import Change, Comparison

_SENTENCES = {
    "pass": "Every figure with a limit holds it.",
    "fail": "A figure does not hold its limit.",
    "inconclusive": "Whether a limit holds is open: a measurement is too noisy, or missing.",
}
_DRIFT = (
    "Runs of different days share no clock: the speed-up over the dense twin, timed in turns, is "
    "free of drift and decides where a latency exceeds its limit."
)


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write the four files into `out`, each by atomic rename, compare.json last.

    Raises:
        UsageError: `out` is a bundle, whose files are sealed.
    """
    if (out / MANIFEST_FILE).exists():
        raise UsageError(f"{out} is a bundle, whose files are sealed; pass another folder with -o.")
    write_atomic(out / "compare.md", render_markdown(comparison).encode())
    write_atomic(out / "compare.junit.xml", render_junit(comparison))
    write_atomic(out / "benchmark.json", render_benchmark(comparison))
    write_atomic(out / "compare.json", (comparison.model_dump_json(indent=2) + "\n").encode())


def render_markdown(comparison: Comparison) -> str:
    """Markdown for the summary of a CI job: what failed or is open first, then all the rest."""
    accepted = (
        f", accepted {comparison.date}: {markdown(comparison.reason)}" if comparison.date else ""
    )
    lines = [
        f"## Against the baseline: {comparison.verdict}",
        "",
        f"{_SENTENCES[comparison.verdict]} Baseline {code(comparison.baseline)}{accepted}.",
        "",
    ]
    lines += [
        f"- {difference.key} is {code(difference.report)} and was {code(difference.baseline)}, "
        "which was allowed"
        for difference in comparison.allowed
    ]
    groups = {
        "Regressions": "fail",
        "Undecided": "inconclusive",
        "Held": "pass",
        "Not gated": "not gated",
    }
    for title, verdict in groups.items():
        if changes := [c for c in comparison.changes if c.verdict == verdict]:
            lines += ["", f"### {title}", "", *_rows(changes)]
    return "\n".join([*lines, "", _DRIFT, ""])


def render_junit(comparison: Comparison) -> bytes:
    """One suite for each kind of figure.

    A regression is a failure, a figure that the report lacks an error, and what is open or has no
    limit is skipped with its reason.
    """
    kinds = dict.fromkeys(change.kind for change in comparison.changes)
    suites = [
        (kind, [_test_case(c) for c in comparison.changes if c.kind == kind]) for kind in kinds
    ]
    return junit_xml("prox24-deploy compare", suites)


def render_benchmark(comparison: Comparison) -> bytes:
    """Figures of which less is better, as [{name, unit, value, range}] for dashboards."""
    entries = [
        {
            "name": change.name,
            "unit": change.unit,
            "value": change.after,
            "range": "" if change.before is None else f"baseline {change.before:.6g}",
        }
        for change in comparison.changes
        if change.after is not None and not change.higher_is_better
    ]
    return (json.dumps(entries, indent=2) + "\n").encode()


def _rows(changes: Sequence[Change]) -> list[str]:
    return [
        "| figure | baseline | now | limit | finding |",
        "|---|---|---|---|---|",
        *(
            f"| {code(c.name)} | {amount(c.before, c.unit)} | {amount(c.after, c.unit)} | "
            f"{markdown(c.limits)} | {markdown(c.message)} |"
            for c in changes
        ),
    ]


def _test_case(change: Change) -> TestCase:
    case = TestCase(xml_text(change.name), f"prox24-deploy.baseline.{change.kind}")
    limits = f"; limit: {change.limits}" if change.limits else "; no limit"
    message = xml_text(change.message + limits)
    if change.verdict in {"not gated", "inconclusive"}:
        case.result = [Skipped(message)]
    elif change.verdict == "fail":
        kind = Error if change.status == "missing" else Failure
        case.result = [kind(message, change.kind)]
    return case
