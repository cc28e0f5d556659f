"""What users do to a build: other inputs, other options, two builds at once, another model."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from fault_machine import lines_of, one_sentence
from fault_room import (
    CHANGES,
    OPTIONS,
    REPORT,
    SEALED,
    ManifestWatch,
    Result,
    Room,
)
from fault_runs import Ended

_REFUSED = 2


def change(room: Room, name: str, *, back: bool = False, in_place: bool = False) -> None:
    """Put another file in the place of an input, by a rename or by writing over it."""
    place, other = CHANGES[name]
    data = (room.world / (place if back else other)).read_bytes()
    if in_place:
        with (room.folder / place).open("r+b") as file:
            file.write(data)
            file.truncate()
        return
    new = room.folder / "new"
    new.write_bytes(data)
    new.replace(room.folder / place)


def changed_between(room: Room, draw: Random, number: int) -> Result:
    """An input is another one when an unfinished or a finished build is run again."""
    name = list(CHANGES)[number % len(CHANGES)]
    stage = draw.choice((*room.stages[1:], REPORT, SEALED))
    room.restore(stage)
    change(room, name)
    problems = room.completed(room.sound[name])
    return Result("changed between runs", number, f"{name} changed", tuple(problems), stage)


def changed_during(room: Room, draw: Random, number: int) -> Result:
    """An input is exchanged while a build runs, in half of the tries only for a while."""
    name = list(CHANGES)[number % len(CHANGES)] if number % 2 else "weights"
    # What reads MODEL_DIR; half of the tries strike pruning, which reads it most often.
    later = (*room.stages[3:], REPORT)
    stage = room.stages[0] if number % 4 < 2 else later[number // 4 % len(later)]
    room.restore(stage)
    end = room.timelines[stage].work[1]
    run = room.begin(room.build())
    in_place = draw.random() < 0.3
    run.last(draw.uniform(0, 1) * end)
    change(room, name, in_place=in_place)
    if draw.random() < 0.5:
        run.last(draw.uniform(0, 1) * end)
        change(room, name, back=True, in_place=in_place)
    ended = run.wait()
    problems = _of_one_version(room, ended, name)
    change(room, name, back=True)
    problems += [f"next run: {each}" for each in room.completed(room.sound["a"])]
    outcome = f"{name} exchanged: exit {ended.code}"
    return Result("changed during a run", number, outcome, tuple(problems), stage)


def _of_one_version(room: Room, ended: Ended, name: str) -> list[str]:
    """The bundle is as built from the one input or from the other, or the run says what changed."""
    before, after = room.sound["a"], room.sound[name]
    if ended.code == _REFUSED:
        place = CHANGES[name][0]
        named = any(part in ended.sentence for part in (Path(place).name, place.split("/")[0]))
        return one_sentence(ended) + ([] if named else [f"names nothing: {ended.sentence}"])
    if ended.code not in {before.code, after.code}:
        return [f"ended with {ended.code}: {ended.sentence}"]
    as_before, as_after = room.unlike(before), room.unlike(after)
    if not as_before or not as_after:
        return []
    nearer = min(as_before, as_after, key=lambda problems: len(str(problems)))
    return [f"of two versions: {each}" for each in nearer]


def options_changed(room: Room, draw: Random, number: int) -> Result:
    """A build that was killed, or that is finished, is run with other options."""
    name = list(OPTIONS)[number % len(OPTIONS)]
    stage = draw.choice((*room.stages[1:], REPORT, SEALED))
    room.restore(stage)
    problems = room.completed(room.sound[name], *OPTIONS[name])
    return Result("options changed", number, f"{name} changed", tuple(problems), stage)


def two_builds(room: Room, draw: Random, number: int) -> Result:
    """A second command comes while a build writes into OUT."""
    command = ("build", "prune", "export", "compile", "bench")[number % 5]
    room.restore(draw.choice((room.stages[0], *room.stages[2:])))
    watch = ManifestWatch(room.out)
    first = room.begin(room.build())
    # From its first write on, the bundle is its own.
    while not watch.look() and first.poll() is None:
        time.sleep(0.001)
    first.last(draw.uniform(0, 0.5))
    late = room.begin(lines_of(room)[command], log="second").wait()
    if first.poll() is not None:
        return Result(
            "two builds", number, "the first was faster", tuple(room.unlike(room.sound["a"]))
        )
    problems = one_sentence(late, names="another build")
    ended = first.wait()
    if ended.code != room.sound["a"].code:
        problems.append(f"the first ended with {ended.code}: {ended.sentence}")
    problems += room.unlike(room.sound["a"])
    return Result("two builds", number, f"{command}: exit {late.code}", tuple(problems))


# How a build of another model into the bundle ends before it has pruned anything.
_OWNERS: dict[str, tuple[str, ...]] = {
    "no such device": ("--device", "cuda"),
    "no such task": ("--lm-eval", "no-such-task"),
    "killed": (),
}


def other_owner(room: Room, draw: Random, number: int) -> Result:
    """A build of another model ends early; then single stages are run on what lies in OUT."""
    how = list(_OWNERS)[number % len(_OWNERS)]
    if how == "no such device" and torch.cuda.is_available():
        return Result("other owner", number, "skipped: there is a GPU")
    stage = (*room.stages[1:4], SEALED)[number // len(_OWNERS) % 4]
    room.restore_pruned(stage)
    change(room, "weights")
    run = room.begin(room.build(*_OWNERS[how]))
    if how == "killed":
        run.last(draw.uniform(0.3, 1) * room.timelines[room.stages[0]].written[0])
        run.strike(signal.SIGKILL)
    run.wait()
    lines = lines_of(room)
    ended = [room.run(lines[command]) for command in ("export", "compile", "bench")]
    codes = [each.code for each in ended]
    problems = _mixed(room)
    for each in ended:
        problems += one_sentence(each) if each.code else []
    problems += [f"next run: {each}" for each in room.completed(room.sound["weights"])]
    return Result("other owner", number, f"{how}: {codes}", tuple(problems), stage)


def _mixed(room: Room) -> list[str]:
    """Whether weights and graphs are of more than one model."""
    found = room.facts()
    kept = [name for name in found if name.startswith(("pruned/model", "onnx/"))]
    for sound in (room.sound["a"], room.sound["weights"]):
        if all(found[name] == sound.facts.get(name) for name in kept):
            return []
    return ["weights and graphs are of two models"]


USERS: dict[str, tuple[Callable[[Room, Random, int], Result], int]] = {
    "changed between runs": (changed_between, 2 * len(CHANGES)),
    "changed during a run": (changed_during, 28),
    "options changed": (options_changed, 2 * len(OPTIONS)),
    "two builds": (two_builds, 10),
    "other owner": (other_owner, 12),
}
