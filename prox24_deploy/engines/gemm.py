"""Time GEMMs on the GPU at hand: cuBLAS on the dense weight against cuSPARSELt on the 2:4 one.

Each time is that of one multiplication captured as a CUDA graph, with the L2 cache emptied before
it, so that every weight comes from memory as it does in a model. Both twins run in turns. The
algorithms of cuSPARSELt are timed in the same way: its own search has everything in the cache, and
was seen to fail on Hopper.
"""

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from statistics import median

import pynvml
import torch
from torch import Tensor
from torch.nn import functional

from prox24_deploy.artifacts import DType
from prox24_deploy.engines import cuda_graph
from prox24_deploy.engines.choice import LayerChoice, choose, gemm_obstacle
from prox24_deploy.engines.linear import layer_uses, sparse_product
from prox24_deploy.engines.profile import Algorithm, GemmShape, GemmTiming, GpuProfile
from prox24_deploy.engines.torch_model import TorchModel
from prox24_deploy.graph.module import TORCH_DTYPES

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

# Numbers of cuSPARSELt's algorithms begin at 0; how many there are depends on the shape.
_MOST_ALGORITHMS = 32
_TRIALS, _REPLAYS = 3, 15
# Dividing k pays where there are few rows; the modes sum the parts in one kernel or in two.
_SPLIT_ROWS = 512
_SPLITS, _SPLIT_MODES = (2, 4, 8), (0, 1)

Timer = Callable[[], float]


def choose_measured(
    opened: TorchModel,
    shapes: Sequence[tuple[int, int]],
    pruned: Container[str],
    known: GpuProfile,
    progress: Progress,
) -> tuple[tuple[LayerChoice, ...], GpuProfile]:
    """Time the GEMM of every layer in `pruned` at every (batch, sequence), and choose by that.

    Returns:
        A choice for every layer of the model, and `known` with what was measured.
    """
    feeds = [opened.feeds(shape) for shape in shapes]
    uses = layer_uses(opened.wrapped, [partial(opened.run, one) for one in feeds])
    timed = [use for use in uses if use.name in pruned and not gemm_obstacle(use)]
    gemms = [gemm for use in timed for gemm in use.gemms]
    profile = measure_gemms(known, gemms, opened.dtype, progress)
    return choose(uses, profile, pruned), profile


def measure_gemms(
    profile: GpuProfile, shapes: Sequence[GemmShape], dtype: DType, progress: Progress
) -> GpuProfile:
    """Add to `profile` the shapes that it does not know yet."""
    missing = sorted({shape for shape in shapes if profile.known(shape) is None})
    found = []
    for done, shape in enumerate(missing):
        progress("gemm", done, len(missing))
        found.append(time_gemm(shape, TORCH_DTYPES[dtype]))
        logger.info("%s: speed-up %.2f", shape, found[-1].speedup)
    if missing:
        progress("gemm", len(missing), len(missing))
    return profile.with_timings(found)


@torch.inference_mode()
def time_gemm(shape: GemmShape, dtype: torch.dtype) -> GemmTiming:
    """Time one GEMM dense and with the best algorithm of cuSPARSELt, in half precision."""
    generator = torch.Generator(device=cuda_graph.DEVICE).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=cuda_graph.DEVICE, dtype=dtype)

    rows, weight = normal(shape.m, shape.k), normal(shape.n, shape.k)
    packed = torch._cslt_compress(_pruned(weight))
    stopwatch = cuda_graph.Stopwatch()
    dense = _timer(lambda: functional.linear(rows, weight), stopwatch)
    algorithm, sparse = _fastest_algorithm(shape, packed, rows, stopwatch)
    samples = [(dense(), sparse()) for _ in range(_REPLAYS)]
    dense_us, sparse_us = (median(times) for times in zip(*samples, strict=True))
    return GemmTiming(shape, dense_us, sparse_us, algorithm)


def gpu_profile(dtype: DType) -> GpuProfile:
    """The empty profile of the GPU at hand."""
    pynvml.nvmlInit()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
    versions = {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "cusparselt": str(torch.backends.cusparselt.version()),
    }
    return GpuProfile(torch.cuda.get_device_name(), driver, dtype, versions, ())


def _fastest_algorithm(
    shape: GemmShape, packed: Tensor, rows: Tensor, stopwatch: cuda_graph.Stopwatch
) -> tuple[Algorithm, Timer]:
    """The fastest algorithm, then for few rows the fastest division of k with it."""

    def fastest(candidates: Iterable[Algorithm]) -> tuple[float, int, Algorithm, Timer]:
        timed = []
        for i, tried in enumerate(candidates):
            timer = _timer(partial(sparse_product, packed, rows, None, tried), stopwatch)
            timed.append((min(timer() for _ in range(_TRIALS)), i, tried, timer))
        return min(timed)

    _, _, algorithm, timer = fastest(_accepted(packed, rows))
    if shape.m > _SPLIT_ROWS:
        return algorithm, timer
    parts = [Algorithm(algorithm.number, k, mode) for k in _SPLITS for mode in _SPLIT_MODES]
    divided = (each for each in parts if _accepts(packed, rows, each))
    _, _, algorithm, timer = fastest([algorithm, *divided])
    return algorithm, timer


def _accepted(packed: Tensor, rows: Tensor) -> Iterator[Algorithm]:
    """The algorithms by number, up to the first that cuSPARSELt refuses; the default always."""
    yield Algorithm()
    for number in range(1, _MOST_ALGORITHMS):
        if not _accepts(packed, rows, Algorithm(number)):
            return
        yield Algorithm(number)


def _accepts(packed: Tensor, rows: Tensor, algorithm: Algorithm) -> bool:
    """Whether cuSPARSELt has the algorithm for this GEMM; found outside any capture."""
    try:
        sparse_product(packed, rows, None, algorithm)
    except RuntimeError as error:
        logger.debug("cuSPARSELt refuses %s: %s", algorithm, error)
        return False
    return True


def _timer(run: Callable[[], Tensor], stopwatch: cuda_graph.Stopwatch) -> Timer:
    """Capture one call; each use of the result replays it and returns microseconds."""
    captured = cuda_graph.capture(lambda: (run(),))
    return lambda: float(stopwatch.milliseconds(captured.replay, 1)[0]) * 1e3


def _pruned(weight: Tensor) -> Tensor:
    """Zeros in the last two places of each cell: any 2:4 pattern takes the same time."""
    cells = weight.clone().unflatten(1, (-1, 4))
    cells[..., 2:] = 0
    pruned: Tensor = cells.flatten(1)
    return pruned
