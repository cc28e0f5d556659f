"""Time algorithms of cuSPARSELt in a process of its own: `python -m` this module LOCK DTYPE.

An algorithm may end the process: one of cuSPARSELt 0.8 was seen to run into an illegal instruction
on Hopper, after which a process cannot use the GPU any more, and others never to end. Writes
"ready", then answers each line [n, k, m, number] on stdin by one: microseconds, or null where
cuSPARSELt refuses. Several such processes load their kernels at the same time, and take turns by
LOCK to run them.
"""

import fcntl
import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.nn import functional

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.matmul import MatmulPlan
from prox24_deploy.engines.cusparselt.profile import ROW_MULTIPLE, GemmShape

READY = "ready"
_REPLAYS = 3

Timer = Callable[[], float]


@lru_cache(maxsize=1)
def gemm_inputs(shape: GemmShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows (m, k) and weight (n, k), and the weight with half of it dropped, compressed."""
    generator = torch.Generator(device=cuda_graph.DEVICE).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=cuda_graph.DEVICE, dtype=dtype)

    rows, weight = normal(shape.m, shape.k), normal(shape.n, shape.k)
    # Any 2:4 pattern takes the same time.
    cells = weight.clone().unflatten(1, (-1, 4))
    cells[..., 2:] = 0
    return rows, weight, torch._cslt_compress(cells.flatten(1))


def multiply_padded(plan: MatmulPlan, packed: Tensor, rows: Tensor) -> Tensor:
    """Multiply rows filled up to a number that cuSPARSELt takes, as a compressed layer does."""
    # Padding by nothing would copy.
    missing = -len(rows) % ROW_MULTIPLE
    whole = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return plan.multiply(packed, whole)[: len(rows)]


def timer(run: Callable[[], Tensor], stopwatch: cuda_graph.Stopwatch) -> Timer:
    """Capture one call; each use of the result replays it and returns microseconds."""
    captured = cuda_graph.capture(lambda: (run(),))
    return lambda: float(stopwatch.milliseconds(captured.replay, 1)[0]) * 1e3


def time_algorithm(
    shape: GemmShape, dtype: torch.dtype, number: int, stopwatch: cuda_graph.Stopwatch, lock: TextIO
) -> float | None:
    """Least of a few times in microseconds; None where cuSPARSELt refuses the algorithm."""
    rows, _, packed = gemm_inputs(shape, dtype)
    try:
        plan = MatmulPlan(shape.padded, dtype, number, None)
        multiply_padded(plan, packed, rows)
    except EngineError:
        return None
    torch.cuda.synchronize()
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        timed = timer(lambda: multiply_padded(plan, packed, rows), stopwatch)
        return min(timed() for _ in range(_REPLAYS))
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


@torch.inference_mode()
def main() -> None:
    """Answer every trial on stdin."""
    lock_file, dtype = sys.argv[1:]
    stopwatch = cuda_graph.Stopwatch()
    _say(READY)
    with Path(lock_file).open("a", encoding="utf-8") as lock:
        for line in sys.stdin:
            n, k, m, number = json.loads(line)
            shape = GemmShape(n=n, k=k, m=m)
            found = time_algorithm(shape, getattr(torch, dtype), number, stopwatch, lock)
            _say(json.dumps(found))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
