"""Spoil inputs of every parser, and require a documented answer to each.

    python benchmarks/fuzz.py [--parser NAME] ... [--inputs N] [--seed S] [--workers N]
        [--minutes M] [--save DIR]
    python benchmarks/fuzz.py --parser NAME --seed S --only NUMBER --save DIR

An input is right if the command line accepts it or refuses it in one sentence with one of its exit
codes but 1, within 10 s of CPU time and 2 GB of memory, prints no control character, prints JSON
where JSON was asked for, runs no program, and writes nothing elsewhere. Inputs are made from sound
ones, see `fuzz_seeds.py`, by changes of their bytes and of what they say. Input NUMBER of a seed is
always the same for the same sound inputs. Each wrong input is saved, the first three of a kind.

Prints a JSON line as each parser is done, then a table, each kind of fault with the command that
reproduces it, and one JSON line of all; fails if there is a fault. With `--minutes`, each parser
gets an equal share of the time that is left, and its line says how many inputs it came to.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

# Before torch is imported: a process with threads cannot be forked safely.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
# Where torch may write is the folder of temporary files of each process.
os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# A forked process cannot use a GPU, and what is found must not depend on one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from fuzz_seeds import ROOMS
from fuzz_targets import TARGETS, SoundRun, Target, choose, sound_cases
from fuzz_workers import Outcome, Pool, drawn, in_child, require_sound
from tiny_directories import quiet

_KEPT_OF_A_KIND = 3
_MIB = 2**20
_MOST_TOLD = 300


@dataclass(slots=True)
class Row:
    """What came of the inputs of one parser."""

    parser: str
    inputs: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[Outcome]] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    largest_bytes: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> bool:
        """Count an outcome; whether it is worth keeping."""
        self.inputs += 1
        self.slowest_s = max(self.slowest_s, outcome.seconds)
        self.largest_bytes = max(self.largest_bytes, outcome.bytes)
        if not outcome.wrong:
            self.answers[outcome.answer] += 1
            return False
        kind = f"{outcome.answer} at {outcome.where}"
        self.counted[kind] += 1
        kept = self.wrong.setdefault(kind, [])
        if len(kept) == _KEPT_OF_A_KIND:
            return False
        kept.append(outcome)
        return True

    def as_json(self) -> dict[str, object]:
        """For the line that ends the output."""
        return {
            "parser": self.parser,
            "inputs": self.inputs,
            "answers": dict(self.answers),
            "wrong": {
                kind: {
                    "count": self.counted[kind],
                    "inputs": [each.number for each in kept],
                    "detail": last_line(kept[0]),
                    "story": "; ".join(kept[0].story)[:_MOST_TOLD],
                }
                for kind, kept in self.wrong.items()
            },
            "slowest_s": round(self.slowest_s, 3),
            "largest_mib": round(self.largest_bytes / _MIB, 1),
            "seconds": round(self.seconds, 1),
        }


def fuzz(options: argparse.Namespace, rooms: Path) -> list[Row]:
    """Try every parser that was asked for."""
    rows, tried = [], set[SoundRun]()
    names = list(dict.fromkeys(options.parser or TARGETS))
    end = time.monotonic() + options.minutes * 60
    for position, name in enumerate(names):
        room = sound_inputs(TARGETS[name], rooms, tried)
        now = time.monotonic()
        until = now + (end - now) / (len(names) - position)
        rows.append(fuzz_parser(options, name, room, until))
        done = {"benchmark": "fuzz", "seed": options.seed, **rows[-1].as_json()}
        # At once, for a run of hours may be ended by others.
        print(json.dumps(done), flush=True)
    return rows


def fuzz_parser(options: argparse.Namespace, name: str, room: Path, until: float) -> Row:
    """Try one parser with spoilt copies of what is in `room`; none is begun after `until`."""
    target = TARGETS[name]
    row, began = Row(name), time.perf_counter()
    seed = f"{options.seed}/{name}"
    pool = Pool(target, room, room.parent, seed, options.workers, options.most_killed, until)
    count = max(1, round(options.inputs * (1 if options.equal else target.share)))
    for outcome in pool.run(options.first, count):
        if row.add(outcome) and options.save:
            save(options.save, name, target, room, seed, outcome)
    row.seconds = time.perf_counter() - began
    return row


def sound_inputs(target: Target, rooms: Path, tried: set[SoundRun]) -> Path:
    """The folder with the sound inputs of a parser; made once, in a process of its own.

    Adds to `tried` the runs on sound inputs that were accepted; none is made twice.
    """
    room = rooms / target.room.replace(" ", "-")
    if not room.exists():
        room.mkdir()
        in_child(lambda: ROOMS[target.room](room))
    cases = sound_cases(target, room)
    new = {run: files for run, files in cases.items() if run not in tried}
    loaded = rooms / "modules.json"
    in_child(lambda: try_sound(target, room, new, loaded))
    tried |= new.keys()
    warm_up(json.loads(loaded.read_bytes()))
    return room


def try_sound(
    target: Target, room: Path, cases: Mapping[SoundRun, tuple[Path, Path]], loaded: Path
) -> None:
    """Require that sound inputs are accepted, and tell which modules that takes."""
    require_sound(target, room, cases, room.parent)
    loaded.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


def warm_up(modules: Iterable[str]) -> None:
    """Import what inputs need here, so that not every process has to.

    Raises:
        RuntimeError: one of them starts a thread, and a process with threads cannot be forked.
    """
    for name in modules:
        # Of what is there, some is none by its name, and some comes with another alone.
        with contextlib.suppress(Exception):
            import_module(name)
        if len(list(Path("/proc/self/task").iterdir())) > 1:
            raise RuntimeError(f"{name} starts a thread in a process that is to be forked")


def save(
    folder: Path, parser: str, target: Target, room: Path, seed: str, outcome: Outcome
) -> None:
    """Keep an input and what came of it."""
    _, file, (data, story) = choose(target, room, drawn(seed, outcome.number))
    kept = folder / f"{parser}-{outcome.number}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / file.name).write_bytes(data)
    told = "\n".join((outcome.answer, outcome.where, *story, "", outcome.detail))
    (kept / "what.txt").write_text(told, encoding="utf-8", errors="backslashreplace")


def reproduce(options: argparse.Namespace, rooms: Path) -> bool:
    """Run one input alone, leave its folder, and say how the command line is given it."""
    (name,) = options.parser
    target, folder = TARGETS[name], options.save / f"{name}-{options.only}-room"
    room = sound_inputs(target, rooms, set())
    seed = f"{options.seed}/{name}"
    (outcome,) = Pool(target, room, rooms, seed, 1).run(options.only, 1)
    _, file, (data, story) = choose(target, room, drawn(seed, options.only))
    room.rename(folder) if not folder.exists() else None
    place = folder / file.relative_to(room)
    place.write_bytes(data)
    print("\n".join(story), outcome.detail, f"{outcome.answer} {outcome.where}", sep="\n")
    print(command(target, folder, place))
    return outcome.wrong


def command(target: Target, room: Path, file: Path) -> str:
    """The command line that reads a spoilt file."""
    model = room / file.relative_to(room).parts[0]
    kinds = {"vit": room / "images", "whisper": room / "recordings"}
    return target.command.format(
        room=room, file=file, model=model, calibration=kinds.get(model.name, room / "text.txt")
    )


def table(rows: Sequence[Row]) -> str:
    """One line for each parser."""
    head = ("parser", "inputs", "accepted", "refused", "wrong", "slowest s", "MiB", "inputs/s")
    cells = [
        (
            row.parser,
            str(row.inputs),
            str(row.answers["accepted"]),
            ", ".join(
                f"{n} {name}" for name, n in sorted(row.answers.items()) if name != "accepted"
            ),
            str(row.counted.total()),
            f"{row.slowest_s:.2f}",
            f"{row.largest_bytes / _MIB:.0f}",
            f"{row.inputs / row.seconds:.0f}" if row.inputs else "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    )


def last_line(outcome: Outcome) -> str:
    """What an error says; of what was killed there is none, and the dump begins with the place."""
    killed = outcome.answer.startswith("killed")
    return "" if killed else outcome.detail.strip().splitlines()[-1][:_MOST_TOLD]


def faults(rows: Sequence[Row], seed: int) -> str:
    """Each kind of fault once, with what made it."""
    lines = []
    for row in rows:
        for kind, kept in sorted(row.wrong.items(), key=lambda pair: -row.counted[pair[0]]):
            first = kept[0]
            lines += [
                f"{row.parser}: {row.counted[kind]} × {kind}",
                f"    {last_line(first)}",
                f"    {'; '.join(first.story)[:_MOST_TOLD]}",
                f"    python benchmarks/fuzz.py --parser {row.parser} --seed {seed} "
                f"--only {first.number} --save DIR",
            ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parser", action="append", choices=TARGETS, metavar="NAME")
    parser.add_argument("--inputs", type=int, default=1000, help="Slow parsers get a fifth.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first input.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most-killed", type=int, default=50)
    parser.add_argument("--equal", action="store_true", help="Slow parsers get as many as others.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Of all parsers together.")
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--save", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.only is not None and (options.save is None or len(options.parser or ()) != 1):
        parser.error("--only needs one --parser, and --save for the folder that it leaves")
    quiet()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if options.only is not None:
            return int(reproduce(options, Path(folder)))
        rows = fuzz(options, Path(folder))
    print(table(rows))
    print(faults(rows, options.seed))
    wrong = sum(row.counted.total() for row in rows)
    done = {"seed": options.seed, "wrong": wrong, "parsers": [row.as_json() for row in rows]}
    print(json.dumps({"benchmark": "fuzz", **done}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
