"""Make a twin ready to run: its layers compressed, compiled, and held against what it must give."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.records import Compilation, NumericsCheck
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType
from prox24_deploy.engines.base import Feeds
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.compile_trial import try_elsewhere
from prox24_deploy.engines.cusparselt.inductor import CompiledModule, try_compiling
from prox24_deploy.engines.cusparselt.numerics import (
    LAYER_TOLERANCE,
    LayerNumbers,
    compare_outputs,
    nudged_inputs,
)
from prox24_deploy.engines.cusparselt.quantized import multiply_as
from prox24_deploy.engines.cusparselt.torch_model import TorchModel
from prox24_deploy.quantization.tensors import QuantizedModel, apply_inputs

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
        return (self.compiled or self.opened.runner)(*self.opened.inputs(self.last))

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


@dataclass(frozen=True, slots=True)
class _Reference:
    """What a twin must compute.

    Attributes:
        feeds: inputs.
        outputs: of each.
        dtype: that outputs may be rounded to.
        nudged: outputs where what 8-bit layers read is off in its last bit; empty without such.
        layers: what each of those must give; None without such.
    """

    feeds: Sequence[Feeds]
    outputs: Sequence[tuple[Tensor, ...]]
    dtype: DType
    nudged: Sequence[tuple[Tensor, ...]] = ()
    layers: LayerNumbers | None = None

    def compare(
        self, names: Sequence[str], found: Sequence[tuple[Tensor, ...]]
    ) -> tuple[NumericsCheck, ...]:
        """One check for each output."""
        return compare_outputs(names, self.outputs, found, self.dtype, self.nudged)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Hold 8-bit layers to their numbers in all that runs within it.

        Raises:
            EngineError: one gives something else, by name.
        """
        if self.layers is None:
            yield
            return
        with self.layers.watch(model) as off:
            yield
        if wrong := [name for name, share in off.items() if not share <= LAYER_TOLERANCE]:
            raise EngineError(
                f"Layer {wrong[0]} of the compressed model differs from the products of its own "
                f"8-bit numbers by {off[wrong[0]]:.3g} of its largest output, tolerance "
                f"{LAYER_TOLERANCE}; cuSPARSELt or cuBLAS computes something else on this GPU."
            )


def prepare(
    opened: TorchModel,
    shapes: Sequence[Shape],
    choices: Sequence[LayerChoice],
    *,
    eager: bool,
    quantized: QuantizedModel | None = None,
) -> Prepared:
    """Compress the chosen layers of a model in place, let quantised ones multiply, and compile it.

    It is compiled in a process of its own first. A model that does not compile, or whose compiler
    crashes or hangs, or that computes something else once it is compiled, runs as it is, with the
    reason.

    Args:
        opened: half precision, on the GPU.
        shapes: those to compile for.
        choices: the layers to compress are marked as chosen; none for the dense twin.
        eager: do not compile.
        quantized: what layers are to multiply in 8 bits, whose values the model has; outputs are
            then held against those of the same numbers multiplied in 16 bits, within what last
            bits of inputs make of those.

    Raises:
        EngineError: sparse outputs differ by more than the tolerance of the dtype, by name.
    """
    chosen = {c.name: c.algorithms for c in choices if c.chosen}
    # While the layers are dense still: compressed ones are known by where they lie.
    trial = Compilation(reason=ASKED) if eager else try_elsewhere(opened, shapes, chosen, quantized)
    if quantized:
        apply_inputs(opened.wrapped, quantized)
    reference = _reference(opened, shapes, quantized)
    multiply_as(opened.wrapped, chosen, quantized)
    changed = bool(chosen or quantized) or _decodes(shapes)
    numerics = _checked(opened, reference) if changed else ()
    compiled, compilation = None, trial
    if not trial.reason:
        compiled, compilation, checks = _compile(opened, shapes, reference)
        compilation = _together(trial, compilation)
        numerics = checks or numerics
    if compilation.reason and not eager:
        log.warning("An engine runs without torch.compile: %s", compilation.reason)
    return Prepared(
        opened=opened,
        compiled=compiled,
        compilation=compilation,
        numerics=numerics,
        last=reference.feeds[len(shapes) - 1],
    )


def _reference(
    opened: TorchModel, shapes: Sequence[Shape], quantized: QuantizedModel | None
) -> _Reference:
    feeds = opened.trial_feeds(shapes)
    outputs = [opened.run(one) for one in feeds]
    if not quantized:
        return _Reference(feeds, outputs, opened.dtype)
    with nudged_inputs(opened.wrapped, quantized):
        nudged = [opened.run(one) for one in feeds]
    # Products of 8-bit numbers are rounded to that.
    return _Reference(feeds, outputs, "bfloat16", nudged, LayerNumbers(opened.wrapped, quantized))


def _compile(
    opened: TorchModel, shapes: Sequence[Shape], reference: _Reference
) -> tuple[CompiledModule | None, Compilation, tuple[NumericsCheck, ...]]:
    """Compile a model and compare what it then computes; where it is no use, only the reason."""
    compiled = opened.compiled(shapes)
    runs = [opened.inputs(one) for one in reference.feeds]
    outputs, compilation = try_compiling(compiled, runs)
    found = [opened.trim(*pair) for pair in zip(runs, outputs, strict=False)]
    checks = reference.compare(opened.output_names, found) if found else ()
    if wrong := _wrong(checks):
        compilation = replace(
            compilation,
            reason=f"compiled, output {wrong.output} differs by {wrong.max_abs_difference:.3g}, "
            f"tolerance {wrong.tolerance:.3g}",
        )
    if not compilation.reason:
        return compiled, compilation, checks
    compiled.close()
    return None, compilation, ()


def _together(trial: Compilation, compilation: Compilation) -> Compilation:
    """One account of both: what the trial compiled was in the cache only because of it."""
    seconds = trial.seconds + compilation.seconds
    counted = trial if trial.graphs else compilation
    return replace(counted, seconds=seconds, reason=compilation.reason)


def _checked(opened: TorchModel, reference: _Reference) -> tuple[NumericsCheck, ...]:
    """Outputs of an engine kernel by kernel against those expected; they must be the same."""
    with reference.watch(opened.wrapped):
        found = [opened.run_as_engine(one) for one in reference.feeds]
    numerics = reference.compare(opened.output_names, found)
    if wrong := _wrong(numerics):
        raise EngineError(
            f"Output {wrong.output} of the compressed model differs from the same weights "
            f"multiplied dense by {wrong.max_abs_difference:.3g}, tolerance "
            f"{wrong.tolerance:.3g}; cuSPARSELt computes something else on this GPU, or a step "
            "of decoding in static buffers does; leave --shapes past out to tell which."
        )
    return numerics


def _decodes(shapes: Sequence[Shape]) -> bool:
    return any(shape.past for shape in shapes)


def _wrong(checks: Sequence[NumericsCheck]) -> NumericsCheck | None:
    return next((check for check in checks if not check.passed), None)
