"""What a documented answer to an input is, and what a process must not do while it finds one."""

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
import unicodedata
from pathlib import Path
from typing import Any

import typer
from fuzz_targets import Case, Target

from prox24_deploy.cli.terminal import fail
from prox24_deploy.core.errors import Prox24Error, explained

PACKAGE = "prox24_deploy"
# What the command line may exit with, other than by an error.
_EXITS = frozenset({0, 3, 4, 5})


def answered(target: Target, case: Case, watch: "Watch") -> tuple[str, str, str]:
    """Answer, place and traceback; the last is "" where the answer is a documented one."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    watch.seen.clear()
    watch.printed()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            answer = _documented(target, case)
        _require_clean(*map(_text, (out, err)), as_json=case.as_json and target.prints)
        _require_silent(*watch.printed())
    except Exception as error:
        return type(error).__name__, place_of(error), traceback.format_exc()
    if watch.seen:
        return "reached outside", watch.seen[0], "\n".join(watch.seen)
    return answer, "", ""


def _documented(target: Target, case: Case) -> str:
    """Accepted, or the class of a refusal; anything else is raised."""
    try:
        target.run(case)
    except typer.Exit as stop:
        if stop.exit_code not in _EXITS:
            raise RuntimeError(f"exit code {stop.exit_code}") from stop
    except (Prox24Error, OSError) as error:
        _, code = explained(error)
        if code == Prox24Error.exit_code or _ran_out_of_memory(error):
            raise
        with contextlib.suppress(SystemExit):
            fail(error, debug=False)
        return type(error).__name__
    return "accepted"


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether somebody caught that there was no memory, and called it something else."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class UncleanOutputError(Exception):
    """What was printed is no JSON, or steers a terminal."""


def _text(stream: io.TextIOWrapper) -> str:
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode()


def _require_clean(out: str, err: str, *, as_json: bool) -> None:
    if as_json and out:
        json.loads(out, parse_constant=_refuse_constant)
    for text in (err, *(() if as_json else (out,))):
        _refuse_control(text)


def _require_silent(out: str, err: str) -> None:
    """Libraries that are not written in Python print past it, what a file says included."""
    if out:
        raise UncleanOutputError(f"printed past Python: {out[:200]!r}")
    _refuse_control(err)


def _refuse_control(text: str) -> None:
    bad = {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"}
    if bad:
        raise UncleanOutputError(f"control characters {sorted(bad)} in {text[:200]!r}")


def _refuse_constant(name: str) -> None:
    raise UncleanOutputError(f"{name} is no JSON")


class Watch:
    """What a process must never do: run programs, reach the network, or write elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._allowed = (str(folder), "/dev/", "/proc/")
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None
        sys.addaudithook(self._hear)
        # Standard output and standard error of the process, to which only what is no Python writes.
        self._streams = [(folder / f"stream-{number}").open("w+b", 0) for number in (1, 2)]
        for number, stream in enumerate(self._streams, 1):
            os.dup2(stream.fileno(), number)

    def printed(self) -> tuple[str, str]:
        """What came past Python on standard output and standard error since this was last asked."""
        out, err = (_taken(stream) for stream in self._streams)
        return out, err

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN or any(map(self._outside, _written(event, given))):
            self.seen.append(f"{event} {given!r:.200}")

    def _outside(self, path: Path) -> bool:
        return not os.path.abspath(path).startswith(self._allowed)  # noqa: PTH100 - no link is followed


def _taken(stream: io.FileIO) -> str:
    """What a file holds, which is then emptied; copies of its number share its place."""
    stream.seek(0)
    data = stream.read() or b""
    stream.seek(0)
    stream.truncate()
    return data.decode(errors="replace")


def _written(event: str, given: tuple[Any, ...]) -> list[Path]:
    """The paths that an event of Python's audit changes."""
    if event == "open" and isinstance(given[2], int) and given[2] & _WRITES:
        named = [(given[0], None)]
    elif event == "os.rename":
        named = [(given[0], given[2]), (given[1], given[3])]
    elif event in _CHANGES:
        # The last one tells the open folder that the name is in.
        named = [(given[0], given[-1])]
    else:
        return []
    return [
        Path(_folder(folder), os.fsdecode(path))
        for path, folder in named
        if isinstance(path, str | bytes | os.PathLike)
    ]


def _folder(descriptor: object) -> str:
    if not isinstance(descriptor, int) or descriptor < 0:
        return ""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


_FORBIDDEN = frozenset({
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class",
})  # fmt: skip
_CHANGES = frozenset({"os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def place_of(error: BaseException) -> str:
    """The innermost line of the package on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"/{PACKAGE}/" in frame.filename]
    last = own[-1] if own else frames[-1]
    return f"{last.filename.rpartition(f'{PACKAGE}/')[2]}:{last.lineno} {last.name}"
