"""The exact prox on a GPU against a copy of the same bytes, and against float64.

λσ 0.3, 1 and 10 are an early, a middle and a late step of the solver; 0.5 takes longest. The bar is
twice the time of a device copy, which reads and writes each weight once; the step of ADMM reads
three matrices and writes three, and is held to twice the copies of that many. Prints a table and
one JSON line.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prox24_deploy.pruning.solvers.admm_step import AdmmState
from prox24_deploy.pruning.solvers.prox import _prox_eager, objective_24
from prox24_deploy.pruning.solvers.prox_cuda import admm_step_cuda, prox_24_cuda

ROWS, FEATURES = 4096, 14336
LAMBDAS = (0.3, 0.5, 1.0, 10.0)
ROUNDS = 31
# Half a millisecond of writing, and more than any cache holds.
BUSY_BYTES = 1 << 31
BAR = 2.0
# Largest excess of the objective over the float64 optimum, in units of ½|z|².
ALLOWED = 1e-6
ORACLE_CELLS = 10_000_000


def microseconds(work: Callable[[], object], before: Callable[[], object] = tuple) -> float:
    """Median time of one call on the GPU, after a warm-up; what is done before is not timed.

    The GPU is busy while the call is queued, as it is within the solver: without that, the time
    that the host takes to launch a kernel would be counted too, a quarter of the copy's.
    """
    busy = torch.empty(BUSY_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        work()
    taken: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        busy.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3)
    return float(statistics.median(taken))


def excess(weight: Tensor, lam: float) -> float:
    """Largest excess of the kernel's objective over that of the eager form in float64."""
    rows = torch.full((len(weight),), lam, device=weight.device)
    found = prox_24_cuda(weight, rows).double()
    exact = weight.double()
    best = _prox_eager(exact, rows.double()[:, None], 12)
    energy = 0.5 * exact.unflatten(-1, (-1, 4)).square().sum(-1)
    gap = objective_24(found, exact, lam) - objective_24(best, exact, lam)
    return float((gap / energy.clamp_min(1e-300)).max())


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight, dual, linear = (draw(ROWS, FEATURES) for _ in range(3))
    dual *= 0.5
    target = torch.empty_like(weight)
    copy = microseconds(partial(target.copy_, weight))
    table = Table("λσ", "copy µs", "prox", "ratio", "ADMM step", "of 3 copies", "excess", box=None)
    figures = {}
    for lam in LAMBDAS:
        rows = torch.full((ROWS,), lam, device="cuda")
        alone = microseconds(partial(prox_24_cuda, weight, rows))
        # A step writes over the dual, and with another it would be a step of other work.
        state = AdmmState(weight, torch.empty_like(weight), dual.clone(), target)
        step = microseconds(
            partial(admm_step_cuda, state, linear, rows, 1.0), partial(state.dual.copy_, dual)
        )
        over = excess(draw(ORACLE_CELLS // 10_000, 40_000), lam)
        figures[lam] = {"prox_us": alone, "step_us": step, "excess": over}
        table.add_row(
            f"{lam:g}", f"{copy:.0f}", f"{alone:.0f}", f"{alone / copy:.2f}×", f"{step:.0f}",
            f"{step / copy / 3:.2f}×", f"{over:.1e}",
        )  # fmt: skip
    Console().print(table)
    card = torch.cuda.get_device_name()
    print(json.dumps({"benchmark": "prox_speed_gpu", "gpu": card, "copy_us": copy, **figures}))
    assert all(found["prox_us"] <= BAR * copy for found in figures.values()), figures
    assert all(found["step_us"] <= BAR * 3 * copy for found in figures.values()), figures
    assert all(found["excess"] <= ALLOWED for found in figures.values()), figures


if __name__ == "__main__":
    main()
