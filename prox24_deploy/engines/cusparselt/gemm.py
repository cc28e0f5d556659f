"""Time GEMMs on the GPU at hand: cuBLAS on the dense weight against cuSPARSELt on the 2:4 one.

Each time is that of one multiplication captured as a CUDA graph, with the L2 cache emptied before
it, so that every weight comes from memory as it does in a model. The algorithms of cuSPARSELt are
timed in the same way, for its own search was seen to end in an illegal instruction on Hopper.
"""

import logging
from collections.abc import Container, Sequence
from functools import partial
from statistics import median

import pynvml
import torch
from torch.nn import functional

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType, Progress
from prox24_deploy.engines.cusparselt import cuda_graph, trials
from prox24_deploy.engines.cusparselt import matmul as cusparselt_plan
from prox24_deploy.engines.cusparselt.choice import LayerChoice, choose, gemm_obstacle
from prox24_deploy.engines.cusparselt.gemm_job import gemm_inputs, multiply_padded, timer
from prox24_deploy.engines.cusparselt.linear import layer_uses
from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming, GpuProfile
from prox24_deploy.engines.cusparselt.torch_model import TorchModel
from prox24_deploy.engines.cusparselt.trials import Trial
from prox24_deploy.graph.export.module import TORCH_DTYPES

logger = logging.getLogger(__name__)


# The fastest algorithms by a few runs, timed again in turns with the dense multiplication.
_FINALISTS = 2
_REPLAYS = 15


def choose_measured(
    opened: TorchModel,
    shapes: Sequence[Shape],
    pruned: Container[str],
    known: GpuProfile,
    progress: Progress,
) -> tuple[tuple[LayerChoice, ...], GpuProfile]:
    """Time the GEMM of every layer in `pruned` at every shape, and choose by that.

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
    """Add to `profile` the shapes that it does not know yet.

    Raises:
        EngineError: cuSPARSELt cannot multiply one of them, or does not run at all.
    """
    missing = sorted({shape for shape in shapes if profile.known(shape) is None})
    if not missing:
        return profile
    kind = TORCH_DTYPES[dtype]
    everything = [
        Trial(shape, number)
        for shape in missing
        for number in range(cusparselt_plan.count_algorithms(shape.padded, kind))
    ]
    times = trials.run_trials(everything, dtype, partial(progress, "algorithm"))
    found = []
    for done, shape in enumerate(missing):
        progress("gemm", done, len(missing))
        mine = sorted((us, trial.algorithm) for trial, us in times.items() if trial.shape == shape)
        found.append(time_gemm(shape, kind, [number for _, number in mine[:_FINALISTS]]))
        logger.info("%s: speed-up %.2f", shape, found[-1].speedup)
    progress("gemm", len(missing), len(missing))
    return profile.with_timings(found)


@torch.inference_mode()
def time_gemm(shape: GemmShape, dtype: torch.dtype, algorithms: Sequence[int]) -> GemmTiming:
    """Time one GEMM dense and with each of `algorithms`, in turns; the fastest of them counts.

    Raises:
        EngineError: `algorithms` is empty, for cuSPARSELt has none that works.
    """
    if not algorithms:
        raise EngineError(f"cuSPARSELt has no algorithm that works for {shape}; leave it dense.")
    rows, weight, packed = gemm_inputs(shape, dtype)
    stopwatch = cuda_graph.Stopwatch()
    whole = shape.padded
    plans = [cusparselt_plan.shared_plan(whole, dtype, number, None) for number in algorithms]
    runs = [partial(functional.linear, rows, weight)]
    runs += [partial(multiply_padded, plan, packed, rows) for plan in plans]
    timers = [timer(run, stopwatch) for run in runs]
    samples = [[timed() for timed in timers] for _ in range(_REPLAYS)]
    dense_us, *sparse_us = (median(times) for times in zip(*samples, strict=True))
    fastest, number = min(zip(sparse_us, algorithms, strict=True))
    return GemmTiming(shape=shape, dense_us=dense_us, sparse_us=fastest, algorithm=number)


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
    return GpuProfile(
        gpu=torch.cuda.get_device_name(), driver=driver, dtype=dtype, versions=versions, gemms=()
    )
