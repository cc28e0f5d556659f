"""Answers of every kind, right and wrong, for the harness of spoilt inputs to judge.

`test_fuzz.py` runs this in a process of its own, because the harness forks. Prints one JSON object:
the answers to two inputs for each plant, and whether they are wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fuzz_workers
import typer
from fuzz_documents import spoil_json
from fuzz_targets import Case, Target, Victim

from prox24_deploy.core.errors import ExportError, ModelDirError, UsageError


def accept(_: Case) -> None:
    sys.stdout.write('{"a": 1}\n')


def exit_3(_: Case) -> None:
    raise typer.Exit(3)


def exit_1(_: Case) -> None:
    raise typer.Exit(1)


def refuse(_: Case) -> None:
    raise UsageError("File x cannot be used; pass another.")


def refuse_with_1(_: Case) -> None:
    raise ExportError("The model could not be exported.")


def forbidden(_: Case) -> None:
    raise PermissionError(13, "Permission denied", "x")


def crash(_: Case) -> None:
    raise ValueError("planted")


def deep(case: Case) -> None:
    deep(case)


def hang(_: Case) -> None:
    while True:
        pass


def allocate(_: Case) -> None:
    bytearray(3 * 2**30)


def hide_that_memory_ended(_: Case) -> None:
    try:
        bytearray(3 * 2**30)
    except MemoryError as error:
        raise ModelDirError("The model does not open; pass another.") from error


def die(_: Case) -> None:
    os._exit(7)


def run_a_program(_: Case) -> None:
    subprocess.run(["true"], check=False)


def write_elsewhere(case: Case) -> None:
    (case.room.parent.parent / "elsewhere").write_text("")


def write_beside(case: Case) -> None:
    (case.room / "beside").write_text("")


def steer_the_terminal(_: Case) -> None:
    sys.stderr.write("File \x1b[31mred cannot be used; pass another.\n")


def print_no_json(_: Case) -> None:
    sys.stdout.write('{"a": NaN}\n')


def print_past_python(_: Case) -> None:
    os.write(1, b"hello\n")


def warn_past_python(_: Case) -> None:
    os.write(2, b"a warning\n")


def steer_past_python(_: Case) -> None:
    os.write(2, b"\x1b[31mred\n")


PLANTS: tuple[Callable[[Case], None], ...] = (
    accept, exit_3, exit_1, refuse, refuse_with_1, forbidden, crash, deep, hang, allocate,
    hide_that_memory_ended, die, run_a_program, write_elsewhere, write_beside, steer_the_terminal,
    print_no_json, print_past_python, warn_past_python, steer_past_python,
)  # fmt: skip


def main() -> None:
    fuzz_workers.MOST_CPU_S = 1
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder) / "sound"
        room.mkdir()
        (room / "seed.json").write_text('{"a": [1, 2], "b": "c"}')
        for run in PLANTS:
            target = Target("", (Victim("*.json", spoil_json),), run, "")
            pool = fuzz_workers.Pool(target, room, Path(folder), "0", workers=1)
            outcomes = list(pool.run(0, 2))
            found[run.__name__] = [[o.answer, o.wrong, o.where] for o in outcomes]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
