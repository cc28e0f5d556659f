"""Strike real runs of the command line, and require that what they leave is sound.

    python benchmarks/faults.py [--kills N] [--tries N] [--only CLASS ...] [--seed S] [--workers N]
    python benchmarks/faults.py --only CLASS --number N --seed S

A tiny model is built undisturbed, and then again and again with one fault each: killed at random
moments of every stage, on a full disk, with inputs that change meanwhile, and so on
(`fault_kills.py`, `fault_machine.py`, `fault_changes.py`, `fault_bundles.py`). After each fault the
same command is run to its end. Right is only: the exit code of the undisturbed build, the same
bytes of weights, graphs and engines, the same figures, `verify` with 0, MODEL_DIR untouched, no
temporary file; and a run that cannot go on says so in one sentence with exit code 2.

Most runs are forked from this process, which has imported the libraries, so that the work is struck
and not the imports. Nor is tracing: it takes most of an export and writes nothing, so that what the
undisturbed builds traced is handed to all others; and latency, by which nothing is compared, is
timed in a tenth of the rounds. Such a run also has the hashes of strings of its parent and ends
without the interpreter's own end. "kill a fresh process" therefore starts real
ones, which trace themselves, and goes on in real ones.
Of `--kills` signals a fifteenth goes to those, a tenth are interrupts (Ctrl-C) and a tenth SIGTERM.
`--tries` replaces the number of tries of every other class.

Prints a table, every fault, and one JSON line; fails if anything is wrong.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

# Before torch is imported: one thread, for a process with more cannot be forked safely.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    ORT_DISABLE_TELEMETRY="1",
)

from brief_timing import timed_briefly
from fault_bundles import BUNDLES
from fault_changes import USERS, change
from fault_kills import KILLS
from fault_machine import MACHINE
from fault_room import CHANGES, OPTIONS, Result, Room, Sound, write_world
from fault_runs import differences
from shared_traces import SharedTraces
from tiny_directories import quiet

from prox24_deploy.graph.export.trace import Traces
from prox24_deploy.pipeline.stages import bench

Try = Callable[[Room, Random, int], Result]
CLASSES: dict[str, tuple[Try, int]] = {**KILLS, **MACHINE, **USERS, **BUNDLES}
# The classes that need what undisturbed builds of other inputs or options give.
_NEEDS = {
    "changed between runs": tuple(CHANGES),
    "changed during a run": tuple(CHANGES),
    "options changed": tuple(OPTIONS),
    "abandoned job": tuple(OPTIONS.keys() & {"engines"}),
    "other owner": ("weights",),
    "exchanged": ("weights",),
}
_FORK = multiprocessing.get_context("fork")


@dataclass(slots=True)
class Row:
    """What came of one class."""

    fault: str
    tries: int
    outcomes: Counter[str]
    hits: Counter[str]
    wrong: list[Result]


def warm_up() -> None:
    """Import what a build imports, so that no forked run has to."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401


def prepare(root: Path, classes: Sequence[str]) -> Room:
    """The world, and what undisturbed builds give.

    Raises:
        RuntimeError: another input or option gives the same bundle, and so would show nothing.
    """
    write_world(root / "world")
    traced = share_traces(root / "traces")
    vars(bench)["measure_latency"] = timed_briefly
    room = Room(root / "reference", root / "world", {})
    for name in ("a", *dict.fromkeys(need for each in classes for need in _NEEDS.get(each, ()))):
        room.reset()
        if name in CHANGES:
            change(room, name)
        room.sound[name] = room.measure(*OPTIONS.get(name, ()))
        shutil.copytree(room.out, room.references / name)
        print(f"undisturbed, {name}: {room.sound[name].seconds:.1f} s", file=sys.stderr)
        _require_other(name, room.sound)
    traced.settle()
    records = sorted((room.references / "a" / "stages").glob("*.json"), key=_written)
    room.stages = tuple(path.stem for path in records)
    return room


def share_traces(folder: Path) -> SharedTraces:
    """Hand every export of this process, and of those forked from it, what others traced."""
    folder.mkdir()
    traced = SharedTraces(folder)
    given = vars(traced.given())
    Traces.__init__ = lambda self: vars(self).update(given)  # type: ignore[method-assign]
    return traced


def _require_other(name: str, sound: dict[str, Sound]) -> None:
    """A change that changes nothing would find no fault."""
    if name != "a" and not differences(sound[name].facts, sound["a"].facts):
        raise RuntimeError(f"the build with another {name} gives the same bundle")


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def work(room: Room, seed: int, asked: Sequence[tuple[str, int]], answers: Any) -> None:
    """Make some tries in a room, and send what came of each."""
    for fault, number in asked:
        try:
            answers.put(CLASSES[fault][0](room, Random(f"{seed}/{fault}/{number}"), number))
        except Exception:  # a fault of the harness, or a run that does not end, is no pass
            answers.put(Result(fault, number, "not concluded", (traceback.format_exc(),)))
    shutil.rmtree(room.folder, ignore_errors=True)
    shutil.rmtree(room.snapshots, ignore_errors=True)
    answers.put(None)


def tried(
    prepared: Room, seed: int, asked: Sequence[tuple[str, int]], workers: int, root: Path
) -> Iterator[Result]:
    """The results of all tries, from as many workers."""
    answers = _FORK.SimpleQueue()
    for worker in range(workers):
        room = replace(prepared, folder=root / f"room-{worker}", seed=seed, timelines={})
        share = asked[worker::workers]
        _FORK.Process(target=work, args=(room, seed, share, answers), daemon=True).start()
    left = workers
    while left:
        result = answers.get()
        if result is None:
            left -= 1
        else:
            yield result


def asked_for(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Every try as a class and a number."""
    shares = {"kill a fresh process": 15, "interrupt": 10, "terminate": 10}
    signals = {name: max(1, options.kills // share) for name, share in shares.items()}
    signals["kill"] = max(1, options.kills - sum(signals.values()))
    found = []
    for name, (_, usual) in CLASSES.items():
        count = signals.get(name, usual if options.tries is None else options.tries)
        if not options.only or name in options.only:
            numbers = range(count) if options.number is None else [options.number]
            found += [(name, number) for number in numbers]
    return found


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The table."""
    rows = []
    for name in CLASSES:
        own = [result for result in results if result.fault == name]
        if own:
            outcomes = Counter(result.outcome for result in own)
            hits = Counter(result.hit for result in own if result.hit)
            rows.append(Row(name, len(own), outcomes, hits, [r for r in own if r.problems]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """One line for each class, and what came of its tries."""
    lines = [f"{'class':22} {'tries':>5} {'wrong':>5}  outcomes"]
    for row in rows:
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row.outcomes.items()))
        lines.append(f"{row.fault:22} {row.tries:5} {len(row.wrong):5}  {told}")
        if row.hits and row.fault in KILLS:
            hits = ", ".join(f"{count} {stage}" for stage, count in row.hits.items())
            lines.append(f"{'':34}  hit in: {hits}")
    return "\n".join(lines)


def told(result: Result, seed: int) -> str:
    """A fault with all that is known of it."""
    head = f"{result.fault} {result.number} (seed {seed}): {result.outcome}; {result.hit}"
    return "\n".join((head, *(f"    {problem[:1000]}" for problem in result.problems)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--tries", type=int, help="Of every class that is no signal.")
    parser.add_argument("--only", action="append", choices=CLASSES, metavar="CLASS")
    parser.add_argument("--number", type=int, help="Make this try alone, of each class.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="Where to work; default: in memory, if it is there."
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    began = time.monotonic()
    quiet()
    warm_up()
    memory = Path("/dev/shm")
    where = options.folder or (memory if memory.is_dir() else None)
    asked = asked_for(options)
    results = []
    with tempfile.TemporaryDirectory(dir=where) as folder:
        root = Path(folder)
        prepared = prepare(root, [name for name, _ in asked])
        for result in tried(prepared, options.seed, asked, options.workers, root):
            results.append(result)
            if result.problems:
                print(told(result, options.seed), file=sys.stderr, flush=True)
    rows = rows_of(results)
    wrong = sum(len(row.wrong) for row in rows)
    print(table(rows))
    seconds = round(time.monotonic() - began, 1)
    found = {"seed": options.seed, "wrong": wrong, "seconds": seconds}
    print(json.dumps({"benchmark": "faults", **found, "classes": [_json(row) for row in rows]}))
    return int(wrong > 0)


def _json(row: Row) -> dict[str, Any]:
    return {
        "class": row.fault,
        "tries": row.tries,
        "outcomes": dict(row.outcomes),
        "hit": dict(row.hits),
        "wrong": [asdict(result) for result in row.wrong],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
