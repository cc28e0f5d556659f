"""Which GPU kernels each layer runs, as the PyTorch profiler sees them."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from prox24_deploy.core.errors import EngineError

# Names of cuSPARSELt's and TensorRT's sparse kernels, such as sm80_xmma_sparse_gemm_f16f16_....
SPARSE_KERNEL = re.compile(r"sparse|spmma|sptensor", re.IGNORECASE)
_MARK = "layer "


@torch.inference_mode()
def kernels_by_layer(
    model: nn.Module, names: Sequence[str], run: Callable[[], object]
) -> dict[str, tuple[str, ...]]:
    """Run once, outside any CUDA graph, and name the kernels that each layer of `model` launched.

    Raises:
        EngineError: the profiler saw no kernel at all, as where its driver interface is locked.
    """
    run()
    with (
        _marked(model, names),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
    ):
        run()
        torch.cuda.synchronize()
    found: dict[str, list[str]] = {name: [] for name in names}
    for event in profiler.events() or ():
        name = event.name.removeprefix(_MARK)
        if event.name.startswith(_MARK) and name in found:
            found[name] += _kernels_under([event])
    if not any(found.values()):
        raise EngineError(
            "The PyTorch profiler saw no GPU kernel, so nothing shows which layers run sparse; "
            "allow access to the GPU's performance counters or profile outside this container."
        )
    return {name: tuple(dict.fromkeys(kernels)) for name, kernels in found.items()}


def sparse_kernels(kernels: Iterable[str]) -> tuple[str, ...]:
    """Those of the kernels that run on sparse tensor cores, by name."""
    return tuple(kernel for kernel in kernels if SPARSE_KERNEL.search(kernel))


@contextmanager
def _marked(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Open a profiler range around each named layer."""
    ranges: dict[str, record_function] = {}

    def enter(name: str) -> None:
        ranges[name] = record_function(f"{_MARK}{name}")
        ranges[name].__enter__()

    def leave(name: str) -> None:
        ranges.pop(name).__exit__(None, None, None)

    hooks = []
    for name in names:
        layer = model.get_submodule(name)
        hooks += [
            layer.register_forward_pre_hook(lambda *_, name=name: enter(name)),
            layer.register_forward_hook(lambda *_, name=name: leave(name)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kernels_under(events: Iterable[FunctionEvent]) -> Iterator[str]:
    for event in events:
        yield from (kernel.name for kernel in event.kernels)
        yield from _kernels_under(event.cpu_children)
