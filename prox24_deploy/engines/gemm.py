"""Time GEMMs on the GPU at hand: cuBLAS on the dense weight against cuSPARSELt on the 2:4 one.

Each time is that of one multiplication inside a CUDA graph over several copies of the weight, more
than the L2 cache holds, so that every weight comes from memory as it does in a model. Both twins
run in turns. The algorithms of cuSPARSELt are timed in the same way, for its own search has them
all in the cache.
"""

import logging
from collections.abc import Callable, Sequence

import pynvml
import torch
from torch import Tensor
from torch.nn import functional

from prox24_deploy.artifacts import DType
from prox24_deploy.engines.linear import sparse_product
from prox24_deploy.engines.profile import Algorithm, GemmShape, GemmTiming, GpuProfile
from prox24_deploy.graph.module import TORCH_DTYPES

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_MOST_COPIES = 48
_MOST_BYTES = 2 << 30
# Each call outside a replay costs a millisecond, so algorithms are tried on few copies.
_MOST_ALGORITHMS = 32
_TRIAL_COPIES, _TRIALS, _REPLAYS = 6, 3, 15
# Dividing k pays where there are few rows; the modes sum the parts in one kernel or in two.
_SPLIT_ROWS = 512
_SPLITS, _SPLIT_MODES = (2, 4, 8), (0, 1)


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
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cuda", dtype=dtype)

    rows = normal(shape.m, shape.k)
    weights = [normal(shape.n, shape.k) for _ in range(_copies(shape))]
    packed = [torch._cslt_compress(_pruned(weight)) for weight in weights]

    def dense() -> None:
        for weight in weights:
            functional.linear(rows, weight)

    def sparse(algorithm: Algorithm, copies: Sequence[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight in copies:
                sparse_product(weight, rows, None, algorithm)

        return run

    best = _best_algorithm(shape, packed, rows, sparse)
    times = [_capture(dense), _capture(sparse(best, packed))]
    samples: list[list[float]] = [[], []]
    for _ in range(_REPLAYS):
        for one, replay in zip(samples, times, strict=True):
            one.append(replay() / len(weights))
    dense_us, sparse_us = (sorted(one)[len(one) // 2] for one in samples)
    return GemmTiming(shape, dense_us, sparse_us, best)


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


def _best_algorithm(
    shape: GemmShape,
    packed: Sequence[Tensor],
    rows: Tensor,
    run: Callable[[Algorithm, Sequence[Tensor]], Callable[[], None]],
) -> Algorithm:
    """The fastest of cuSPARSELt's default and its neighbours; for few rows also with k divided."""
    candidates = [Algorithm()]
    for number in range(1, _MOST_ALGORITHMS):
        if not _accepts(packed[0], rows, Algorithm(number)):
            break
        candidates.append(Algorithm(number))
    trial = packed[:_TRIAL_COPIES]

    def fastest(tried: Sequence[Algorithm]) -> Algorithm:
        timed = [(_least_us(run(each, trial)), i) for i, each in enumerate(tried)]
        return tried[min(timed)[1]]

    best = fastest(candidates)
    if shape.m > _SPLIT_ROWS:
        return best
    divided = [Algorithm(best.number, k, mode) for k in _SPLITS for mode in _SPLIT_MODES]
    return fastest([best, *(each for each in divided if _accepts(packed[0], rows, each))])


def _accepts(packed: Tensor, rows: Tensor, algorithm: Algorithm) -> bool:
    """Whether cuSPARSELt has the algorithm for this GEMM; found outside any capture."""
    try:
        sparse_product(packed, rows, None, algorithm)
    except RuntimeError as error:
        logger.debug("cuSPARSELt refuses %s: %s", algorithm, error)
        return False
    return True


def _least_us(run: Callable[[], None]) -> float:
    replay = _capture(run)
    return min(replay() for _ in range(_TRIALS))


def _capture(run: Callable[[], None]) -> Callable[[], float]:
    """Capture `run` as a CUDA graph; the result replays it and returns its microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e3

    replay()
    return replay


def _copies(shape: GemmShape) -> int:
    """Copies of the weight that together exceed the L2 cache twice, compressed ones too."""
    compressed = shape.n * shape.k * 9 // 8
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    most = max(1, min(_MOST_COPIES, _MOST_BYTES // (2 * shape.n * shape.k)))
    return min(most, max(2, -(-2 * cache // compressed)))


def _pruned(weight: Tensor) -> Tensor:
    """Zeros in the last two places of each cell: any 2:4 pattern takes the same time."""
    cells = weight.clone().unflatten(1, (-1, 4))
    cells[..., 2:] = 0
    pruned: Tensor = cells.flatten(1)
    return pruned
