"""Time algorithms of cuSPARSELt in a process of its own: `python -m` this module LOCK FORMAT.

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

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.formats import OPERANDS, padded, sparse_shape
from prox24_deploy.engines.cusparselt.matmul import MatmulPlan
from prox24_deploy.engines.cusparselt.profile import GEMM_FORMATS, GemmFormat, GemmShape

READY = "ready"
_REPLAYS = 3

Timer = Callable[[], float]


@lru_cache(maxsize=1)
def gemm_inputs(shape: GemmShape, format: GemmFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows (m, k) and weight (n, k), and the weight with half of it dropped, compressed."""
    generator = torch.Generator(device=cuda_graph.DEVICE).manual_seed(0)
    dtype = OPERANDS[format].dtype

    def normal(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator, device=cuda_graph.DEVICE)
        # As inputs are whose scale fits: their standard deviation is about a quarter of the range.
        return (values * 32).clamp(-127, 127).to(dtype) if dtype.itemsize == 1 else values.to(dtype)

    rows, weight = normal(shape.m, shape.k), normal(shape.n, shape.k)
    # Any 2:4 pattern takes the same time.
    kept = torch.tensor([1, 1, 0, 0], dtype=torch.bool, device=weight.device)
    half = torch.where(kept.repeat(shape.k // 4), weight.view(_bits(dtype)), 0).view(dtype)
    return rows, weight, torch._cslt_compress(half)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Integers of the same size, for not all operators know FP8."""
    return torch.uint8 if dtype.itemsize == 1 else torch.int16


def sparse_run(
    plan: MatmulPlan, packed: Tensor, rows: Tensor, format: GemmFormat
) -> Callable[[], Tensor]:
    """The sparse product of rows as a layer computes it, padding included."""
    multiple = OPERANDS[format].row_multiple
    return lambda: plan.multiply(packed, padded(rows, multiple))


def timer(run: Callable[[], Tensor], stopwatch: cuda_graph.Stopwatch) -> Timer:
    """Capture one call; each use of the result replays it and returns microseconds."""
    captured = cuda_graph.capture(lambda: (run(),))
    return lambda: float(stopwatch.milliseconds(captured.replay, 1)[0]) * 1e3


def time_algorithm(
    shape: GemmShape,
    format: GemmFormat,
    number: int,
    stopwatch: cuda_graph.Stopwatch,
    lock: TextIO,
) -> float | None:
    """Least of a few times in microseconds; None where cuSPARSELt refuses the algorithm."""
    rows, _, packed = gemm_inputs(shape, format)
    try:
        plan = MatmulPlan(sparse_shape(shape, format), rows.dtype, number, None)
        run = sparse_run(plan, packed, rows, format)
        run()
    except EngineError:
        return None
    torch.cuda.synchronize()
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        timed = timer(run, stopwatch)
        return min(timed() for _ in range(_REPLAYS))
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


@torch.inference_mode()
def main() -> None:
    """Answer every trial on stdin."""
    lock_file, asked = sys.argv[1:]
    format = next(format for format in GEMM_FORMATS if format == asked)
    stopwatch = cuda_graph.Stopwatch()
    _say(READY)
    with Path(lock_file).open("a", encoding="utf-8") as lock:
        for line in sys.stdin:
            n, k, m, number = json.loads(line)
            shape = GemmShape(n=n, k=k, m=m)
            found = time_algorithm(shape, format, number, stopwatch, lock)
            _say(json.dumps(found))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
