"""Time GEMMs on the GPU at hand: cuBLAS on the dense weight against cuSPARSELt on the 2:4 one.

Each time is that of one of several multiplications in a row, captured as one CUDA graph, each by a
weight of its own and with the L2 cache emptied before, so that every weight comes from memory and
kernels follow each other as they do in a model. Alone, a kernel of a few microseconds would seem to
take several more. The algorithms of cuSPARSELt are timed too, one multiplication each, for its own
search was seen to end in an illegal instruction on Hopper.
"""

import logging
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from functools import partial
from statistics import median

import pynvml
import torch
from torch import Tensor
from torch.nn import functional

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Progress
from prox24_deploy.engines.cusparselt import cuda_graph, trials
from prox24_deploy.engines.cusparselt import matmul as cusparselt_plan
from prox24_deploy.engines.cusparselt.choice import LayerChoice, choose, gemm_obstacle
from prox24_deploy.engines.cusparselt.formats import OPERANDS, sparse_shape
from prox24_deploy.engines.cusparselt.gemm_job import gemm_inputs, sparse_run, timer
from prox24_deploy.engines.cusparselt.linear import LayerUse, layer_uses
from prox24_deploy.engines.cusparselt.profile import (
    GemmFormat,
    GemmShape,
    GemmTiming,
    GpuProfile,
    half_format,
)
from prox24_deploy.engines.cusparselt.quantized import linear_8
from prox24_deploy.engines.cusparselt.torch_model import TorchModel
from prox24_deploy.engines.cusparselt.trials import Trial

logger = logging.getLogger(__name__)


# The fastest algorithms by a few runs, timed again in turns with the dense multiplication.
_FINALISTS = 2
_REPLAYS = 15
# Bytes of a copy, far more than a cache holds.
_COPIED = 2**29
# Multiplications in a row.
_IN_A_ROW = 4


def choose_measured(
    opened: TorchModel,
    shapes: Sequence[Shape],
    pruned: Collection[str],
    known: GpuProfile,
    progress: Progress,
    eight_bit: Mapping[str, GemmFormat] | None = None,
) -> tuple[tuple[LayerChoice, ...], GpuProfile]:
    """Time the GEMM of every layer in `pruned` at every shape, and choose by that.

    Args:
        opened: the model.
        shapes: to time at.
        pruned: layers that are 2:4.
        known: what was measured before.
        progress: called with (label, done, total).
        eight_bit: format of each layer that multiplies 8-bit numbers, dense or 2:4.

    Returns:
        A choice for every layer of the model, and `known` with what was measured.
    """
    uses, profile, eight = uses_at(opened, shapes), known, eight_bit or {}
    choices: list[LayerChoice] = []
    for format in (half_format(opened.dtype), *sorted(set(eight.values()))):
        own = [use for use in uses if eight.get(use.name, half_format(opened.dtype)) == format]
        profile = measure_layers(profile, own, pruned, format, progress)
        choices += choose(own, profile, pruned, format)
    order = {use.name: number for number, use in enumerate(uses)}
    return tuple(sorted(choices, key=lambda choice: order[choice.name])), profile


def uses_at(opened: TorchModel, shapes: Sequence[Shape]) -> tuple[LayerUse, ...]:
    """The GEMMs of every layer of a model at every shape."""
    feeds = [opened.feeds(shape) for shape in shapes]
    return layer_uses(opened.wrapped, [partial(opened.run, one) for one in feeds])


def measure_layers(
    profile: GpuProfile,
    uses: Sequence[LayerUse],
    names: Container[str],
    format: GemmFormat,
    progress: Progress,
    algorithms: Container[int] | None = None,
) -> GpuProfile:
    """Add to `profile` the GEMMs of the named layers in a format, where it has kernels for them."""
    timed = [use for use in uses if use.name in names and not gemm_obstacle(use, format)]
    gemms = [gemm for use in timed for gemm in use.gemms]
    return measure_gemms(profile, gemms, format, progress, algorithms)


def measure_gemms(
    profile: GpuProfile,
    shapes: Sequence[GemmShape],
    format: GemmFormat,
    progress: Progress,
    algorithms: Container[int] | None = None,
) -> GpuProfile:
    """Add to `profile` the shapes that it does not know yet in a format.

    Args:
        profile: of the GPU at hand.
        shapes: of the GEMMs; some may be the same.
        format: of their operands.
        progress: called with (label, done, total).
        algorithms: numbers of those of cuSPARSELt to try; None tries all.

    Raises:
        EngineError: cuSPARSELt cannot multiply one of them, or does not run at all.
    """
    missing = sorted({shape for shape in shapes if profile.known(shape, format) is None})
    if not missing:
        return profile
    kind = OPERANDS[format].dtype
    everything = [
        Trial(shape, number)
        for shape in missing
        for number in range(cusparselt_plan.count_algorithms(sparse_shape(shape, format), kind))
        if algorithms is None or number in algorithms
    ]
    times = trials.run_trials(everything, format, partial(progress, "algorithm"))
    found = []
    for done, shape in enumerate(missing):
        progress("gemm", done, len(missing))
        mine = sorted((us, trial.algorithm) for trial, us in times.items() if trial.shape == shape)
        found.append(time_gemm(shape, format, [number for _, number in mine[:_FINALISTS]]))
        logger.info("%s in %s: speed-up %.2f", shape, format, found[-1].speedup)
    progress("gemm", len(missing), len(missing))
    return profile.with_timings(found)


@torch.inference_mode()
def time_gemm(shape: GemmShape, format: GemmFormat, algorithms: Sequence[int]) -> GemmTiming:
    """Time one GEMM dense and with each of `algorithms`, in turns; the fastest of them counts.

    Raises:
        EngineError: `algorithms` is empty, for cuSPARSELt has none that works.
    """
    if not algorithms:
        raise EngineError(f"cuSPARSELt has no algorithm that works for {shape}; leave it dense.")
    rows, weight, packed = gemm_inputs(shape, format)
    stopwatch = cuda_graph.Stopwatch()
    asked, kind = sparse_shape(shape, format), rows.dtype
    plans = [cusparselt_plan.shared_plan(asked, kind, number, None) for number in algorithms]
    copies = [packed, *(packed.clone() for _ in range(1, _IN_A_ROW))]
    weights = [weight, *(weight.clone() for _ in range(1, _IN_A_ROW))]
    runs = [_in_a_row([_dense(rows, one) for one in weights])]
    runs += [_in_a_row([sparse_run(plan, one, rows, format) for one in copies]) for plan in plans]
    timers = [timer(run, stopwatch) for run in runs]
    samples = [[timed() / _IN_A_ROW for timed in timers] for _ in range(_REPLAYS)]
    dense_us, *sparse_us = (median(times) for times in zip(*samples, strict=True))
    fastest, number = min(zip(sparse_us, algorithms, strict=True))
    return GemmTiming(
        shape=shape, format=format, dense_us=dense_us, sparse_us=fastest, algorithm=number
    )


def _in_a_row(runs: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    return lambda: [run() for run in runs][-1]


def _dense(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The dense product, without the scales of 8-bit numbers, which other kernels take along."""
    if rows.dtype.itemsize == 2:
        return partial(functional.linear, rows, weight)
    return partial(linear_8, rows, weight, torch.ones((), device=rows.device))


def copy_rate() -> float:
    """Bytes read and written per microsecond where a large tensor is copied on the GPU at hand."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=cuda_graph.DEVICE)
    target = torch.empty_like(source)

    def copied() -> None:
        target.copy_(source)

    times = cuda_graph.Stopwatch().milliseconds(copied, _REPLAYS)
    return 2 * _COPIED / (1e3 * float(median(times)))


def gpu_profile() -> GpuProfile:
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
    return GpuProfile(gpu=torch.cuda.get_device_name(), driver=driver, versions=versions, gemms=())
