import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_records
from command_line import run_cli

from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.regression import baseline as baseline_module
from prox24_deploy.regression.baseline import (
    BaselineFile,
    read_baseline,
    read_baseline_file,
    update_baseline,
)
from prox24_deploy.report.assemble import write_report
from prox24_deploy.report.schema import Report

COSINE = "embedding cosine"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_report(make_records(gated=True).report(), tmp_path / "bundle")
    return tmp_path / "bundle"


def accept(bundle: Path, path: Path, number: int = 1, keep: int = 10) -> BaselineFile:
    date = f"2026-01-{number:02}T00:00:00+00:00"
    return update_baseline(bundle, path, reason=f"release {number}", date=date, keep=keep)


def test_a_baseline_keeps_the_report_why_and_when(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    made = accept(bundle, path)
    assert read_baseline_file(path) == made
    found = read_baseline(path)
    report = Report.model_validate_json((bundle / "report.json").read_bytes())
    named = replace(report.model, path=report.model.title)
    assert found.report == report.model_copy(update={"model": named})
    assert (found.reason, found.date) == ("release 1", "2026-01-01T00:00:00+00:00")
    (entry,) = found.history
    assert entry.figures[COSINE] == 0.9712
    assert {name.split("/")[0] for name in entry.figures} >= {"speed-up", "latency", "size"}


def test_a_baseline_says_the_name_of_the_model_and_no_folder_of_this_machine(
    bundle: Path, tmp_path: Path
) -> None:
    written = json.loads((bundle / "report.json").read_bytes())
    written["model"] |= {"path": f"{tmp_path}/secret/tiny", "name": (name := "owner/tiny")}
    written["options"]["text"] = {"calibration": [f"{tmp_path}/secret/train.txt", "b/c.txt"]}
    written["accuracy"]["evaluation"]["paths"] = [f"{tmp_path}/secret/eval.txt"]
    (bundle / "report.json").write_text(json.dumps(written))
    path = tmp_path / "baseline.json"
    run = run_cli("baseline", "update", bundle, path, "--reason", "first")
    assert f"baseline.json: {name} accepted, release 1 of" in run.out
    assert str(tmp_path) not in path.read_text()
    kept = read_baseline(path).report
    assert kept.model.path == name
    assert kept.options["text"] == {"calibration": ["train.txt", "b/c.txt"]}
    assert kept.accuracy.evaluation.paths == ("eval.txt",)
    # As older versions wrote it.
    old = json.loads(path.read_bytes())
    old["report"]["model"]["path"] = f"{tmp_path}/secret/tiny"
    path.write_text(json.dumps(old))
    assert run_cli("compare", bundle, path).err == ""


def test_history_is_the_last_releases_in_order(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for number in range(1, 6):
        accept(bundle, path, number, keep=3)
    assert [entry.reason for entry in read_baseline(path).history] == [
        "release 3", "release 4", "release 5",
    ]  # fmt: skip


def test_a_report_and_a_bundle_serve_as_a_baseline_without_history(bundle: Path) -> None:
    for path in (bundle, bundle / "report.json"):
        found = read_baseline(path)
        assert (found.reason, found.date, found.history) == ("", "", ())


def test_a_report_is_never_overwritten_by_a_baseline(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "report.json").read_bytes()
    for path in (bundle / "report.json", bundle):
        with pytest.raises(BundleError, match="is a report and no baseline file"):
            accept(bundle, path)
    assert (bundle / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline_version": 0}, "has baseline_version 0, expected 1; move it away and run"),
        ({"baseline_version": 2}, "has baseline_version 2, expected 1; move it away and run"),
        ({"report": {"schema_version": 0}}, "has schema_version 0, expected 2; move it away"),
        ({"history": 3}, "is damaged at 'history'"),
        (
            {"history": [{"date": "", "reason": "", "verdict": "pass", "figures": {"a": "nan"}}]},
            r"is damaged at 'history\.0\.figures\.a': Input should be a finite number",
        ),
        ({"surprise": 3}, "is damaged at 'surprise'"),
    ],
)
def test_another_version_or_a_damaged_file_is_refused_with_the_way_on(
    bundle: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "baseline.json"
    accept(bundle, path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(BundleError, match=message):
        read_baseline(path)
    with pytest.raises(BundleError, match=message):
        accept(bundle, path)
    assert path.read_bytes() == before


def test_what_is_no_json_or_is_not_there_is_named(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_bytes(b"{")
    for read in (read_baseline, read_baseline_file):
        for content in (b"{", b"[" * 5000, b'{"a": 1, "a": 2}', b'"\xff"'):
            broken.write_bytes(content)
            with pytest.raises(BundleError, match=r"broken\.json is not readable JSON"):
                read(broken)
        broken.write_bytes(b"[]")
        with pytest.raises(BundleError, match=r"broken\.json is no JSON object"):
            read(broken)
        with pytest.raises(BundleError, match=r"none\.json cannot be read"):
            read(tmp_path / "none.json")


def test_a_baseline_needs_a_reason(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    with pytest.raises(UsageError, match="A baseline needs a reason"):
        update_baseline(bundle, path, reason="  ", date="2026-01-01")
    assert not path.exists()


def test_a_failed_write_leaves_the_old_baseline(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "baseline.json"
    accept(bundle, path)
    before = path.read_bytes()

    def refuse(path: Path, data: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(baseline_module, "write_atomic", refuse)
    with pytest.raises(OSError, match="disk full"):
        accept(bundle, path, 2)
    assert path.read_bytes() == before


def test_the_commands_accept_show_and_compare(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    first = run_cli("baseline", "update", bundle, path, "--reason", "first", "--json")
    assert first.code == 0, first.err
    assert "report" not in json.loads(first.out)
    second = run_cli("baseline", "update", bundle, path, "--reason", "[second]", "--keep", "5")
    assert "release 2 of at most 5 kept" in second.out
    shown = run_cli("baseline", "show", path)
    assert shown.code == 0
    for text in ("first", "[second]", COSINE, "0.9712", "Baseline since 20"):
        assert text in shown.out
    # A line for each figure, with its unit and a column for each release.
    (size,) = (line.split() for line in shown.out.splitlines() if "size/packed" in line)
    assert (size[2::2], len(size)) == (["MiB", "MiB"], 5)
    assert max(map(len, shown.out.splitlines())) <= 120
    entries = json.loads(run_cli("baseline", "show", path, "--json").out)["history"]
    assert [entry["reason"] for entry in entries] == ["first", "[second]"]
    # Its standard errors alone cannot tell, for these records have no values per sample.
    compared = run_cli("compare", bundle, path)
    assert compared.code == 5
    assert "top-1 neighbour agreement" in compared.out
    (latency, *_) = (line for line in compared.out.splitlines() if "latency/" in line)
    (packed,) = (line for line in compared.out.splitlines() if "size/packed" in line)
    assert (latency.count(" ms "), packed.count(" MiB")) == (2, 4)
    refused = run_cli("baseline", "show", bundle / "report.json")
    assert refused.code == 2
    assert "is no baseline file" in refused.err


def test_update_without_a_reason_is_bad_usage(bundle: Path, tmp_path: Path) -> None:
    run = run_cli("baseline", "update", bundle, tmp_path / "baseline.json")
    assert run.code == 2
    assert "--reason" in run.err
