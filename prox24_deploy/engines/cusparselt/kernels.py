"""Which GPU kernels each sparse product runs, as the PyTorch profiler sees them."""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt.linear import OPERATOR, PRODUCT_MARK

# Names of cuSPARSELt's and TensorRT's sparse kernels, such as sm80_xmma_sparse_gemm_f16f16_....
SPARSE_KERNEL = re.compile(r"sparse|spmma|sptensor", re.IGNORECASE)


@torch.inference_mode()
def kernels_by_layer(run: Callable[[], object]) -> dict[str, tuple[str, ...]]:
    """Run once, outside any CUDA graph, and name the kernels of each sparse product.

    Returns:
        Path of each layer that `linear` multiplied sparse, and its kernels.

    Raises:
        EngineError: the profiler saw no kernel at all, as where its driver interface is locked.
    """
    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = list(profiler.events() or ())
    found: dict[str, list[str]] = {}
    for event in events:
        if event.name == OPERATOR:
            # The profiler gives a kernel to the operator that launched it and not to ranges in it.
            for layer in _layers_under(event.cpu_children):
                found.setdefault(layer, []).extend(_kernels_under([event]))
    if not any(event.kernels for event in events):
        raise EngineError(
            "The PyTorch profiler saw no GPU kernel, so nothing shows which layers run sparse; "
            "allow access to the GPU's performance counters or profile outside this container."
        )
    return {name: tuple(dict.fromkeys(kernels)) for name, kernels in found.items()}


def sparse_kernels(kernels: Iterable[str]) -> tuple[str, ...]:
    """Those of the kernels that run on sparse tensor cores, by name."""
    return tuple(kernel for kernel in kernels if SPARSE_KERNEL.search(kernel))


def _layers_under(events: Iterable[FunctionEvent]) -> Iterator[str]:
    for event in events:
        if event.name.startswith(PRODUCT_MARK):
            yield event.name.removeprefix(PRODUCT_MARK)
        yield from _layers_under(event.cpu_children)


def _kernels_under(events: Iterable[FunctionEvent]) -> Iterator[str]:
    for event in events:
        yield from (kernel.name for kernel in event.kernels)
        yield from _kernels_under(event.cpu_children)
