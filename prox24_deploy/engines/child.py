"""Run a job in a process of its own that ends when this one does."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

# For a job to remove what it has half written; native code may not listen at all.
_GRACE_SECONDS = 3.0


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
    """Let a job that is told to end do so as one that is interrupted, so that it cleans up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def end_with_starter() -> None:
    """End this process, as if told to, when what started it is gone and stdin with it.

    For what has other processes between, and would go on to write beside a new run. Whoever started
    it holds the other end of stdin and writes nothing.
    """

    def watch() -> None:
        # Not by the text layer, whose lock another thread might want at the end.
        while os.read(source, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    source = sys.stdin.fileno()
    threading.Thread(target=watch, daemon=True).start()
