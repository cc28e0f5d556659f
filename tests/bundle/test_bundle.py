"""Stages of a bundle: run once, repeated when anything they depend on or left behind changes."""

import itertools
import json
import logging
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest

from prox24_deploy import __version__
from prox24_deploy.bundle import stage as stage_module
from prox24_deploy.bundle.bundle import Bundle, open_bundle
from prox24_deploy.bundle.layout import MANIFEST_FILE, PARTIAL
from prox24_deploy.bundle.manifest import (
    StageEntry,
    hash_file,
    read_manifest,
    verify,
    write_manifest,
)
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace, stage_key
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.records import OnnxModel
from prox24_deploy.core.types import Progress

Start = Literal["nothing", "another input", "fresh"]


@dataclass(frozen=True, slots=True)
class Made:
    """Result of a stage."""

    text: str
    values: tuple[float, ...] = (0.1, 2.0)


@dataclass(frozen=True, slots=True)
class Other:
    """Result of a stage of a later version, which records more."""

    text: str
    count: int


def content(root: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes, None for a folder."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@dataclass(frozen=True, kw_only=True)
class Words:
    """Inputs of the toy stages; what ran is told to `runs`, which is no input."""

    text: str
    runs: list[str] = field(metadata=unkeyed("a test listens here"), default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Inputs of a stage that reads what another left."""

    base: Artifact
    text: str = ""


def silent(*_: object) -> None:
    """Progress that nobody sees."""


def run_base(inputs: Words, work: Workspace, _: Progress) -> Made:
    inputs.runs.append("base")
    (work.root / "base").write_text(inputs.text, encoding="utf-8")
    return Made("base")


def run_make(inputs: Words, work: Workspace, _: Progress) -> Made:
    inputs.runs.append("make")
    folder = work.partial / "deep" / "made"
    folder.mkdir(parents=True)
    (folder / "result").write_text(f"result {inputs.text}", encoding="utf-8")
    (work.partial / "made.log").write_text(f"log {inputs.text}", encoding="utf-8")
    return Made(inputs.text)


# One output, written in place.
BASE = Stage(name="base", result=Made, run=run_base, outputs=("base",))
# Two outputs, a folder and a file whose names begin alike, made aside.
MAKE = Stage(name="make", result=Made, run=run_make, outputs=("deep/made", "made.log"))


def plain(run: Callable[[], Made], *outputs: str) -> Stage[Words, Made]:
    """The stage "make" with other work and outputs."""
    return Stage(name="make", result=Made, run=lambda *_: run(), outputs=outputs)


def base(bundle: Bundle, runs: list[str]) -> Made:
    """No input of it ever changes."""
    return bundle.run(BASE, Words(text="base", runs=runs), silent)


def make(bundle: Bundle, text: str, runs: list[str]) -> Made:
    return bundle.run(MAKE, Words(text=text, runs=runs), silent)


def build(root: Path, text: str = "one", *, fresh: bool = False) -> list[str]:
    """Run both stages and seal the bundle; return the stages that were really run."""
    runs: list[str] = []
    with open_bundle(root, fresh=fresh) as bundle:
        assert base(bundle, runs) == Made("base")
        assert make(bundle, text, runs) == Made(text)
        bundle.promise(["report.json"])
        (root / "report.json").write_text(text, encoding="utf-8")
        bundle.seal(["report.json"])
    assert [name for name in ("base", "make") if name not in runs] == bundle.reused
    return runs


def test_a_stage_runs_once_for_the_same_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a" / "out"
    assert build(out) == ["base", "make"]
    first = content(out)
    assert sorted(first) == [
        "base", "deep", "deep/made", "deep/made/result", "made.log", MANIFEST_FILE, "report.json",
        "stages", "stages/base.json", "stages/make.json",
    ]  # fmt: skip
    assert verify(out) == []
    caplog.clear()
    assert build(out) == []
    assert content(out) == first
    assert caplog.messages == [
        "stage base: unchanged, not run again",
        "stage make: unchanged, not run again",
    ]
    assert build(out, fresh=True) == ["base", "make"]
    assert verify(out) == []


def test_only_the_stage_whose_input_changed_runs_again(tmp_path: Path) -> None:
    build(tmp_path)
    assert build(tmp_path, "two") == ["make"]
    assert (tmp_path / "deep" / "made" / "result").read_text(encoding="utf-8") == "result two"
    assert (tmp_path / "made.log").read_text(encoding="utf-8") == "log two"
    assert verify(tmp_path) == []


def test_another_version_of_the_tool_runs_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.setattr(stage_module, "__version__", "99")
    assert build(tmp_path) == ["base", "make"]


def test_the_key_depends_on_name_and_inputs_and_not_on_their_order() -> None:
    keys = [
        stage_key(name, inputs)
        for name in ("prune", "export")
        for inputs in ({"a": 1, "b": [2, 3]}, {"a": 1, "b": [3, 2]}, {"a": 1}, {"a": "1"}, {})
    ]
    assert len(set(keys)) == len(keys)
    assert stage_key("prune", {"b": [2, 3], "a": 1}) == keys[0]


def test_a_moved_bundle_goes_on_where_it_was(tmp_path: Path) -> None:
    build(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert build(tmp_path / "after") == []


def test_the_manifest_tells_what_a_stage_took_and_left(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        make(bundle, "one", [])
        assert read_manifest(tmp_path).stages == bundle.manifest.stages
    manifest = read_manifest(tmp_path)
    entry = manifest.stages["make"]
    assert entry.key == stage_key("make", {"text": "one"})
    assert entry.inputs == {"text": "one"}
    assert entry.outputs == ["stages/make.json", "deep/made", "made.log"]
    assert 0 <= entry.seconds < 60
    assert list(manifest.files) == ["deep/made/result", "made.log", "stages/make.json"]
    record = json.loads((tmp_path / "stages" / "make.json").read_bytes())
    assert record == {"text": "one", "values": [0.1, 2.0]}


def test_the_first_run_returns_what_a_later_one_reads(tmp_path: Path) -> None:
    """In the same order too: whatever is computed from it must not differ in a bit."""
    stage: Stage[Words, dict[str, float]] = Stage(
        name="t", result=dict[str, float], run=lambda *_: {"b": 0.1, "a": 2.0}
    )
    with open_bundle(tmp_path) as bundle:
        first, later = (bundle.run(stage, Words(text=""), silent) for _ in range(2))
        assert bundle.reused == ["t"]
        assert list(first.items()) == list(later.items()) == [("a", 2.0), ("b", 0.1)]
        assert bundle.load(stage) == later


def test_a_result_may_hold_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """A graph that overflows differs from PyTorch by NaN, which its check has to tell."""
    stage: Stage[Words, tuple[float, ...]] = Stage(
        name="t", result=tuple[float, ...], run=lambda *_: (math.nan, math.inf, -math.inf, 1.0)
    )
    with open_bundle(tmp_path) as bundle:
        first, later = (bundle.run(stage, Words(text=""), silent) for _ in range(2))
        assert bundle.reused == ["t"]
        assert math.isnan(first[0])
        assert first[1:] == later[1:] == (math.inf, -math.inf, 1.0)


@dataclass(frozen=True)
class Numbers:
    values: tuple[float, ...]


def test_a_stage_may_be_given_numbers_that_are_not_finite(tmp_path: Path) -> None:
    stage: Stage[Numbers, int] = Stage(name="t", result=int, run=lambda *_: 1)
    with open_bundle(tmp_path) as bundle:
        for _ in range(2):
            assert bundle.run(stage, Numbers((math.inf, math.nan)), silent) == 1
        assert bundle.reused == ["t"]
        assert bundle.run(stage, Numbers((-math.inf, math.nan)), silent) == 1
        assert bundle.reused == ["t"]
    with open_bundle(tmp_path) as bundle:
        assert bundle.load(stage) == 1


def damage_change(out: Path) -> None:
    (out / "deep" / "made" / "result").write_text("result onE", encoding="utf-8")


def damage_remove(out: Path) -> None:
    (out / "made.log").unlink()


def damage_remove_folder(out: Path) -> None:
    shutil.rmtree(out / "deep")


def damage_record(out: Path) -> None:
    (out / "stages" / "make.json").write_text("{}", encoding="utf-8")


def damage_record_removed(out: Path) -> None:
    (out / "stages" / "make.json").unlink()


DAMAGES = [
    damage_change, damage_remove, damage_remove_folder, damage_record, damage_record_removed,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stage_whose_files_were_touched_is_no_longer_finished(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path)
    sound = content(tmp_path)
    damage(tmp_path)
    with open_bundle(tmp_path) as bundle:
        assert bundle.load(BASE) == Made("base")
        with pytest.raises(BundleError, match="holds no finished stage 'make'; run it first"):
            bundle.load(MAKE)
    caplog.clear()
    assert build(tmp_path) == ["make"]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["stage make: its files were changed, running it again"]
    assert {**content(tmp_path), MANIFEST_FILE: b""} == {**sound, MANIFEST_FILE: b""}
    assert verify(tmp_path) == []


def test_an_output_that_became_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    build(out)
    outside.mkdir()
    (outside / "mine").touch()
    shutil.rmtree(out / "deep" / "made")
    (out / "deep" / "made").symlink_to(outside)
    with pytest.raises(BundleError, match=r"holds the link .*/deep/made; remove it"):
        build(out)
    assert names(outside) == ["mine"]
    (out / "deep" / "made").unlink()
    assert build(out) == ["make"]


def test_a_result_of_another_shape_is_not_read(tmp_path: Path) -> None:
    other: Stage[Words, Other] = Stage(name="make", result=Other, run=lambda *_: Other("two", 2))
    with open_bundle(tmp_path) as bundle:
        make(bundle, "one", [])
        with pytest.raises(BundleError, match="holds no finished stage 'make'"):
            bundle.load(other)
        assert bundle.run(other, Words(text="one"), silent) == Other("two", 2)
        assert bundle.load(other) == Other("two", 2)


def test_a_record_that_the_manifest_does_not_list_is_not_trusted(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        make(bundle, "one", [])
        (tmp_path / "stages" / "make.json").unlink()
        bundle.manifest.stages["make"].outputs.clear()
        with pytest.raises(BundleError, match="holds no finished stage 'make'"):
            bundle.load(MAKE)


def fail() -> Made:
    raise RuntimeError("on purpose")


def test_a_stage_that_fails_loses_its_own_result_and_leaves_earlier_ones(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(RuntimeError, match="on purpose"), open_bundle(tmp_path) as bundle:
        bundle.run(plain(fail, "deep/made", "made.log"), Words(text="two"), silent)
    assert names(tmp_path) == [PARTIAL, "base", "deep", MANIFEST_FILE, "report.json", "stages"]
    with open_bundle(tmp_path, existing=True) as bundle:
        assert bundle.load(BASE) == Made("base")
        never = Stage(name="never", result=Made, run=run_make)
        for stage in (MAKE, never):
            message = f"{tmp_path} holds no finished stage '{stage.name}'"
            with pytest.raises(BundleError, match=message):
                bundle.load(stage)
    # What was sealed before is a whole bundle no longer, and says so.
    assert any("unfinished build" in fault for fault in verify(tmp_path))
    assert build(tmp_path) == ["make"]
    assert verify(tmp_path) == []


def test_outputs_that_nobody_entered_are_removed_before_the_stage_runs(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        bundle.promise(["deep/made"])
    (tmp_path / "deep" / "made").mkdir(parents=True)
    (tmp_path / "deep" / "made" / "left by a kill").touch()
    with open_bundle(tmp_path) as bundle:
        make(bundle, "one", [])
    assert names(tmp_path / "deep" / "made") == ["result"]


def test_a_stage_with_other_outputs_than_before_leaves_none_of_the_old(tmp_path: Path) -> None:
    def writer(name: str) -> Callable[[], Made]:
        return lambda: Made(str((tmp_path / name).write_text(name, encoding="utf-8")))

    with open_bundle(tmp_path) as bundle:
        bundle.run(plain(writer("old"), "old"), Words(text="1"), silent)
        bundle.run(plain(writer("new"), "new"), Words(text="2"), silent)
        bundle.seal([])
    assert names(tmp_path) == [MANIFEST_FILE, "new", "stages"]
    assert verify(tmp_path) == []


def test_forgetting_a_stage_keeps_names_that_only_begin_alike(tmp_path: Path) -> None:
    build(tmp_path)
    with open_bundle(tmp_path) as bundle:
        (tmp_path / "base-notes").write_text("notes", encoding="utf-8")
        bundle.seal(["base-notes"])
        bundle.forget("base")
        assert sorted(bundle.manifest.files) == sorted(read_manifest(tmp_path).files) == [
            "base-notes", "deep/made/result", "made.log", "report.json", "stages/make.json",
        ]  # fmt: skip
        assert not bundle.manifest.complete
        assert not (tmp_path / "base").exists()
        assert not (tmp_path / "stages" / "base.json").exists()
        bundle.forget("never")


def test_sealing_drops_what_is_temporary(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        (bundle.partial / "blocks").mkdir(parents=True)
        (tmp_path / "report.json").write_text("{}", encoding="utf-8")
        assert not read_manifest(tmp_path).complete
        bundle.seal(["report.json"])
    assert names(tmp_path) == [MANIFEST_FILE, "report.json"]
    assert verify(tmp_path) == []


def test_a_stage_goes_on_from_what_it_kept_and_from_nothing_else(tmp_path: Path) -> None:
    """What a kill left of other stages, or of other inputs, is gone."""
    found = []

    def interrupted(_: Words, work: Workspace, __: Progress) -> Made:
        found.append((names(work.partial), work.kept.is_dir()))
        work.kept.mkdir(exist_ok=True)
        (work.partial / "half").mkdir()
        raise RuntimeError("on purpose")

    stage = Stage(name="make", result=Made, run=interrupted)
    for text in ("one", "one", "two"):
        with pytest.raises(RuntimeError, match="on purpose"), open_bundle(tmp_path) as bundle:
            bundle.run(stage, Words(text=text), silent)
    (kept,) = [name for names_, _ in found for name in names_]
    assert kept.startswith("make-")
    assert found == [([], False), ([kept], True), ([], False)]


def test_a_stage_that_has_ended_leaves_nothing_of_what_it_would_have_gone_on_from(
    tmp_path: Path,
) -> None:
    def made(_: Words, work: Workspace, __: Progress) -> Made:
        work.kept.mkdir()
        (work.kept / "state").write_text("large", encoding="utf-8")
        return Made(text="done")

    with open_bundle(tmp_path) as bundle:
        bundle.run(Stage(name="make", result=Made, run=made), Words(text="one"), silent)
        assert not list(bundle.partial.iterdir())


def die_at(change: int) -> None:
    """End this process by SIGKILL just before its n-th change of the file system from now on.

    A flush counts too, and the file is then cut in half: a kill can come in the middle of a write.
    """
    changes = itertools.count(1)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    others = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        if (opened or event in others) and next(changes) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and next(changes) == change:
            os.truncate(f"/proc/self/fd/{descriptor}", status.st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    mock.patch("os.fsync", flush).start()


def killed_child(root: Path, change: int, *, fresh: bool) -> bool:
    """Build in a child that dies at its n-th change; whether it lived to make that change."""
    child = os.fork()
    if child == 0:
        try:
            die_at(change)
            build(root, "two", fresh=fresh)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in {0, signal.SIGKILL}, (change, status)
    return status == signal.SIGKILL


def kill_everywhere(folder: Path, start: Start) -> None:
    """Kill a build at each of its changes in turn, complete it, and print what was run again."""
    # Only a power cut loses what was written and not yet flushed.
    mock.patch("os.fsync").start()
    build(folder / "expected", "two")
    expected = content(folder / "expected") | {MANIFEST_FILE: b""}
    completed = []
    for change in itertools.count(1):
        place = folder / f"{change}"
        place.mkdir()
        (place / "precious").touch()
        if start != "nothing":
            build(place / "out", "one")
        if not killed_child(place / "out", change, fresh=start == "fresh"):
            break
        completed.append(build(place / "out", "two"))
        assert verify(place / "out") == [], change
        assert content(place / "out") | {MANIFEST_FILE: b""} == expected, change
        assert names(place) == ["out", "precious"], change
    sys.stdout.write(json.dumps(completed))


def in_another_process(code: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", f"import sys, {__name__} as tests; {code}", *map(str, arguments)]


@pytest.mark.parametrize(
    ("start", "again"),
    [
        ("nothing", [["base", "make"], ["make"], []]),
        ("another input", [["make"], []]),
        ("fresh", [["make"], ["base", "make"], ["make"], []]),
    ],
)
def test_a_kill_at_any_change_leaves_a_bundle_that_the_next_run_completes(
    tmp_path: Path, start: Start, again: list[list[str]]
) -> None:
    """`again` is what the completing run repeats, from the first moment of the kill to the last."""
    code = "tests.kill_everywhere(tests.Path(sys.argv[1]), sys.argv[2])"
    ran = subprocess.run(
        in_another_process(code, tmp_path, start), cwd=Path(__file__).parent,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    completed = json.loads(ran.stdout)
    assert len(completed) > 30
    assert [runs for runs, _ in itertools.groupby(completed)] == again


def test_leftovers_of_a_kill_before_the_first_manifest_are_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST_FILE}.0123.tmp").write_text("half", encoding="utf-8")
    with open_bundle(tmp_path):
        assert names(tmp_path) == [MANIFEST_FILE]


@pytest.mark.parametrize("name", ["notes.txt", ".git", ".partial", ".x.tmp", f".{MANIFEST_FILE}.x"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_of_somebody_else_is_left_alone(
    tmp_path: Path, name: str, *, fresh: bool
) -> None:
    (tmp_path / f".{MANIFEST_FILE}.0123.tmp").write_text("theirs as well", encoding="utf-8")
    (tmp_path / name).write_text("mine", encoding="utf-8")
    before = content(tmp_path)
    message = f"holds '{name}' and no manifest.json, so it is not a bundle; pass an empty or new"
    with pytest.raises(BundleError, match=message), open_bundle(tmp_path, fresh=fresh):
        pass
    assert content(tmp_path) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_manifest_of_another_tool_is_left_alone(tmp_path: Path, *, fresh: bool) -> None:
    (tmp_path / MANIFEST_FILE).write_text('{"name": "web app"}', encoding="utf-8")
    (tmp_path / "index.html").touch()
    before = content(tmp_path)
    with (
        pytest.raises(BundleError, match=r"another version .* pass another -o"),
        open_bundle(tmp_path, fresh=fresh),
    ):
        pass
    assert content(tmp_path) == before


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious", encoding="utf-8")
    with (
        pytest.raises(BundleError, match=r"out is a file; pass a directory with -o"),
        open_bundle(tmp_path / "out"),
    ):
        pass
    assert content(tmp_path) == {"out": b"precious"}


@pytest.mark.parametrize("out", ["file/out", "link", "n" * 300])
def test_an_output_that_cannot_be_created_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(BundleError, match=f"Output {tmp_path / out}"), open_bundle(tmp_path / out):
        pass
    assert names(tmp_path) == ["file", "link"]


def test_an_empty_directory_becomes_a_bundle(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        assert read_manifest(tmp_path).stages == bundle.manifest.stages == {}
    assert names(tmp_path) == [MANIFEST_FILE]


def test_an_existing_bundle_can_be_asked_for(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nowhere"):
        message = f"{out} is not a bundle, it has no manifest.json; run prune first"
        with pytest.raises(BundleError, match=message), open_bundle(out, existing=True):
            pass
    assert names(tmp_path) == []
    build(tmp_path / "out")
    with open_bundle(tmp_path / "out", existing=True) as bundle:
        assert bundle.load(MAKE) == Made("one")


def test_only_one_build_at_a_time(tmp_path: Path) -> None:
    build(tmp_path)
    before = content(tmp_path)
    message = f"Output {tmp_path} is being written by another build; wait for it"
    with (
        open_bundle(tmp_path),
        pytest.raises(BundleError, match=message),
        open_bundle(tmp_path, fresh=True),
    ):
        pass
    assert content(tmp_path) == before


def test_another_process_holds_the_lock_until_it_is_killed(tmp_path: Path) -> None:
    code = (
        "lock = tests.open_bundle(tests.Path(sys.argv[1])); lock.__enter__(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        in_another_process(code, tmp_path), cwd=Path(__file__).parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BundleError, match="written by another build"), open_bundle(tmp_path):
            pass
        process.kill()
    assert build(tmp_path) == ["base", "make"]


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), BlockingIOError(11, "on purpose")])
def test_an_error_passes_through_and_frees_the_lock(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match="on purpose"), open_bundle(tmp_path):
        raise error
    assert build(tmp_path) == ["base", "make"]


def test_fresh_removes_what_the_tool_made(tmp_path: Path) -> None:
    build(tmp_path)
    with open_bundle(tmp_path) as bundle:
        bundle.partial.mkdir()
    (tmp_path / "folder").mkdir()
    with open_bundle(tmp_path, fresh=True) as bundle:
        assert bundle.manifest.stages == {}
        assert bundle.manifest.files == {}
        assert read_manifest(tmp_path).stages == {}
        assert names(tmp_path) == ["folder", MANIFEST_FILE]


@pytest.mark.parametrize("name", ["mine.txt", "stages/old.json", "deep/made/extra", "base2"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_of_somebody_else_is_named_and_kept(
    tmp_path: Path, name: str, *, fresh: bool
) -> None:
    build(tmp_path)
    (tmp_path / name).write_text("mine", encoding="utf-8")
    before = content(tmp_path)
    message = f"holds '{name}', which no stage of it made; move it out of there"
    with pytest.raises(BundleError, match=message):
        build(tmp_path, "two", fresh=fresh)
    assert content(tmp_path) == before
    (tmp_path / name).unlink()
    assert verify(tmp_path) == []


def test_a_file_that_came_while_a_bundle_was_built_keeps_it_from_being_sealed(
    tmp_path: Path,
) -> None:
    with open_bundle(tmp_path) as bundle:
        make(bundle, "one", [])
        (tmp_path / "notes.txt").touch()
        with pytest.raises(BundleError, match=r"does not verify: notes.txt is not listed"):
            bundle.seal([])
    assert not read_manifest(tmp_path).complete


def copy_base(inputs: Copied, work: Workspace, _: Progress) -> Made:
    (work.partial / "copy").write_bytes(inputs.base.path.read_bytes())
    return Made(inputs.text)


COPY = Stage(name="copy", result=Made, run=copy_base, outputs=("copy",))


def test_what_a_stage_read_is_forgotten_with_all_that_was_made_of_it(tmp_path: Path) -> None:
    """A kill between the two must not leave the copy of another base behind."""
    with open_bundle(tmp_path) as bundle:
        bundle.run(BASE, Words(text="one"), silent)
        bundle.run(COPY, Copied(base=bundle.artifact("base")), silent)
        assert bundle.manifest.stages["copy"].reads == ["base"]
        bundle.run(BASE, Words(text="two"), silent)
        assert list(bundle.manifest.stages) == ["base"]
        assert names(tmp_path) == [PARTIAL, "base", MANIFEST_FILE, "stages"]
        with pytest.raises(BundleError, match="holds no finished stage 'copy'"):
            bundle.load(COPY)


def test_an_artifact_is_what_the_manifest_lists_or_none(tmp_path: Path) -> None:
    with open_bundle(tmp_path) as bundle:
        with pytest.raises(BundleError, match="holds no base/; run the stage that makes it"):
            bundle.artifact("base")
        bundle.run(BASE, Words(text="one"), silent)
        bundle.artifact("base").require_unchanged()
        (tmp_path / "base").write_text("oNe", encoding="utf-8")
        with pytest.raises(BundleError, match="base is not what the stage 'base' left there"):
            bundle.artifact("base")


def put_back(path: Path) -> None:
    """Replace a file, and put back the very bytes that it had."""
    before = path.read_bytes()
    path.write_bytes(b"other")
    path.write_bytes(before)


def replace_file(path: Path) -> None:
    path.write_bytes(b"other")


def remove_file(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [put_back, replace_file, remove_file])
def test_a_result_of_files_that_changed_while_it_was_made_is_not_kept(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    def disturbed(inputs: Copied, work: Workspace, progress: Progress) -> Made:
        change(inputs.base.path)
        return Made("of what?")

    stage = Stage(name="copy", result=Made, run=disturbed)
    with open_bundle(tmp_path) as bundle:
        bundle.run(BASE, Words(text="one"), silent)
        inputs = Copied(base=bundle.artifact("base"))
        with pytest.raises(BundleError, match="base is not what the stage 'base' left there"):
            bundle.run(stage, inputs, silent)
        assert "copy" not in read_manifest(tmp_path).stages


def test_a_bundle_is_readable_by_whoever_may_read_its_folder(tmp_path: Path) -> None:
    def closed(_: Words, work: Workspace, __: Progress) -> Made:
        folder = work.partial / "made"
        folder.mkdir(mode=0o700)
        (folder / "weights").touch(mode=0o600)
        (folder / "weights").chmod(0o600)
        folder.chmod(0o700)
        return Made("closed")

    tmp_path.chmod(0o755)
    with open_bundle(tmp_path) as bundle:
        stage = Stage(name="make", result=Made, run=closed, outputs=("made",))
        bundle.run(stage, Words(text=""), silent)
    for path in tmp_path.rglob("*"):
        wanted = 0o555 if path.is_dir() else 0o444
        assert stat.S_IMODE(path.stat().st_mode) & wanted == wanted, path
    assert stat.S_IMODE((tmp_path / "made" / "weights").stat().st_mode) == 0o644


def test_what_is_published_was_flushed_before_it_was_renamed(tmp_path: Path) -> None:
    """After a power cut a name must not stand for a file that was never written."""
    flushed: list[str] = []
    moved: list[str] = []
    fsync, move = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def watch(self: Path, target: Path) -> Path:
        if not self.name.endswith(".tmp"):
            inside = {str(self), *map(str, self.rglob("*"))}
            moved.extend(sorted(inside - set(flushed)))
        return move(self, target)

    with (
        mock.patch("os.fsync", flush),
        mock.patch.object(Path, "replace", watch),
        open_bundle(tmp_path) as bundle,
    ):
        make(bundle, "one", [])
    assert moved == []
    assert {str(tmp_path / name) for name in ("deep", "deep/made/result", "made.log")} <= {
        *flushed, str(tmp_path / "deep"),
    }  # fmt: skip


def test_the_manifest_names_the_version_that_wrote_it_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    manifest = read_manifest(tmp_path)
    manifest.tool_version = "0.0.1"
    write_manifest(tmp_path, manifest)
    assert build(tmp_path) == []
    assert read_manifest(tmp_path).tool_version == __version__


def test_a_stage_of_another_version_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.setattr(stage_module, "__version__", "99")
    with (
        open_bundle(tmp_path) as bundle,
        pytest.raises(BundleError, match="holds no finished stage 'make'; run it first"),
    ):
        bundle.load(MAKE)


def test_only_temporary_files_of_the_tool_are_cleaned(tmp_path: Path) -> None:
    build(tmp_path)
    ours = tmp_path / "stages" / f".make.json.{'0a' * 16}.tmp"
    mine = tmp_path / "deep" / ".notes.tmp"
    ours.touch()
    mine.touch()
    with pytest.raises(BundleError, match=r"holds 'deep/.notes.tmp'"), open_bundle(tmp_path):
        pass
    assert not ours.exists()
    assert mine.exists()


@pytest.mark.parametrize("link", [".partial", "stages", "linked"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_link_in_the_bundle_leads_no_write_or_deletion_outside(
    tmp_path: Path, link: str, *, fresh: bool
) -> None:
    """A bundle may come from somebody else, and its manifest name outputs behind a link."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    with open_bundle(out) as bundle:
        bundle.manifest.stages["make"] = StageEntry(
            key="k", inputs={}, outputs=["linked/precious"], seconds=1
        )
        write_manifest(out, bundle.manifest)
    (out / link).symlink_to(outside)
    # Refusing such a bundle is as good as not following the link.
    with suppress(BundleError):
        build(out, fresh=fresh)
    assert names(outside) == ["precious"]


def test_nothing_outside_the_bundle_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    build(tmp_path / "out")
    build(tmp_path / "out", "two")
    build(Path("relative"), fresh=True)
    assert names(tmp_path) == ["cwd", "out"]
    assert names(tmp_path / "cwd") == ["relative"]


@dataclass(frozen=True, slots=True)
class Exported:
    """Result of a stage that names files of the bundle."""

    models: tuple[OnnxModel, ...]


def test_a_record_that_names_no_file_or_one_twice_is_not_taken(tmp_path: Path) -> None:
    def export(_: Words, work: Workspace, __: Progress) -> Exported:
        (work.partial / "onnx").mkdir()
        (work.partial / "onnx" / "model.onnx").write_text("graph")
        model = OnnxModel(
            path="onnx/model.onnx", dtype="float32", opset=18, sha256="0" * 64, size_bytes=5
        )
        return Exported((model,))

    stage: Stage[Words, Exported] = Stage(
        name="export", result=Exported, run=export, outputs=("onnx",)
    )
    with open_bundle(tmp_path / "OUT") as bundle:
        bundle.run(stage, Words(text=""), silent)
        assert bundle.load(stage).models[0].path == "onnx/model.onnx"
        record = bundle.root / "stages" / "export.json"
        text = record.read_text()
        twice = json.loads(text)
        twice["models"] *= 2
        for changed in (text.replace("onnx/model.onnx", "onnx/model.onn"), json.dumps(twice)):
            record.write_text(changed)
            bundle.manifest.files["stages/export.json"] = hash_file(record)
            with pytest.raises(BundleError, match=r"no finished stage 'export'; run it first"):
                bundle.load(stage)
