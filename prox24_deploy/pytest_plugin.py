"""A pytest fixture that holds a release against a baseline; nothing heavy is imported until used.

def test_release(assert_no_regression):
    assert_no_regression("release", "baseline.json", limits="limits.toml", allow=["driver"])
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

import pytest

__all__ = ["AssertNoRegression", "assert_no_regression"]

AnyPath = str | PathLike[str]


class AssertNoRegression(Protocol):
    """What the fixture gives."""

    def __call__(
        self,
        report: AnyPath,
        baseline: AnyPath,
        limits: AnyPath | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        """Fail the test unless every figure with a limit holds it; arguments as of `compare`."""
        ...


@pytest.fixture(scope="session")
def assert_no_regression() -> AssertNoRegression:
    """Fail a test on a regression against a baseline, with the table in the message.

    A comparison that noise leaves open fails too, for it asserts nothing; one that is refused
    raises the sentence that `compare` would print.
    """
    return _assert_no_regression


def _assert_no_regression(
    report: AnyPath,
    baseline: AnyPath,
    limits: AnyPath | None = None,
    allow: Sequence[str] = (),
) -> None:
    from prox24_deploy.regression.compare import compare_files
    from prox24_deploy.regression.views import render_markdown

    file = Path(limits) if limits else None
    found = compare_files(Path(report), Path(baseline), limits=file, allow=allow)
    if found.verdict != "pass":
        pytest.fail(render_markdown(found), pytrace=False)
