"""What lies in a bundle and is not its own: exchanged and foreign files, links, old manifests."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from fault_machine import lines_of, one_sentence
from fault_room import REPORT, SEALED, WEIGHTS, Result, Room
from resealed import resealed

_REFUSED = 2
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
    path.write_bytes(resealed(manifest))
    problems = room.completed(room.sound["a"])
    return Result("old version", number, "completed", tuple(problems), stage)


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


BUNDLES: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "exchanged": (exchanged, len(_EXCHANGES)),
    "old version": (old_version, 14),
    "foreign file": (foreign, 3 * len(_FOREIGN)),
}
