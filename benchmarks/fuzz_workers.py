"""Run spoilt inputs in processes that are bound in time and memory, and tell what came of each."""

import ctypes
import faulthandler
import gc
import io
import logging
import math
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

from fuzz_answers import PACKAGE, Watch, answered
from fuzz_targets import Case, SoundRun, Target, choose, clear_output

MOST_CPU_S = 10
MOST_BYTES = 2 * 2**30
# For what waits and uses no time of the processor.
MOST_WALL_S = 180
# Inputs of one process; a fresh one begins with fresh memory. Fewer where some would end long
# before the others, but not so few that a process does little else than to begin.
_MOST_OF_A_PROCESS = 500
_LEAST_OF_A_PROCESS = 50
_SHARES = 8
# A number of <malloc.h>.
_M_ARENA_MAX = -8
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one input.

    `answer` is "accepted", the class of the refusal, or what went wrong; `where` is then the
    innermost line of the package and `detail` the traceback. `bytes` is how far the memory of the
    process rose above where it began.
    """

    number: int
    answer: str
    wrong: bool
    seconds: float
    bytes: int
    story: tuple[str, ...] = ()
    where: str = ""
    detail: str = ""


@dataclass(slots=True)
class _Worker:
    process: Any
    inbox: Connection
    log: Path
    following: int
    stop: int
    ended: bool = False

    def give_up(self) -> None:
        """Its time is over: what it did not begin is not begun again."""
        self.stop = self.following


@dataclass(slots=True)
class Pool:
    """Processes for one target; `room` holds its sound inputs and is only read.

    `most_killed` ends the run once so many inputs had to be killed, each after ten seconds; `until`
    is when no further input is begun, by `time.monotonic`.
    """

    target: Target
    room: Path
    scratch: Path
    seed: str
    workers: int
    most_killed: int = 50
    until: float = math.inf
    running: list[_Worker] = field(default_factory=list)

    def run(self, first: int, count: int) -> Iterator[Outcome]:
        """The outcomes of inputs `first` to `first + count`, in the order in which they come."""
        stop, size = first + count, _of_a_process(count, self.workers)
        chunks = deque((n, min(n + size, stop)) for n in range(first, stop, size))
        killed = 0
        # What is there is in use for good: a process that looks for garbage in it would copy it.
        gc.freeze()
        try:
            while chunks or self.running:
                while chunks and len(self.running) < self.workers and self._goes_on(killed):
                    self.running.append(self._start(*chunks.popleft()))
                if not self.running:
                    return
                for worker in self._ready():
                    for outcome in self._heard(worker):
                        killed += outcome.answer.startswith("killed")
                        yield outcome
                    if worker.ended:
                        self.running.remove(worker)
                        if worker.following < worker.stop:
                            chunks.appendleft((worker.following, worker.stop))
        finally:
            for worker in self.running:
                worker.process.kill()

    def _goes_on(self, killed: int) -> bool:
        return killed < self.most_killed and time.monotonic() < self.until

    def _start(self, first: int, stop: int) -> _Worker:
        inbox, outbox = _FORK.Pipe(duplex=False)
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        job = _Job(self.target, self.room, folder, self.seed, first, stop, self.until)
        process = _FORK.Process(target=job.work, args=(outbox,), daemon=True)
        process.start()
        outbox.close()
        return _Worker(process, inbox, folder / "log", first, stop)

    def _ready(self) -> list[_Worker]:
        heard = wait([worker.inbox for worker in self.running])
        return [worker for worker in self.running if worker.inbox in heard]

    def _heard(self, worker: _Worker) -> Iterator[Outcome]:
        try:
            outcome: Outcome | None = worker.inbox.recv()
        except EOFError:
            worker.process.join()
            worker.ended = True
            if worker.following < worker.stop:
                yield self._death(worker)
                worker.following += 1
            shutil.rmtree(worker.log.parent, ignore_errors=True)
            return
        if outcome is None:
            worker.give_up()
            return
        worker.following = outcome.number + 1
        yield outcome

    def _death(self, worker: _Worker) -> Outcome:
        """What is known of an input that took its process with it."""
        code = worker.process.exitcode
        name = signal.Signals(-code).name if code and code < 0 else f"exit {code}"
        limits = {
            "SIGXCPU": f"killed: over {MOST_CPU_S} s",
            "SIGALRM": f"killed: no answer in {MOST_WALL_S} s",
        }
        text = worker.log.read_text(errors="replace") if worker.log.is_file() else ""
        seconds = {"SIGXCPU": MOST_CPU_S, "SIGALRM": MOST_WALL_S}.get(name, 0)
        _, _, story = choose(self.target, self.room, drawn(self.seed, worker.following))
        return Outcome(
            worker.following,
            limits.get(name, f"killed: {name}"),
            wrong=True,
            seconds=seconds,
            bytes=0,
            story=story[1],
            where=_where_in_dump(text),
            detail=text,
        )


def require_sound(
    target: Target, room: Path, cases: Mapping[SoundRun, tuple[Path, Path]], scratch: Path
) -> None:
    """Require that what is not spoilt is accepted: else nothing deep would ever be reached.

    Raises:
        RuntimeError: it is not.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    copy, watch = folder / "room", Watch(folder)
    for (*_, number), (source, place) in cases.items():
        shutil.copytree(room, copy)
        file = copy / place.relative_to(room)
        shutil.copyfile(source, file)
        answer, where, detail = answered(target, Case(copy, file, number), watch)
        if answer != "accepted":
            raise RuntimeError(f"{source} as it is: {answer} {where} {detail}")
        shutil.rmtree(copy)
    shutil.rmtree(folder)


def _of_a_process(count: int, workers: int) -> int:
    even = math.ceil(count / (workers * _SHARES))
    return max(_LEAST_OF_A_PROCESS, min(_MOST_OF_A_PROCESS, even))


def drawn(seed: str, number: int) -> Random:
    """The random numbers of one input."""
    return Random(f"{seed}/{number}")


@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs `first` to `stop`, in a process of their own."""

    target: Target
    room: Path
    folder: Path
    seed: str
    first: int
    stop: int
    until: float

    def work(self, outbox: Connection) -> None:
        room = self.folder / "room"
        shutil.copytree(self.room, room)
        log = (self.folder / "log").open("w")
        _bound(log)
        watch = Watch(self.folder)
        for number in range(self.first, self.stop):
            if time.monotonic() >= self.until:
                outbox.send(None)
                return
            draw = drawn(self.seed, number)
            source, file, (data, story) = choose(self.target, self.room, draw)
            file = room / file.relative_to(self.room)
            file.write_bytes(data)
            outbox.send(_tried(self.target, Case(room, file, number), story, watch))
            self._restore(room, file, source)

    def _restore(self, room: Path, file: Path, source: Path) -> None:
        clear_output(room)
        if self.target.writes_room:
            shutil.rmtree(room)
            shutil.copytree(self.room, room)
        elif source.relative_to(self.room) == file.relative_to(room):
            shutil.copyfile(source, file)
        else:
            file.unlink(missing_ok=True)


def _bound(log: io.TextIOWrapper) -> None:
    """No more memory than is allowed, and a traceback in `log` of what takes too long."""
    for number in (signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, log, all_threads=False, chain=True)
    faulthandler.enable(log)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Of the C library, a thread gets room of its own that is never used: those of ONNX Runtime on a
    # host of many cores would have none left, and it waits for a thread that did not start.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _tried(target: Target, case: Case, story: tuple[str, ...], watch: Watch) -> Outcome:
    """Run one input within its time."""
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + MOST_CPU_S + 1, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, MOST_WALL_S)
    before = _peak()
    answer, where, detail = answered(target, case, watch)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # To make the next input is no work of a parser.
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
    return Outcome(
        case.number,
        answer,
        wrong=bool(detail),
        seconds=time.process_time() - used,
        bytes=_peak() - before,
        story=story if detail else (),
        where=where,
        detail=detail,
    )


def _where_in_dump(text: str) -> str:
    """The same in what faulthandler wrote, whose first lines are the innermost."""
    for line in text.splitlines():
        if f"/{PACKAGE}/" in line:
            path, _, rest = line.partition('", line ')
            return f"{path.rpartition(f'{PACKAGE}/')[2]}:{rest.replace(' in ', ' ')}"
    return "outside of the package"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_child(work: Callable[[], object]) -> None:
    """Run something in a process of its own, so that this one starts no threads and loads nothing.

    Raises:
        RuntimeError: it failed; says how, for a watched process prints nothing that is seen.
    """
    inbox, outbox = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_told, args=(work, outbox))
    process.start()
    outbox.close()
    try:
        failure = inbox.recv()
    except EOFError:
        process.join()
        failure = f"it ended with {process.exitcode}"
    process.join()
    if failure:
        raise RuntimeError(f"a process failed: {failure}")


def _told(work: Callable[[], object], outbox: Connection) -> None:
    try:
        work()
    except Exception:
        outbox.send(traceback.format_exc())
    else:
        outbox.send("")
