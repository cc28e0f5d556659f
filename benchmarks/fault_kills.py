"""Kills and interrupts at random moments of every stage, and the run that goes on from there."""

import signal
import time
from collections.abc import Callable
from random import Random

from fault_room import REPORT, ManifestWatch, Result, Room, Timeline
from fault_runs import INTERRUPTED, Ended, Run, leftovers

# A run is struck twice before it is left in peace, in this share of the tries.
_TWICE = 0.25
# Share of the moments that lie in the work of the stage; the others lie anywhere before its end.
_IN_STAGE = 0.8
_WORD = "Interrupted"


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
    every = (*room.stages, REPORT)
    stage = every[number % len(every)]
    room.restore(stage)
    timeline = room.timelines[stage]
    run = room.begin(room.build(), fresh=fresh)
    if fresh:
        run.last(draw.uniform(0, 1) * (_START_S + timeline.work[1]))
    else:
        _wait_in_stage(run, room, timeline, draw)
    run.strike(sign, group=sign != signal.SIGTERM)
    began = time.monotonic()
    ended = run.wait()
    hit, problems = room.next_stage(), []
    if ended.code == room.sound["a"].code:
        return Result(fault, number, "ended before", tuple(room.unlike(room.sound["a"])))
    if sign != signal.SIGKILL:
        problems = _impolite(ended, time.monotonic() - began, room)
    times = 1
    if draw.random() < _TWICE:
        again = room.begin(room.build())
        again.last(draw.uniform(0, timeline.work[1]))
        again.strike(signal.SIGKILL)
        again.wait()
        times = 2
    problems += room.completed(room.sound["a"])
    return Result(fault, number, f"ended by it, {times} ×", tuple(problems), hit)


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


def _impolite(ended: Ended, seconds: float, room: Room) -> list[str]:
    """What an interrupted run must do: say so, soon, with its exit code, and leave no file."""
    problems = []
    if ended.code != INTERRUPTED or _WORD not in ended.text:
        problems.append(f"ended with {ended.code} and {ended.sentence[:80]!r}")
    if "Traceback" in ended.text:
        problems.append("a traceback was printed")
    if seconds > 10:
        problems.append(f"went on for {seconds:.0f} s")
    return problems + [
        f"left behind: {path}" for path in leftovers(room.out) if path.endswith(".tmp")
    ]


KILLS: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "kill": (kill, 0),
    "kill a fresh process": (kill_fresh, 0),
    "interrupt": (interrupt, 0),
    "terminate": (terminate, 0),
}
