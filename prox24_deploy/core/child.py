"""Run a job in a process of its own that ends when this one does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

# For a job to remove what it has half written; native code may not listen at all.
_GRACE_SECONDS = 3.0
# Seconds between looks at whether a parent is there.
_LOOK_EVERY = 0.5


def run_child(
    command: Sequence[str], text: bytes, log: IO[bytes], seconds: float | None = None
) -> int:
    """Run a command with `text` on its stdin and all that it says in `log`; its exit code.

    Where this process is interrupted or told to end, the child is told to end first.

    Raises:
        subprocess.TimeoutExpired: the child took longer than `seconds`, and was ended.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
    ) as child:
        try:
            child.communicate(text, seconds)
        except BaseException:
            end_child(child)
            raise
    return child.returncode


def end_child(child: "subprocess.Popen[Any]") -> None:
    """Tell a child to end, and see that it does."""
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def end_on_termination() -> None:
    """Let a job that is told to end do so as one that is interrupted, so that it cleans up.

    A job whose parent was killed is told so too: it would go on to write beside a new run.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = os.getppid()

    def orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)

    end_after(orphaned)


def end_with_starter() -> None:
    """Do the same when what started this job is gone, and stdin with it, if others are between.

    Whoever started it holds the other end of stdin and writes nothing.
    """
    source = sys.stdin.fileno()

    def closed() -> None:
        # Not by the text layer, whose lock another thread might want at the end.
        while os.read(source, 1):
            pass

    end_after(closed)


def end_after(event: Callable[[], None]) -> None:
    """End this process, gently if it listens, once a function that waits returns."""

    def watch() -> None:
        event()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
