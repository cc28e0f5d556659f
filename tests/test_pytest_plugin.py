"""The plugin as a user meets it: pytest in a process of its own, which finds it by entry point."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_records

from prox24_deploy.core.records import DirectMetric, Estimate
from prox24_deploy.pytest_plugin import AssertNoRegression

TEST = """
def test_release(assert_no_regression):
    assert_no_regression("report.json", "baseline.json", limits={limits!r}, allow={allow!r})
"""


def write_pair(folder: Path, *, after: float, before: float) -> None:
    """report.json and baseline.json, which differ in their cosine alone."""
    report = make_records().report()
    for name, value in (("report.json", after), ("baseline.json", before)):
        metric = DirectMetric(
            name="embedding cosine",
            higher_is_better=True,
            samples=64,
            agreement=Estimate(value=value, standard_error=1e-6),
        )
        accuracy = report.accuracy.model_copy(update={"metrics": (metric,)})
        text = report.model_copy(update={"accuracy": accuracy}).model_dump_json()
        (folder / name).write_text(text, encoding="utf-8")


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a release like its baseline, and a test of it."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(TEST.format(limits=None, allow=()), encoding="utf-8")
    write_pair(tmp_path, after=0.95, before=0.95)
    return tmp_path


def test_it_is_found_by_its_entry_point() -> None:
    found = importlib.metadata.entry_points(group="pytest11", name="prox24-deploy")
    assert [entry.value for entry in found] == ["prox24_deploy.pytest_plugin"]


def test_a_release_that_holds_passes(project: Path) -> None:
    ran = run_pytest(project)
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


def test_a_regression_fails_with_the_table(project: Path) -> None:
    write_pair(project, after=0.5, before=0.95)
    ran = run_pytest(project)
    assert ran.returncode == 1
    assert "## Against the baseline: fail" in ran.stdout
    assert "| `embedding cosine` | 0.95 | 0.5 | at most 2 % worse |" in ran.stdout
    assert "Traceback" not in ran.stdout


def test_the_fixture_fails_this_very_test(
    assert_no_regression: AssertNoRegression, tmp_path: Path
) -> None:
    write_pair(tmp_path, after=0.5, before=0.95)
    with pytest.raises(pytest.fail.Exception, match="Against the baseline: fail"):
        assert_no_regression(tmp_path / "report.json", tmp_path / "baseline.json")
    limits = tmp_path / "limits.toml"
    limits.write_text('["embedding cosine"]\nthreshold = 0.4\n', encoding="utf-8")
    assert_no_regression(tmp_path / "report.json", tmp_path / "baseline.json", limits=limits)


def test_limits_and_allow_reach_the_comparison(project: Path) -> None:
    write_pair(project, after=0.5, before=0.95)
    (project / "limits.toml").write_text('["embedding cosine"]\n', encoding="utf-8")
    (project / "test_it.py").write_text(
        TEST.format(limits="limits.toml", allow=()), encoding="utf-8"
    )
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    report = json.loads((project / "report.json").read_bytes())
    report["environment"]["gpu"] = "other"
    (elsewhere / "report.json").write_text(json.dumps(report), encoding="utf-8")
    for name, allow in (("test_allowed.py", ("gpu",)), ("test_refused.py", ())):
        text = TEST.format(limits="limits.toml", allow=allow)
        text = text.replace('"report.json"', '"elsewhere/report.json"')
        (project / name).write_text(text, encoding="utf-8")
    ran = run_pytest(project)
    assert "1 failed, 2 passed" in ran.stdout
    assert "FAILED test_refused.py::test_release" in ran.stdout
    assert "--allow gpu" in ran.stdout


def test_whoever_does_not_use_it_loads_nothing(project: Path) -> None:
    heavy = ["torch", "onnx", "pydantic", "numpy", "prox24_deploy.report"]
    (project / "test_it.py").write_text(
        f"import sys\ndef test_it():\n    assert not set({heavy}) & sys.modules.keys()\n",
        encoding="utf-8",
    )
    ran = run_pytest(project, "-W", "error")
    assert ran.returncode == 0, ran.stdout
