"""Compile a module by torch.compile, for the shapes that it is timed at and for any other.

Inductor fuses what lies between the products, norms, rotary embeddings, activations and residuals,
in both twins alike; a sparse product is an operator that it takes as it is.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from prox24_deploy.core.documents import reason_of
from prox24_deploy.core.records import Compilation
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt.sharing import ShareEqual

Inputs = tuple[Tensor, ...]

# What torch.compile is to use.
BACKEND = "inductor"
_SHARING = ShareEqual()
# Graphs of one module: one for each shape that it is timed at, and for each of both twins.
_MOST_GRAPHS = 256


class CompiledModule:
    """A module as torch.compile makes it: a graph of its own for each of some shapes.

    Inputs of any other shape share one graph with dynamic shapes, which may be slower; only sizes
    of 1 get another.

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
        with (
            # A scale of a quantised layer is a constant of the graph and no input of it.
            torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, specialize_float=True),
            torch._inductor.config.patch(post_grad_custom_pre_pass=_SHARING),
        ):
            outputs: tuple[Tensor, ...] = (self._static if own else self._dynamic)(*inputs)
        return outputs

    def close(self) -> None:
        """Forget the graphs in memory, so that no later module is run by one of them.

        torch can only forget those of the whole process; what else was compiled there is compiled
        again when it next runs.
        """
        torch.compiler.reset()


@torch.inference_mode()
def try_compiling(
    module: CompiledModule, runs: Sequence[Inputs]
) -> tuple[list[tuple[Tensor, ...]], Compilation]:
    """Compile for each of `runs`.

    Returns:
        The outputs of `runs`, none if it does not compile, and how that went.
    """
    before, began = _counts(), time.perf_counter()
    outputs, reason = [], ""
    try:
        outputs = [module(*inputs) for inputs in runs]
    except Exception as error:
        # Whatever a compiler of graphs, of C++ and of kernels may run into.
        outputs, reason = [], reason_of(error)
    graphs, cached = (now - then for now, then in zip(_counts(), before, strict=True))
    return outputs, Compilation(
        seconds=time.perf_counter() - began, cached=cached, graphs=graphs, reason=reason
    )


def with_another(shapes: Sequence[Shape]) -> list[Shape]:
    """Every shape to run: these, and last one of each kind for the graph of all other shapes.

    Kinds are steps of decoding and all else. Sizes of 1 would get a graph for that size alone.
    """
    most = max(shape for shape in shapes if not shape.past)
    halved = max(2, most.sequence // 2 + 1) if most.sequence else 0
    tried = [
        Shape(batch=max(most.batch, 2), sequence=halved),
        Shape(batch=most.batch + 1, sequence=most.sequence),
        Shape(batch=most.batch + 2, sequence=most.sequence),
    ]
    found = [*shapes, next(shape for shape in tried if shape not in shapes)]
    if steps := [shape for shape in shapes if shape.past]:
        last = max(steps)
        found.append(Shape(batch=last.batch + 1, sequence=1, past=last.past // 2 + 1))
    return found


def _counts() -> tuple[int, int]:
    """Graphs that were made in this process, and how many of them came from Inductor's cache."""
    known: Any = counters
    return int(known["stats"]["unique_graphs"]), int(known["inductor"]["fxgraph_cache_hit"])
