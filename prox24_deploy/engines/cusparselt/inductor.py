"""Compile a module by torch.compile, for the shapes that it is timed at and for any other.

Inductor fuses what lies between the products, norms, rotary embeddings, activations and residuals,
in both twins alike; a sparse product is an operator that it takes as it is.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from prox24_deploy.core.documents import reason_of
from prox24_deploy.core.records import Compilation

Inputs = tuple[Tensor, ...]

# What torch.compile is to use.
BACKEND = "inductor"
# Graphs of one module: one for each shape that it is timed at, and for each of both twins.
_MOST_GRAPHS = 256
_HITS, _MISSES = "fxgraph_cache_hit", "fxgraph_cache_miss"


class CompiledModule:
    """A module as torch.compile makes it: a graph of its own for each of some shapes.

    Inputs of any other shape share one graph with dynamic shapes, which may be slower and is not
    made anew for each.

    Args:
        module: takes its inputs by position and returns a tuple.
        shapes: of all inputs, in order, once for each run that is to have its own graph.
    """

    def __init__(self, module: nn.Module, shapes: Sequence[tuple[torch.Size, ...]]) -> None:
        self._own = set(shapes)
        # No break of the graph: what Inductor cannot take is an error and not a slower twin.
        self._static = torch.compile(module, backend=BACKEND, fullgraph=True, dynamic=False)
        self._dynamic = torch.compile(module, backend=BACKEND, fullgraph=True, dynamic=True)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run, compiled before where this shape has not been."""
        own = tuple(tensor.shape for tensor in inputs) in self._own
        with _many_graphs():
            outputs: tuple[Tensor, ...] = (self._static if own else self._dynamic)(*inputs)
        return outputs

    def close(self) -> None:
        """Forget the graphs in memory, so that no later module is run by one of them."""
        torch.compiler.reset()


@torch.inference_mode()
def try_compiling(
    module: CompiledModule, runs: Sequence[Inputs], other: Inputs
) -> tuple[list[tuple[Tensor, ...]], Compilation]:
    """Compile for each of `runs`, and once with dynamic shapes for `other`.

    Returns:
        The outputs of `runs`, none if it does not compile, and how that went.
    """
    before, began = _cache_counts(), time.perf_counter()
    outputs, reason = [], ""
    try:
        outputs = [module(*inputs) for inputs in runs]
        module(*other)
    except Exception as error:
        # Whatever a compiler of graphs, of C++ and of kernels may run into.
        outputs, reason = [], _first_line(error)
    hits, misses = (now - then for now, then in zip(_cache_counts(), before, strict=True))
    return outputs, Compilation(
        seconds=time.perf_counter() - began, cached=hits, graphs=hits + misses, reason=reason
    )


def _cache_counts() -> tuple[int, int]:
    known: Any = counters["inductor"]
    return int(known[_HITS]), int(known[_MISSES])


def _first_line(error: Exception) -> str:
    lines = [line for line in reason_of(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".:")


@contextmanager
def _many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
        yield
