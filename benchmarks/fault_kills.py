"""Kills and interrupts at random moments of every stage, and the run that goes on from there."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from fault_room import OPTIONS, ManifestWatch, Result, Room, Timeline
from fault_runs import PATIENCE_S, Ended, Run, leftovers

# A run is struck twice before it is left in peace, in this share of the tries.
_TWICE = 0.25
# Share of the moments that lie in the work of the stage; the others lie anywhere before its end.
_IN_STAGE = 0.8
# A run that ends before it is struck was hit by nothing.
_ATTEMPTS = 4
# Where jobs are started, and about how long one takes.
_COMPILE = "compile"
_JOB_S = 4.0
_WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


def kill(room: Room, draw: Random, number: int) -> Result:
    """SIGKILL to the run and its jobs."""
    return _struck(room, draw, number, "kill", signal.SIGKILL)


def kill_fresh(room: Room, draw: Random, number: int) -> Result:
    """SIGKILL to a process that was not forked, and so imports everything itself."""
    return _struck(room, draw, number, "kill a fresh process", signal.SIGKILL, fresh=True)


def interrupt(room: Room, draw: Random, number: int) -> Result:
    """SIGINT to the group, as Ctrl-C does."""
    return _struck(room, draw, number, "interrupt", signal.SIGINT)


def terminate(room: Room, draw: Random, number: int) -> Result:
    """SIGTERM to the run alone, as a job scheduler does."""
    return _struck(room, draw, number, "terminate", signal.SIGTERM)


def _struck(
    room: Room,
    draw: Random,
    number: int,
    fault: str,
    sign: signal.Signals,
    *,
    fresh: bool = False,
) -> Result:
    """Strike a run in the stage of this number; one that was faster is begun again."""
    for _ in range(_ATTEMPTS):
        ended, went_on = _strike_once(room, draw, room.stage_of(number), sign, fresh=fresh)
        if ended.code != room.sound["a"].code:
            break
        if problems := room.unlike(room.sound["a"]):
            return Result(fault, number, "ended before", tuple(problems))
    else:
        return Result(fault, number, "ended before")
    hit = room.next_stage()
    problems = [] if sign == signal.SIGKILL else _impolite(ended, sign, went_on, room)
    times = 1
    if draw.random() < _TWICE:
        again = room.begin(room.build())
        again.last(draw.uniform(0, room.timelines[hit].work[1]))
        again.strike(signal.SIGKILL)
        again.wait()
        times = 2
    problems += room.completed(room.sound["a"], fresh=fresh)
    return Result(fault, number, f"struck {times} ×", tuple(problems), hit)


def _strike_once(
    room: Room, draw: Random, stage: str, sign: signal.Signals, *, fresh: bool
) -> tuple[Ended, float]:
    """How a run ended that was struck in a stage, and how long it went on."""
    room.restore(stage)
    timeline = room.timelines[stage]
    run = room.begin(room.build(), fresh=fresh)
    if fresh:
        run.last(draw.uniform(0, 1) * (_START_S + timeline.work[1]))
    else:
        _wait_in_stage(run, room, timeline, draw)
    run.strike(sign, group=sign != signal.SIGTERM)
    began = time.monotonic()
    return run.wait(), time.monotonic() - began


# What a fresh process spends on imports before it does anything.
_START_S = 4.0


def _wait_in_stage(run: Run, room: Room, timeline: Timeline, draw: Random) -> None:
    """Wait for a moment of the stage, told by how often the manifest was written by then."""
    begin, end = timeline.work
    if draw.random() >= _IN_STAGE:
        run.last(draw.uniform(0, end))
        return
    watch = ManifestWatch(room.out)
    latest = time.monotonic() + 2 * end + 1
    while watch.look() < len(timeline.written) - 1 and time.monotonic() < latest:
        if run.poll() is not None:
            return
        time.sleep(0.0005)
    run.last(draw.uniform(0, 1) * (end - begin))


def _impolite(ended: Ended, sign: signal.Signals, seconds: float, room: Room) -> list[str]:
    """What an interrupted run must do: say so, soon, with its exit code, and leave no file."""
    problems = []
    if ended.code != 128 + sign or _WORDS[sign] not in ended.text:
        problems.append(f"ended with {ended.code} and {ended.sentence[:80]!r}")
    if "Traceback" in ended.text:
        problems.append("a traceback was printed")
    if seconds > 10:
        problems.append(f"went on for {seconds:.0f} s")
    return problems + [
        f"left behind: {path}" for path in leftovers(room.out) if path.endswith(".tmp")
    ]


def abandon(room: Room, draw: Random, number: int) -> Result:
    """SIGKILL to the run alone, as the kernel does it: the job that compiles for it lives on."""
    fault = "abandoned job"
    if "engines" not in room.sound:
        return Result(fault, number, "skipped: TensorRT-RTX is not installed")
    room.restore(_COMPILE)
    run = room.begin(room.build(*OPTIONS["engines"]))
    while run.poll() is None and not _children(run.pid):
        time.sleep(0.002)
    run.last(draw.uniform(0, _JOB_S))
    run.strike(signal.SIGKILL, group=False)
    hit = room.next_stage() if run.wait().code < 0 else ""
    alive = run.is_alive()
    problems = room.completed(room.sound["engines"], *OPTIONS["engines"])
    deadline = time.monotonic() + PATIENCE_S
    while run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    problems += [f"once the job had ended: {each}" for each in room.unlike(room.sound["engines"])]
    outcome = "the job lived on" if alive else "the job ended"
    return Result(fault, number, outcome, tuple(problems), hit)


def _children(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return ""


KILLS: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "kill": (kill, 0),
    "kill a fresh process": (kill_fresh, 0),
    "interrupt": (interrupt, 0),
    "terminate": (terminate, 0),
    "abandoned job": (abandon, 6),
}
