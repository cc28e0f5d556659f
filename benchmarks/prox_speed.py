"""Throughput of the exact prox on one CPU thread, in millions of cells per second.

Gaussian cells in float32; λσ 0.3, 1 and 10 are an early, a middle and a late step of the solver.
Prints a table and one JSON line, and fails below the throughput of the plainest eager form.
"""

import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from prox24_deploy.pruning.prox import prox_24

CELLS = 1 << 20
ROUNDS = 7
# M cells/s of an eager prototype on one thread of the same kind of machine.
REACH = {0.3: 1.4, 1.0: 3.1, 10.0: 8.9}
# A shared machine may be this much slower than the quiet one that the figures come from.
SLACK = 0.4


def throughput(lam: float) -> float:
    """Median M cells/s over some rounds, one thread."""
    weight = torch.randn(1, 4 * CELLS, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        prox_24(weight, lam)
        seconds.append(time.perf_counter() - began)
    return CELLS / statistics.median(seconds) / 1e6


def main() -> None:
    torch.set_num_threads(1)
    found = {lam: throughput(lam) for lam in REACH}
    table = Table("λσ", "M cells/s", "prototype", "ratio", box=None)
    for lam, speed in found.items():
        table.add_row(f"{lam:g}", f"{speed:.2f}", f"{REACH[lam]:.1f}", f"{speed / REACH[lam]:.2f}×")
    Console().print(table)
    print(json.dumps({"benchmark": "prox_speed", "cells": CELLS, "mcells_per_s": found}))
    slow = {lam: speed for lam, speed in found.items() if speed < SLACK * REACH[lam]}
    assert not slow, f"slower than {SLACK} of the prototype at λσ {slow}"


if __name__ == "__main__":
    main()
