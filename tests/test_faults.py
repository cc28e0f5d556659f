"""The harness that strikes real runs: it judges rightly, and a short share of it finds nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_machine import one_sentence
from fault_room import Result, Timeline
from fault_runs import Ended, differences, facts, hashes, leftovers
from faults import CLASSES, asked_for, parse, rows_of, table

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults.py"


def write_bundle(root: Path) -> Path:
    """The files of a bundle that the harness tells apart."""
    files = {
        "manifest.json": {"model": {"sha256": "a"}, "tool_version": "1", "complete": True},
        "stages/evaluate.json": {"metrics": [{"value": 0.5}], "seconds": 3.5},
        "stages/bench.json": {"latency": [1.5]},
        "report.json": {"latency": [1.5]},
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value), encoding="utf-8")
    for name in ("pruned/model.safetensors", "pruned/README.md", "onnx/dense/model.onnx"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"weights")
    return root


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("pruned/model.safetensors", "other", ["pruned/model.safetensors"]),
        ("onnx/dense/model.onnx", "other", ["onnx/dense/model.onnx"]),
        ("onnx/dense/more", "other", ["onnx/dense/more"]),
        (
            "stages/evaluate.json",
            '{"metrics": [{"value": 0.6}], "seconds": 3.5}',
            ["stages/evaluate.json"],
        ),
        ("stages/evaluate.json", '{"metrics": [{"value": 0.5}], "seconds": 9}', []),
        ("stages/bench.json", '{"latency": [9]}', []),
        ("report.json", "{}", []),
        ("pruned/README.md", "other", []),
        (
            "manifest.json",
            '{"model": {"sha256": "b"}, "tool_version": "0", "complete": true}',
            ["manifest.model", "manifest.tool_version"],
        ),
    ],
)
def test_bundles_are_alike_in_all_but_times(
    bundle: Path, name: str, text: str, found: list[str]
) -> None:
    before = facts(bundle)
    (bundle / name).write_text(text, encoding="utf-8")
    assert differences(facts(bundle), before) == found


def test_a_missing_file_is_a_difference(bundle: Path) -> None:
    before = facts(bundle)
    (bundle / "onnx" / "dense" / "model.onnx").unlink()
    assert differences(facts(bundle), before) == ["onnx/dense/model.onnx"]


def test_a_link_is_not_the_file_that_it_points_to(bundle: Path, tmp_path: Path) -> None:
    before = hashes(bundle)
    file = bundle / "onnx" / "dense" / "model.onnx"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert differences(hashes(bundle), before) == ["onnx/dense/model.onnx"]


def test_temporary_files_are_left_behind(bundle: Path) -> None:
    assert leftovers(bundle) == []
    (bundle / ".partial").mkdir()
    (bundle / ".partial" / "block").touch()
    (bundle / ".manifest.json.0.tmp").touch()
    assert len(leftovers(bundle)) == 3


@pytest.mark.parametrize(
    ("code", "text", "wrong"),
    [
        (2, "Error: Model model is damaged; copy it again.\n", False),
        (
            2,
            "2026-11-28T14:02:11+00:00 WARNING something on the way\n"
            "Error: Model model is damaged; copy it again.\n",
            False,
        ),
        (1, "Error: Internal error, ValueError: model.\n", True),
        (-9, "", True),
        (2, "", True),
        (2, "Traceback (most recent call last):\nError: model.\n", True),
        (2, "Error: Model is damaged.\n", True),
        (2, "Error: model is damaged\n", True),
    ],
)
def test_a_refusal_is_one_sentence_that_names_the_thing(
    code: int, text: str, *, wrong: bool
) -> None:
    assert bool(one_sentence(Ended(code, text, 0.1), names="model")) == wrong


def test_the_work_of_a_stage_lies_between_the_last_two_writes() -> None:
    assert Timeline((0.1, 0.3, 1.5)).work == (0.3, 1.5)
    assert Timeline((0.4,)).work == (0.0, 0.4)


def test_signals_are_shared_out_and_other_classes_keep_their_number() -> None:
    asked = [name for name, _ in asked_for(parse(["--kills", "300"]))]
    shares = ("kill", "kill a fresh process", "interrupt", "terminate")
    assert [asked.count(name) for name in shares] == [220, 20, 30, 30]
    assert set(asked) == set(CLASSES)
    only = parse(["--only", "full disk", "--tries", "3"])
    assert asked_for(only) == [("full disk", number) for number in range(3)]


def test_a_fault_is_counted_and_told() -> None:
    right = Result("full disk", 0, "fitted")
    wrong = Result("full disk", 1, "exit 1", ("differs: onnx",))
    (row,) = rows_of([right, wrong])
    assert row.wrong == [wrong]
    line = table([row]).splitlines()[1]
    assert " ".join(line.split()) == "full disk 2 1 1 exit 1, 1 fitted"


# One of each kind that takes little time; the whole takes half an hour.
SHARE = (
    "kill", "interrupt", "full disk", "memory", "unwritable", "readable by others", "read-only",
    "two builds", "old version", "foreign file",
)  # fmt: skip
# SIGTERM to a process of its own is in tests/test_interrupted.py.
MORE = ("kill", "kill a fresh process", "terminate", "file size")


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [SHARE, pytest.param(MORE, marks=pytest.mark.large)], ids=["share", "more"]
)
def test_whatever_strikes_a_build_the_next_run_completes_it(share: tuple[str, ...]) -> None:
    only = [word for name in share for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", FAULTS, "--kills", "3", "--tries", "1", "--seed", "26",
         "--workers", "1", *only],
        check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {row["class"]: row for row in found["classes"]}
    assert set(rows) == set(share)
    # A signal that hit nothing would show nothing.
    assert rows["kill"]["outcomes"].keys() <= {"struck 1 ×", "struck 2 ×"}
