"""What users and other programs do to a build: other inputs, other options, files exchanged."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from fault_machine import lines_of, one_sentence
from fault_room import (
    CHANGES,
    OPTIONS,
    REPORT,
    SEALED,
    WEIGHTS,
    ManifestWatch,
    Result,
    Room,
)
from fault_runs import Ended

from prox24_deploy.release.manifest import canonical_json

_REFUSED = 2


def change(room: Room, name: str, *, back: bool = False, in_place: bool = False) -> None:
    """Put another file in the place of an input, by a rename or by writing over it."""
    place, other = CHANGES[name]
    data = (room.world / (place if back else other)).read_bytes()
    if in_place:
        with (room.folder / place).open("r+b") as file:
            file.write(data)
            file.truncate()
        return
    new = room.folder / "new"
    new.write_bytes(data)
    new.replace(room.folder / place)


def changed_between(room: Room, draw: Random, number: int) -> Result:
    """An input is another one when an unfinished or a finished build is run again."""
    name = list(CHANGES)[number % len(CHANGES)]
    stage = draw.choice((*room.stages[1:], REPORT, SEALED))
    room.restore(stage)
    change(room, name)
    problems = room.completed(room.sound[name])
    return Result("changed between runs", number, f"{name} changed", tuple(problems), stage)


def changed_during(room: Room, draw: Random, number: int) -> Result:
    """An input is exchanged while a build runs, in half of the tries only for a while."""
    name = list(CHANGES)[number % len(CHANGES)] if number % 2 else "weights"
    # What reads MODEL_DIR; half of the tries strike pruning, which reads it most often.
    later = (*room.stages[3:], REPORT)
    stage = room.stages[0] if number % 4 < 2 else later[number // 4 % len(later)]
    room.restore(stage)
    end = room.timelines[stage].work[1]
    run = room.begin(room.build())
    in_place = draw.random() < 0.3
    run.last(draw.uniform(0, 1) * end)
    change(room, name, in_place=in_place)
    if draw.random() < 0.5:
        run.last(draw.uniform(0, 1) * end)
        change(room, name, back=True, in_place=in_place)
    ended = run.wait()
    problems = _of_one_version(room, ended, name)
    change(room, name, back=True)
    problems += [f"next run: {each}" for each in room.completed(room.sound["a"])]
    outcome = f"{name} exchanged: exit {ended.code}"
    return Result("changed during a run", number, outcome, tuple(problems), stage)


def _of_one_version(room: Room, ended: Ended, name: str) -> list[str]:
    """The bundle is as built from the one input or from the other, or the run says what changed."""
    before, after = room.sound["a"], room.sound[name]
    if ended.code == _REFUSED:
        place = CHANGES[name][0]
        named = any(part in ended.sentence for part in (Path(place).name, place.split("/")[0]))
        return one_sentence(ended) + ([] if named else [f"names nothing: {ended.sentence}"])
    if ended.code not in {before.code, after.code}:
        return [f"ended with {ended.code}: {ended.sentence}"]
    as_before, as_after = room.unlike(before), room.unlike(after)
    if not as_before or not as_after:
        return []
    nearer = min(as_before, as_after, key=lambda problems: len(str(problems)))
    return [f"of two versions: {each}" for each in nearer]


def options_changed(room: Room, draw: Random, number: int) -> Result:
    """A build that was killed, or that is finished, is run with other options."""
    name = list(OPTIONS)[number % len(OPTIONS)]
    stage = draw.choice((*room.stages[1:], REPORT, SEALED))
    room.restore(stage)
    problems = room.completed(room.sound[name], *OPTIONS[name])
    return Result("options changed", number, f"{name} changed", tuple(problems), stage)


def two_builds(room: Room, draw: Random, number: int) -> Result:
    """A second command comes while a build writes into OUT."""
    command = ("build", "prune", "export", "compile", "bench")[number % 5]
    room.restore(draw.choice((room.stages[0], *room.stages[2:])))
    watch = ManifestWatch(room.out)
    first = room.begin(room.build())
    # From its first write on, the bundle is its own.
    while not watch.look() and first.poll() is None:
        time.sleep(0.001)
    first.last(draw.uniform(0, 0.5))
    late = room.begin(lines_of(room)[command], log="second").wait()
    if first.poll() is not None:
        return Result(
            "two builds", number, "the first was faster", tuple(room.unlike(room.sound["a"]))
        )
    problems = one_sentence(late, names="another build")
    ended = first.wait()
    if ended.code != room.sound["a"].code:
        problems.append(f"the first ended with {ended.code}: {ended.sentence}")
    problems += room.unlike(room.sound["a"])
    return Result("two builds", number, f"{command}: exit {late.code}", tuple(problems))


# How a build of another model into the bundle ends before it has pruned anything.
_OWNERS: dict[str, tuple[str, ...]] = {
    "no such device": ("--device", "cuda"),
    "no such task": ("--lm-eval", "no-such-task"),
    "killed": (),
}


def other_owner(room: Room, draw: Random, number: int) -> Result:
    """A build of another model ends early; then single stages are run on what lies in OUT."""
    how = list(_OWNERS)[number % len(_OWNERS)]
    if how == "no such device" and torch.cuda.is_available():
        return Result("other owner", number, "skipped: there is a GPU")
    stage = (*room.stages[1:4], SEALED)[number // len(_OWNERS) % 4]
    room.restore_pruned(stage)
    change(room, "weights")
    run = room.begin(room.build(*_OWNERS[how]))
    if how == "killed":
        run.last(draw.uniform(0.3, 1) * room.timelines[room.stages[0]].written[0])
        run.strike(signal.SIGKILL)
    run.wait()
    lines = lines_of(room)
    ended = [room.run(lines[command]) for command in ("export", "compile", "bench")]
    codes = [each.code for each in ended]
    problems = _mixed(room)
    for each in ended:
        problems += one_sentence(each) if each.code else []
    problems += [f"next run: {each}" for each in room.completed(room.sound["weights"])]
    return Result("other owner", number, f"{how}: {codes}", tuple(problems), stage)


def _mixed(room: Room) -> list[str]:
    """Whether weights and graphs are of more than one model."""
    found = room.facts()
    kept = [name for name in found if name.startswith(("pruned/model", "onnx/"))]
    for sound in (room.sound["a"], room.sound["weights"]):
        if all(found[name] == sound.facts.get(name) for name in kept):
            return []
    return ["weights and graphs are of two models"]


# Stage that comes next, what is exchanged by what, and the command that must not go on.
_DENSE, _SPARSE = "out/onnx/dense/model.onnx", "out/onnx/sparse/model.onnx"
_ENGINES = "out/engines/onnxruntime"
_EXCHANGES = (
    ("export", f"out/pruned/{WEIGHTS}", f"other/pruned/{WEIGHTS}"),
    ("export", "out/pruned/config.json", "config-b.json"),
    ("export", "out/stages/prune.json", "other/stages/prune.json"),
    ("compile", _DENSE, _SPARSE),
    ("compile", _SPARSE, _DENSE),
    ("compile", f"{_DENSE}.data", "other/onnx/dense/model.onnx.data"),
    ("compile", f"{_SPARSE}.data", f"{_DENSE}.data"),
    ("compile", "out/pruned/config.json", "config-b.json"),
    ("compile", "out/stages/export.json", "other/stages/export.json"),
    ("bench", _DENSE, _SPARSE),
    ("bench", f"{_SPARSE}.data", "other/onnx/sparse/model.onnx.data"),
    ("bench", f"{_DENSE}.data", "other/onnx/dense/model.onnx.data"),
    ("bench", f"{_ENGINES}/dense/engine.json", f"{_ENGINES}/sparse/engine.json"),
    ("bench", "out/pruned/config.json", "config-b.json"),
    ("bench", "out/stages/compile.json", "other/stages/compile.json"),
)


_CHANGED = "its files were changed"


def exchanged(room: Room, _: Random, number: int) -> Result:
    """A file of the bundle is another one for the time of the next single stage."""
    command, place, other = _EXCHANGES[number % len(_EXCHANGES)]
    room.restore_pruned(command)
    if other.startswith("other/"):
        shutil.copytree(room.references / "weights", room.folder / "other")
    if not (room.folder / place).exists():
        return Result("exchanged", number, f"skipped: {place} is not there yet")
    kept = (room.folder / place).read_bytes()
    new = (room.folder / other).read_bytes()
    if new == kept:
        return Result("exchanged", number, "skipped: the files are the same")
    (room.folder / place).write_bytes(new)
    ended = room.run(lines_of(room)[command])
    (room.folder / place).write_bytes(kept)
    # What is logged may tell more than that the stage has to run again.
    noticed = _CHANGED in ended.text or Path(place).name in ended.text
    problems = one_sentence(ended) + ([] if noticed else [f"nothing said of it: {ended.text}"])
    problems += [f"next run: {each}" for each in room.completed(room.sound["a"])]
    return Result("exchanged", number, f"{command}: exit {ended.code}", tuple(problems), place)


def old_version(room: Room, _: Random, number: int) -> Result:
    """An older version of the tool began the bundle; this one finishes it."""
    every = (*room.stages[1:], REPORT, SEALED)
    stage = every[number % len(every)]
    room.restore(stage)
    path = room.out / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["tool_version"] = "0.0.1"
    if number >= len(every):
        for entry in manifest["stages"].values():
            entry["key"] = "0" * 64
    path.write_bytes(_resealed(manifest))
    problems = room.completed(room.sound["a"])
    return Result("old version", number, "completed", tuple(problems), stage)


def _resealed(manifest: dict[str, object]) -> bytes:
    import hashlib

    digest = hashlib.sha256(canonical_json(manifest | {"self_sha256": ""})).hexdigest()
    return canonical_json(manifest | {"self_sha256": digest})


def _file(place: Path, _: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("not of this tool\n", encoding="utf-8")


def _link(place: Path, outside: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)


def _replaced_by_link(place: Path, outside: Path) -> None:
    """The same bytes, but they lie elsewhere and may change."""
    copy = outside.parent / "same-bytes"
    shutil.copyfile(place, copy)
    place.unlink()
    place.symlink_to(copy)


def _folder_by_link(place: Path, outside: Path) -> None:
    copy = outside.parent / "same-folder"
    shutil.copytree(place, copy)
    shutil.rmtree(place)
    place.symlink_to(copy)


def _pipe(place: Path, _: Path) -> None:
    os.mkfifo(place)


Foreign = Callable[[Path, Path], None]
_FOREIGN: tuple[tuple[str, Foreign], ...] = (
    ("notes.txt", _file),
    ("stages/old.json", _file),
    ("pruned/extra.txt", _file),
    ("onnx/dense/extra.bin", _file),
    ("engines/old/engine.json", _file),
    (".hidden", _file),
    ("link.txt", _link),
    ("stages/link.json", _link),
    ("pipe", _pipe),
    ("report.json", _replaced_by_link),
    (f"pruned/{WEIGHTS}", _replaced_by_link),
    ("onnx/sparse/model.onnx", _replaced_by_link),
    ("engines", _folder_by_link),
)


def foreign(room: Room, draw: Random, number: int) -> Result:
    """Something else lies in OUT: before a run goes on, while it runs, or once it is sealed."""
    name, put = _FOREIGN[number % len(_FOREIGN)]
    moment = ("sealed", "before", "during")[number // len(_FOREIGN) % 3]
    room.restore(SEALED if moment == "sealed" else REPORT)
    place, outside = room.out / name, room.folder / "outside.txt"
    outside.write_text("elsewhere", encoding="utf-8")
    if put in (_replaced_by_link, _folder_by_link) and not place.exists():
        return Result("foreign file", number, f"skipped: {name} is not there yet")
    if moment == "sealed":
        put(place, outside)
        problems = _not_handed_over(room, name)
    else:
        problems = _built_beside(room, draw, lambda: put(place, outside), name, moment)
    if outside.read_text(encoding="utf-8") != "elsewhere":
        problems.append("a file outside was changed")
    return Result(
        "foreign file", number, f"{moment}: {put.__name__.strip('_')}", tuple(problems), name
    )


def _not_handed_over(room: Room, name: str) -> list[str]:
    """A sealed bundle with something else in it neither verifies nor is packaged."""
    lines = lines_of(room)
    problems = []
    for command in ("verify", "package"):
        ended = room.begin(lines[command]).wait(60)
        if ended.code != _REFUSED or name.split("/")[0] not in ended.text:
            problems.append(f"{command} ended with {ended.code}: {ended.sentence[:150]!r}")
    return problems


def _built_beside(
    room: Room, draw: Random, put: Callable[[], None], name: str, moment: str
) -> list[str]:
    """A build either names what it met, or ends in a bundle that verifies."""
    if moment == "before":
        put()
        run = room.begin(room.build())
    else:
        run = room.begin(room.build())
        run.last(draw.uniform(0, 1) * room.timelines[REPORT].work[1])
        put()
    ended = run.wait()
    if ended.code == room.sound["a"].code:
        # What was put there after the end is met by `verify` alone.
        late = moment == "during" and (room.out / name).lstat().st_ctime > _sealed_at(room)
        return (
            [] if late else [f"build ended with {ended.code}, but {p}" for p in room.unverified()]
        )
    return one_sentence(ended, names=name.rpartition("/")[2])


def _sealed_at(room: Room) -> float:
    return (room.out / "manifest.json").stat().st_mtime


USERS: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "changed between runs": (changed_between, 2 * len(CHANGES)),
    "changed during a run": (changed_during, 28),
    "options changed": (options_changed, 2 * len(OPTIONS)),
    "two builds": (two_builds, 10),
    "other owner": (other_owner, 12),
    "exchanged": (exchanged, len(_EXCHANGES)),
    "old version": (old_version, 14),
    "foreign file": (foreign, 3 * len(_FOREIGN)),
}
