"""Run the command line in a process of its own that can be struck, and tell what it left behind.

A run is forked from this process, which has imported the libraries already: what is timed and
struck is the work. A fork differs from a fresh process in that importing is over, and in that it
ends without the interpreter's own shutdown; `fresh=True` starts a real one.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prox24_deploy import cli

# Whatever takes this long hangs; the slowest run takes about 20 s on a busy machine.
PATIENCE_S = 300
# Written anew by every run, or with times in it.
_DIFFERENT = re.compile(
    r"(pruned/README\.md|report\.(json|html)|summary\.md|junit\.xml|benchmark\.json|manifest\.json"
    r"|stages/bench\.json|engines/.*\.log)"
)
Prepare = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that ended it, and what it printed."""

    code: int
    text: str
    seconds: float

    @property
    def sentence(self) -> str:
        """The last line that it printed."""
        return self.text.strip().rpartition("\n")[2]


@dataclass(slots=True)
class Run:
    """A run that has begun; it leads a process group of its own."""

    pid: int
    log: Path
    began: float
    process: subprocess.Popen[bytes] | None = None
    _ended: Ended | None = None

    def strike(self, number: signal.Signals, *, group: bool = True) -> None:
        """Send a signal to the run, and to the jobs that it started."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def poll(self) -> Ended | None:
        """How it ended, None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._finish(os.waitstatus_to_exitcode(status))
        return self._ended

    def is_alive(self) -> bool:
        """Whether the run or a job of it is left."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def last(self, seconds: float) -> None:
        """Let it run for so long, or to its end."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.poll() is None:
            time.sleep(min(0.001, left))

    def wait(self, seconds: float = PATIENCE_S) -> Ended:
        """How it ended; a run that does not end is killed.

        Raises:
            TimeoutError: it had to be killed.
        """
        deadline = time.monotonic() + seconds
        while (ended := self.poll()) is None:
            if time.monotonic() > deadline:
                self.strike(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"no end after {seconds} s: {self.log.read_text()[-500:]}")
            time.sleep(0.002)
        return ended

    def _finish(self, code: int) -> None:
        if self.process:
            # Waited for here, so that its own object must not wait again.
            self.process.returncode = code
        text = self.log.read_text(encoding="utf-8", errors="replace")
        self._ended = Ended(code, text, time.monotonic() - self.began)


def begin(
    line: Sequence[str | Path], log: Path, *, prepare: Prepare | None = None, fresh: bool = False
) -> Run:
    """Start one command line; `prepare` runs in its process before it."""
    words = [str(word) for word in line]
    began = time.monotonic()
    if fresh:
        command = [sys.executable, "-m", "prox24_deploy", *words]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, process_group=0,
                preexec_fn=prepare,
            )  # fmt: skip
        return Run(process.pid, log, began, process)
    pid = os.fork()
    if pid:
        # Both sides, for either may be the first to run.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return Run(pid, log, began)
    os._exit(_forked(words, log, prepare))


def _forked(words: list[str], log: Path, prepare: Prepare | None) -> int:
    """The life of a forked run; returns its exit code."""
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        # A parent that was started in the background ignores it, and so would this process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prepare:
            prepare()
        sys.argv = ["prox24-deploy", *words]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return code


def run(
    line: Sequence[str | Path], log: Path, *, prepare: Prepare | None = None, fresh: bool = False
) -> Ended:
    """Run one command line to its end."""
    return begin(line, log, prepare=prepare, fresh=fresh).wait()


def hashes(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its content, and what a link points to."""
    return {path.relative_to(folder).as_posix(): _hash(path) for path in sorted(folder.rglob("*"))}


def _hash(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def facts(bundle: Path) -> dict[str, str]:
    """What must not depend on how often a build was struck: weights, graphs, engines, figures.

    Times are left out, and so is what depends on them: latencies and the views of the report.
    """
    found = {
        name: content
        for name, content in hashes(bundle).items()
        if content != "no file" and not _DIFFERENT.fullmatch(name)
    }
    for name in found:
        if name.startswith("stages/"):
            found[name] = _without_times(json.loads((bundle / name).read_bytes()))
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    for key in ("model", "recipe", "options", "seed", "complete", "tool_version"):
        found[f"manifest.{key}"] = json.dumps(manifest.get(key), sort_keys=True)
    return found


def _without_times(value: Any) -> str:
    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: plain(v) for k, v in part.items() if "seconds" not in k}
        return [plain(v) for v in part] if isinstance(part, list) else part

    return json.dumps(plain(value), sort_keys=True)


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What is missing, too much or another, by name."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def leftovers(*folders: Path) -> list[str]:
    """Temporary files in folders that a finished or an interrupted run must not leave."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [str(path) for path in found if path.suffix == ".tmp" or ".partial" in path.parts]


def finished_stages(bundle: Path) -> list[str]:
    """The stages that a bundle has entered, also while it is written."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return []
    return list(manifest.get("stages", {}))
