"""Make a twin ready to run: its layers compressed, compiled, and held against what it must give."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.records import Compilation, NumericsCheck
from prox24_deploy.engines.base import Feeds
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.inductor import CompiledModule, try_compiling
from prox24_deploy.engines.cusparselt.linear import replace_layers
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, compare_outputs

log = logging.getLogger(__name__)

ASKED = "--eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A twin that is ready.

    Attributes:
        opened: the model, its chosen layers compressed.
        compiled: the same for torch.compile; None where it runs kernel by kernel.
        compilation: how that went.
        numerics: outputs at all shapes against those of the same weights multiplied dense.
        last: inputs at the last of the shapes.
    """

    opened: TorchModel
    compiled: CompiledModule | None
    compilation: Compilation
    numerics: tuple[NumericsCheck, ...]
    last: Feeds

    @torch.inference_mode()
    def run_last(self) -> tuple[Tensor, ...]:
        """Outputs at the last of the shapes."""
        return (self.compiled or self.opened.module)(*self.opened.inputs(self.last))

    def close(self) -> None:
        """Forget what was compiled."""
        if self.compiled:
            self.compiled.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Forget what was compiled."""
        self.close()


def prepare(
    opened: TorchModel,
    shapes: Sequence[tuple[int, int]],
    choices: Sequence[LayerChoice],
    *,
    eager: bool,
) -> Prepared:
    """Compress the chosen layers of a model in place, and compile it.

    A model that does not compile, or computes something else once it is, runs as it is, with the
    reason.

    Args:
        opened: half precision, on the GPU.
        shapes: (batch, sequence) to compile for.
        choices: the layers to compress are marked as chosen; none for the dense twin.
        eager: do not compile.

    Raises:
        EngineError: sparse outputs differ by more than the tolerance of the dtype, by name.
    """
    # The last stands for every shape that has no graph of its own.
    feeds = [opened.feeds(shape) for shape in (*shapes, _other(shapes))]
    expected = [opened.run(one) for one in feeds]
    numerics: tuple[NumericsCheck, ...] = ()
    if chosen := {c.name: c.algorithms for c in choices if c.chosen}:
        replace_layers(opened.wrapped, chosen)
        numerics = _compare(opened, expected, [opened.run(one) for one in feeds])
    if wrong := _wrong(numerics):
        raise EngineError(
            f"Output {wrong.output} of the compressed model differs from the same weights "
            f"multiplied dense by {wrong.max_abs_difference:.3g}, tolerance "
            f"{wrong.tolerance:.3g}; cuSPARSELt computes something else on this GPU."
        )
    compiled, compilation = None, Compilation(reason=ASKED)
    if not eager:
        compiled, compilation, checks = _compile(opened, shapes, feeds, expected)
        numerics = checks or numerics
    return Prepared(
        opened=opened,
        compiled=compiled,
        compilation=compilation,
        numerics=numerics,
        last=feeds[len(shapes) - 1],
    )


def _compile(
    opened: TorchModel,
    shapes: Sequence[tuple[int, int]],
    feeds: Sequence[Feeds],
    expected: Sequence[tuple[Tensor, ...]],
) -> tuple[CompiledModule | None, Compilation, tuple[NumericsCheck, ...]]:
    """Compile a model and compare what it then computes; where it is no use, only the reason."""
    compiled = opened.compiled(shapes)
    outputs, compilation = try_compiling(compiled, [opened.inputs(one) for one in feeds])
    checks = _compare(opened, expected, outputs) if outputs else ()
    if wrong := _wrong(checks):
        compilation = replace(
            compilation,
            reason=f"compiled, output {wrong.output} differs by {wrong.max_abs_difference:.3g}, "
            f"tolerance {wrong.tolerance:.3g}",
        )
    if not compilation.reason:
        return compiled, compilation, checks
    log.warning("An engine runs without torch.compile: %s", compilation.reason)
    compiled.close()
    return None, compilation, ()


def _compare(
    opened: TorchModel,
    expected: Sequence[tuple[Tensor, ...]],
    found: Sequence[tuple[Tensor, ...]],
) -> tuple[NumericsCheck, ...]:
    return compare_outputs(opened.output_names, expected, found, opened.dtype)


def _wrong(checks: Sequence[NumericsCheck]) -> NumericsCheck | None:
    return next((check for check in checks if not check.passed), None)


def _other(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """A shape that is none of these; sizes of 1 would get a graph for that size alone."""
    batch, sequence = max(shapes)
    tried = [(max(batch, 2), max(2, sequence // 2 + 1) if sequence else 0), (batch + 1, sequence)]
    return next((shape for shape in tried if shape not in shapes), (batch + 2, sequence))
