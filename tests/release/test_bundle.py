"""Stages of a bundle: run once, repeated when anything they depend on or left behind changes."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

from prox24_deploy.errors import BundleError
from prox24_deploy.release import bundle as bundle_module
from prox24_deploy.release.bundle import Bundle, open_bundle
from prox24_deploy.release.manifest import MANIFEST_FILE, verify


@dataclass(frozen=True)
class Made:
    """Result of a stage."""

    text: str
    values: tuple[float, ...] = ()


def work(bundle: Bundle, text: str, runs: list[str]) -> Callable[[], Made]:
    """A stage that leaves `made/result` behind."""

    def run() -> Made:
        runs.append(text)
        bundle.clean_partial()
        folder = bundle.partial / "made"
        folder.mkdir()
        (folder / "result").write_text(text, encoding="utf-8")
        bundle.publish(folder, "made")
        return Made(text, (0.1, 2.0))

    return run


def run_stage(root: Path, text: str = "one", *, fresh: bool = False) -> list[str]:
    """Run the stage in a bundle and seal it; return what was really run."""
    runs: list[str] = []
    with open_bundle(root, fresh=fresh) as bundle:
        made = bundle.stage("make", Made, {"text": text}, ["made"], work(bundle, text, runs))
        assert made == Made(text, (0.1, 2.0))
        (root / "report.json").write_text(text, encoding="utf-8")
        bundle.seal(["report.json"])
    return runs


def test_a_stage_runs_once_for_the_same_inputs(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    assert run_stage(out) == ["one"]
    assert verify(out) == []
    assert sorted(p.name for p in out.iterdir()) == [
        "made", "manifest.json", "report.json", "stages",
    ]  # fmt: skip
    assert run_stage(out) == []
    assert run_stage(out, "two") == ["two"]
    assert (out / "made" / "result").read_text(encoding="utf-8") == "two"
    assert run_stage(out, "two", fresh=True) == ["two"]
    assert verify(out) == []


def test_another_version_of_the_tool_runs_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(tmp_path)
    monkeypatch.setattr(bundle_module, "__version__", "99")
    assert run_stage(tmp_path) == ["one"]


def damage_change(out: Path) -> None:
    (out / "made" / "result").write_text("oops", encoding="utf-8")


def damage_remove(out: Path) -> None:
    (out / "made" / "result").unlink()


def damage_add(out: Path) -> None:
    (out / "made" / "extra").touch()


def damage_record(out: Path) -> None:
    (out / "stages" / "make.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_change, damage_remove, damage_add, damage_record])
def test_a_stage_whose_files_were_touched_runs_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run_stage(tmp_path)
    damage(tmp_path)
    assert run_stage(tmp_path) == ["one"]
    assert (tmp_path / "made" / "result").read_text(encoding="utf-8") == "one"
    assert verify(tmp_path) == []


def test_a_stage_that_fails_leaves_earlier_ones_alone(tmp_path: Path) -> None:
    def fail() -> Made:
        raise RuntimeError("on purpose")

    run_stage(tmp_path)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        open_bundle(tmp_path) as bundle,
    ):
        bundle.stage("second", Made, {}, ["second"], fail)
    with open_bundle(tmp_path, existing=True) as bundle:
        assert bundle.load("make", Made).text == "one"
        with pytest.raises(BundleError, match="holds no finished stage 'second'"):
            bundle.load("second", Made)


POINTS = ("during work", "after work", "after publish", "after record", "in a write")


def killed_child(root: Path, point: str) -> None:
    """Run the stage and die by SIGKILL at one point."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with open_bundle(root) as bundle:

        def run() -> Made:
            bundle.clean_partial()
            folder = bundle.partial / "made"
            folder.mkdir()
            if point == "during work":
                die()
            (folder / "result").write_text("one", encoding="utf-8")
            if point == "after work":
                die()
            bundle.publish(folder, "made")
            if point == "after publish":
                die()
            return Made("one", (0.1, 2.0))

        if point == "after record":
            Bundle._enter = lambda *_: die()  # type: ignore[method-assign]
        if point == "in a write":
            # Before the rename: the temporary file stays beside its target.
            Path.replace = lambda *_: die()  # type: ignore[assignment,method-assign]
        bundle.stage("make", Made, {"text": "one"}, ["made"], run)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_a_bundle_that_the_next_run_completes(tmp_path: Path, point: str) -> None:
    child = get_context("fork").Process(target=killed_child, args=(tmp_path, point))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert run_stage(tmp_path) == ["one"]
    assert verify(tmp_path) == []


def test_a_kill_before_the_first_manifest_is_no_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST_FILE}.0123.tmp").write_text("half", encoding="utf-8")
    assert run_stage(tmp_path) == ["one"]
    assert verify(tmp_path) == []


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with (
        pytest.raises(BundleError, match=r"holds 'notes.txt' and no manifest.json"),
        open_bundle(tmp_path),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(BundleError, match="out is a file"), open_bundle(tmp_path / "out"):
        pass


def test_an_existing_bundle_can_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="run prune first"), open_bundle(tmp_path, existing=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_one_build_at_a_time(tmp_path: Path) -> None:
    with (
        open_bundle(tmp_path),
        pytest.raises(BundleError, match="is being written by another build"),
        open_bundle(tmp_path),
    ):
        pass
    with pytest.raises(RuntimeError, match="on purpose"), open_bundle(tmp_path):
        raise RuntimeError("on purpose")
    assert run_stage(tmp_path) == ["one"]


def test_fresh_removes_what_the_tool_made_and_nothing_else(tmp_path: Path) -> None:
    run_stage(tmp_path)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with open_bundle(tmp_path, fresh=True) as bundle:
        assert bundle.manifest.stages == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "mine.txt"]


def test_leftovers_are_cleaned_except_what_may_be_resumed(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        bundle.partial.mkdir()
        for name in ("keep", "drop"):
            (bundle.partial / name).mkdir()
        bundle.clean_partial(keep=bundle.partial / "keep")
        assert [p.name for p in bundle.partial.iterdir()] == ["keep"]
