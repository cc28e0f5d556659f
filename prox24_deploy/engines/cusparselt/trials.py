"""Time many algorithms of cuSPARSELt in processes that may crash or hang, several at a time."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt.gemm_job import READY
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
# Until Python and CUDA have started, and until an algorithm is taken to hang.
_START_SECONDS, _TRIAL_SECONDS = 120.0, 10.0


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    """One algorithm, by number, on one GEMM."""

    shape: GemmShape
    algorithm: int


def run_trials(
    trials: Sequence[Trial], format: GemmFormat, answered: Callable[[int, int], None]
) -> dict[Trial, float]:
    """Time every trial on the GPU at hand.

    Most of the time goes into loading kernels, which is work of the CPU, so several processes share
    the trials; they run kernels one at a time. An algorithm that crashed or hung on one GEMM is not
    tried on the others: those that do so were seen to do it on all.

    Args:
        trials: what to time.
        format: of all of them.
        answered: called with the number of trials done and of all.

    Returns:
        Microseconds by trial, without those that cuSPARSELt refused or that are not to be used.

    Raises:
        EngineError: a process does not start.
    """
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // 2, len(trials)))
    with tempfile.NamedTemporaryFile() as lock:
        module = "prox24_deploy.engines.cusparselt.gemm_job"
        command = [sys.executable, "-m", module, lock.name, format]
        return run_workers(command, trials, workers, answered)


def run_workers(
    command: Sequence[str],
    trials: Sequence[Trial],
    workers: int,
    answered: Callable[[int, int], None],
) -> dict[Trial, float]:
    """Share `trials` among processes of `command`, which reads and answers as `gemm_job` does."""
    board = _Board(trials, answered)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for worker in [pool.submit(_work, command, board) for _ in range(workers)]:
                worker.result()
        except BaseException:
            # The pool waits for its threads, which wait for their processes.
            board.close()
            raise
    return board.found


@dataclass
class _Board:
    """Trials still to run, and what is known; shared by threads."""

    trials: Sequence[Trial]
    answered: Callable[[int, int], None]
    found: dict[Trial, float] = field(default_factory=dict)
    _given: int = 0
    _done: int = 0
    _unusable: set[int] = field(default_factory=set)
    _children: "list[subprocess.Popen[str]]" = field(default_factory=list)
    _closed: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> Trial | None:
        """The next trial of a usable algorithm; None when all are given out."""
        with self._guard:
            while self._given < len(self.trials) and not self._closed:
                trial = self.trials[self._given]
                self._given += 1
                if trial.algorithm not in self._unusable:
                    return trial
                self._count()
        return None

    def enlist(self, child: "subprocess.Popen[str]") -> None:
        """End this child too when the trials are given up."""
        with self._guard:
            self._children.append(child)
            if self._closed:
                child.kill()

    def close(self) -> None:
        """Give up: no trial is given out any more, and no child goes on."""
        with self._guard:
            self._closed = True
            for child in self._children:
                child.kill()

    def note(self, trial: Trial, microseconds: float | None) -> None:
        """Keep the answer to a trial."""
        with self._guard:
            if microseconds is not None:
                self.found[trial] = microseconds
            self._count()

    def rule_out(self, trial: Trial) -> None:
        """Note that a trial ended its process or hung."""
        with self._guard:
            if trial.algorithm not in self._unusable:
                logger.info("algorithm %d is not used: it crashes or hangs", trial.algorithm)
            self._unusable.add(trial.algorithm)
            self._count()

    def _count(self) -> None:
        self._done += 1
        self.answered(self._done, len(self.trials))


def _work(command: Sequence[str], board: _Board) -> None:
    """Run trials until none is left, each process as long as it lives."""
    trial = board.take()
    while trial is not None:
        with _process(command, board) as process:
            while trial is not None:
                answer = process.ask([*_sizes(trial.shape), trial.algorithm])
                if answer is None:
                    break
                board.note(trial, json.loads(answer))
                trial = board.take()
        if trial is not None:
            board.rule_out(trial)
            trial = board.take()


class _Process:
    """A child that answers each line with a line, or is killed when it takes too long."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self._child = child

    def ask(self, question: object) -> str | None:
        """Its answer; None where it died."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(_TRIAL_SECONDS)

    def answer(self, seconds: float) -> str | None:
        """The next line; None where none came."""
        assert self._child.stdout is not None
        watchdog = threading.Timer(seconds, self._child.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            line = self._child.stdout.readline()
            # Half a line is what a child left that ended while it wrote.
            return line if line.endswith("\n") else None
        finally:
            watchdog.cancel()


@contextmanager
def _process(command: Sequence[str], board: _Board) -> Iterator[_Process]:
    """Start a child, and end it."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        try:
            board.enlist(child)
            process = _Process(child)
            if process.answer(_START_SECONDS) != f"{READY}\n":
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it said nothing"]
                raise EngineError(f"The process that times cuSPARSELt did not start: {said[-1]}.")
            yield process
        finally:
            child.kill()


def _sizes(shape: GemmShape) -> tuple[int, int, int]:
    return shape.n, shape.k, shape.m
