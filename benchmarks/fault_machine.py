"""What a machine does to a build: full disks, size limits, rights, little memory, other disks."""

import ctypes
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from fault_room import SEALED, WEIGHTS, Result, Room
from fault_runs import Ended, facts, hashes

_REFUSED = 2
# What may come before a sentence: lines of a log, with the time of day.
_LOGGED = re.compile(r"\d{4}-\d\d-\d\dT\S+ (?!ERROR )")
_KIB, _MIB = 2**10, 2**20
_NO_MOUNT = "skipped: mounting needs root"


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory at `folder`; False where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def one_sentence(ended: Ended, *, code: int = _REFUSED, names: str = "") -> list[str]:
    """What is wrong with a refusal: it has one exit code, one sentence, and names the thing."""
    said = f"ended with {ended.code}: {ended.sentence[:200]!r}"
    if ended.code != code:
        return [said]
    lines = [line for line in ended.text.splitlines() if line.strip()]
    while lines and _LOGGED.match(lines[0]):
        del lines[0]
    if lines and lines[0].startswith("Usage:"):
        # A wrong argument is told below how the command is used and where that is said.
        lines = lines[2:]
    if len(lines) != 1 or not lines[0].startswith("Error: ") or not lines[0].endswith("."):
        return [f"no one sentence: {ended.text[:300]!r}"]
    return [] if names in lines[0] else [f"{names!r} is not named: {lines[0][:200]!r}"]


def full_disk(room: Room, draw: Random, number: int) -> Result:
    """Too few bytes or too few files are left, somewhere between the first stage and the last."""
    room.restore(room.stage_of(number))
    kept = room.folder / "kept"
    if room.out.exists():
        room.out.rename(kept)
    else:
        kept.mkdir()
    limit = _between(kept, room.snapshots / SEALED, draw)
    with _mounted(room.out, "size=64m") as mounted:
        if not mounted:
            return Result("full disk", number, _NO_MOUNT)
        shutil.copytree(kept, room.out, dirs_exist_ok=True)
        try:
            _remount(room.out, limit)
        except subprocess.CalledProcessError:
            return Result("full disk", number, "skipped: this disk cannot shrink")
        ended = room.run(room.build())
        _remount(room.out, "size=64m,nr_inodes=100000")
        return _after(room, "full disk", number, ended)


def _between(now: Path, finished: Path, draw: Random) -> str:
    """A limit that holds what is there now, and not what will be there in the end."""
    if draw.random() < 0.3:
        files = [sum(1 for _ in folder.rglob("*")) for folder in (now, finished)]
        return f"nr_inodes={files[0] + 2 + int(draw.random() * (files[1] - files[0]))}"
    pages = [
        sum(4 + path.stat().st_size // _KIB for path in folder.rglob("*"))
        for folder in (now, finished)
    ]
    return f"size={pages[0] + 4 + int(draw.random() * (pages[1] - pages[0]))}k"


def _after(room: Room, fault: str, number: int, ended: Ended) -> Result:
    """A run either did it all the same, or said in one sentence what is the matter."""
    if ended.code == room.sound["a"].code:
        return Result(fault, number, "fitted", tuple(room.unlike(room.sound["a"])))
    hit = room.next_stage()
    problems = one_sentence(ended) + room.completed(room.sound["a"])
    return Result(fault, number, f"exit {ended.code}", tuple(problems), hit)


def file_size(room: Room, draw: Random, number: int) -> Result:
    """No file may grow over a limit (EFBIG), as some file systems and `ulimit -f` have it."""
    room.restore(room.stage_of(number))
    limit = draw.randint(1, 60) * _KIB
    ended = room.run(
        room.build(), prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    return _after(room, "file size", number, ended)


def memory(room: Room, draw: Random, number: int) -> Result:
    """Little memory is left; whatever is said of that, nothing wrong is kept."""
    room.restore(room.stage_of(number))
    spare = int(2 ** draw.uniform(0, 7) * _MIB)

    def bound() -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    ended = room.run(room.build(), prepare=bound)
    if ended.code == room.sound["a"].code:
        return Result("memory", number, "fitted", tuple(room.unlike(room.sound["a"])))
    hit = room.next_stage()
    problems = room.completed(room.sound["a"])
    return Result("memory", number, f"exit {ended.code}", tuple(problems), hit)


# Command, what is in OUT before, and the file or folder that may not be read.
_HIDDEN = (
    ("build", "", f"model/{WEIGHTS}"),
    ("build", "", "model/config.json"),
    ("build", "", "model/tokenizer.json"),
    ("build", "", "model/tokenizer_config.json"),
    ("build", "", "model"),
    ("build", "", "text.txt"),
    ("build", "", "held-out.txt"),
    ("build", "", "recipe.toml"),
    ("build", "evaluate", f"out/pruned/{WEIGHTS}"),
    ("build", "evaluate", "out/onnx/dense/model.onnx"),
    ("build", "evaluate", "out/manifest.json"),
    ("build", "evaluate", "out/stages/prune.json"),
    ("build", "evaluate", "out"),
    ("export", "export", f"out/pruned/{WEIGHTS}"),
    ("export", "export", f"model/{WEIGHTS}"),
    ("export", "export", "out/stages/prune.json"),
    ("compile", "compile", "out/onnx/sparse/model.onnx"),
    ("compile", "compile", "out/pruned/config.json"),
    ("bench", "bench", "out/onnx/sparse/model.onnx"),
    ("bench", "bench", "out/engines/onnxruntime/dense/engine.json"),
    ("verify", SEALED, f"out/pruned/{WEIGHTS}"),
    ("verify", SEALED, "out/manifest.json"),
    ("verify", SEALED, "out/onnx"),
    ("package", SEALED, "out/report.json"),
    ("check", SEALED, f"out/pruned/{WEIGHTS}"),
    ("compare", SEALED, "out/report.json"),
)
# The same of folders that may be read and not be written.
_CLOSED = (
    ("build", "evaluate", "out"),
    ("build", "evaluate", "out/stages"),
    ("build", "export", "out/pruned"),
    ("compile", "compile", "out"),
)
# What a file that is there and may not be read is not.
_FALSE_WORDS = ("does not exist", "No such file", "missing", "cannot be written", "damaged")


def lines_of(room: Room) -> dict[str, list[str]]:
    """A line for each command that reads what is in OUT, or makes it."""
    shapes = ["--shapes", "batch=1", "sequence=8"]
    return {
        "build": room.build(),
        "prune": room.prune(),
        "export": ["export", "out"],
        "compile": ["compile", "out", "--backend", "onnxruntime", *shapes],
        "bench": ["bench", "out", *shapes],
        "verify": ["verify", "out"],
        "package": ["package", "out", "--checksums", "sums.txt", "--force"],
        "check": ["check", "out/pruned"],
        "compare": ["compare", "out", "out"],
    }


def unreadable(room: Room, _: Random, number: int) -> Result:
    """Something may not be read by whoever runs the command."""
    command, stage, name = _HIDDEN[number % len(_HIDDEN)]
    ended, problems = _refused(room, command, stage, name, 0)
    problems += [f"says {word!r}: {ended.sentence}" for word in _FALSE_WORDS if word in ended.text]
    return Result("unreadable", number, f"{command}: exit {ended.code}", tuple(problems), name)


def unwritable(room: Room, _: Random, number: int) -> Result:
    """Something may not be written by whoever runs the command."""
    command, stage, name = _CLOSED[number % len(_CLOSED)]
    ended, problems = _refused(room, command, stage, name, 0o500)
    return Result("unwritable", number, f"{command}: exit {ended.code}", tuple(problems), name)


def _refused(room: Room, command: str, stage: str, name: str, mode: int) -> tuple[Ended, list[str]]:
    """How a command ends that meets a file or folder of this mode, and what is wrong then."""
    if command == "export":
        room.restore_pruned(stage)
    else:
        room.restore(stage or room.stages[0])
    closed = room.folder / name
    before = closed.stat().st_mode
    closed.chmod(mode)
    ended = room.run(lines_of(room)[command], prepare=_as_others)
    closed.chmod(before)
    problems = one_sentence(ended, names=closed.name)
    later = room.unverified() if stage == SEALED else room.completed(room.sound["a"])
    return ended, problems + later


def others_may_read(room: Room, _: Random, number: int) -> Result:
    """Whoever may read the folder of a bundle may read its files."""
    room.restore(SEALED)
    closed = [
        path.relative_to(room.out).as_posix()
        for path in sorted(room.out.rglob("*"))
        if path.is_file() and not path.stat().st_mode & 0o004
    ]
    problems = tuple(f"only its owner may read {name}" for name in closed)
    return Result("readable by others", number, f"{len(closed)} closed", problems)


def _as_others() -> None:
    """Give up what lets root read everything; other users have nothing to give up."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective and permitted sets.
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110
        sets[1] &= ~0b110
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")


_READ_ONLY: tuple[tuple[str, str, int], ...] = (
    ("build", "", _REFUSED),
    ("prune", "", _REFUSED),
    ("build", "evaluate", _REFUSED),
    ("export", "export", _REFUSED),
    ("compile", "compile", _REFUSED),
    ("bench", "bench", _REFUSED),
    ("verify", SEALED, 0),
    ("package", SEALED, 0),
    ("check", SEALED, 0),
)


def read_only(room: Room, _: Random, number: int) -> Result:
    """OUT lies on a disk that cannot be written."""
    command, stage, code = _READ_ONLY[number % len(_READ_ONLY)]
    room.restore(stage or room.stages[0])
    kept = room.folder / "kept"
    if room.out.exists():
        room.out.rename(kept)
    with _mounted(room.out, "size=64m") as mounted:
        if not mounted:
            return Result("read-only", number, _NO_MOUNT)
        if kept.exists():
            shutil.copytree(kept, room.out, dirs_exist_ok=True)
        before = hashes(room.out)
        _remount(room.out, "ro")
        ended = room.run(lines_of(room)[command])
        changed = hashes(room.out) != before
    problems = one_sentence(ended) if code else []
    if not code and ended.code:
        problems = [f"ended with {ended.code}: {ended.sentence}"]
    problems += ["OUT was changed"] if changed else []
    return Result("read-only", number, f"{command}: exit {ended.code}", tuple(problems))


def other_file_system(room: Room, draw: Random, number: int) -> Result:
    """OUT is a link to a folder on another disk, and the run is killed on the way."""
    elsewhere = Path(tempfile.gettempdir())
    if elsewhere.stat().st_dev == room.folder.stat().st_dev:
        return Result("other disk", number, "skipped: there is one file system only")
    room.restore(room.stages[0])
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        room.out.symlink_to(folder)
        run = room.begin(room.build())
        run.last(draw.uniform(0, 1) * room.sound["a"].seconds)
        run.strike(signal.SIGKILL)
        run.wait()
        problems = room.completed(room.sound["a"])
        found = {
            name: text.replace(str(room.folder), "ROOM")
            for name, text in facts(Path(folder)).items()
        }
        problems += [] if found == room.sound["a"].facts else ["the folder itself is not as built"]
        room.out.unlink()
    return Result("other disk", number, "completed", tuple(problems))


MACHINE: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "full disk": (full_disk, 14),
    "file size": (file_size, 14),
    "memory": (memory, 14),
    "unreadable": (unreadable, len(_HIDDEN)),
    "unwritable": (unwritable, len(_CLOSED)),
    "readable by others": (others_may_read, 1),
    "read-only": (read_only, len(_READ_ONLY)),
    "other disk": (other_file_system, 4),
}
