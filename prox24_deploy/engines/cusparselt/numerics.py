"""What a twin computes against what it must: outputs as a whole, and 8-bit layers one by one.

Where layers round what they read to 8 bits, outputs alone do not tell. A value between two numbers
may fall either way in two kernels that are both right, and a small model makes much of it. So each
layer is held to its numbers on what it reads itself, and outputs to what last bits make of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.core.records import NumericsCheck
from prox24_deploy.core.types import DType
from prox24_deploy.engines.cusparselt.quantized import multiplied
from prox24_deploy.model.layers import layer_at, to_matrix
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel

# Largest difference to the same weights multiplied dense, as a share of the largest output.
OUTPUT_TOLERANCES: dict[DType, float] = {"float16": 2e-2, "bfloat16": 1e-1}
# The same of one layer to the products of its 8-bit numbers in float32. FP8 is summed in less.
LAYER_TOLERANCE = 2e-2
# Outputs behind 8-bit inputs may differ by so many times what last bits of these move them by, and
# by no more than this share of the largest: beyond it no output would be too far.
_MOVED_TOLERANCE, _MOST = 2.0, 0.5


def compare_outputs(
    names: Sequence[str],
    expected: Sequence[Sequence[Tensor]],
    found: Sequence[Sequence[Tensor]],
    dtype: DType,
    nudged: Sequence[Sequence[Tensor]] = (),
) -> tuple[NumericsCheck, ...]:
    """Compare outputs of the compressed model with those of the same weights multiplied dense.

    Args:
        names: of the outputs.
        expected: outputs of each run of the dense multiplication.
        found: the same of the compressed one.
        dtype: decides the tolerance, a share of the largest magnitude of the output.
        nudged: what the dense multiplication gives within `nudged_inputs`, if layers multiply in
            8 bits; the tolerance is then at least what that shows.

    Returns:
        One check per output over all runs.
    """
    checks = []
    for i, name in enumerate(names):
        pairs = [(a[i].float(), b[i].float()) for a, b in zip(expected, found, strict=True)]
        difference, largest = _farthest(pairs), max(_largest(a) for a, _ in pairs)
        tolerance = OUTPUT_TOLERANCES[dtype] * largest
        if nudged:
            off = [a[i].float() for a in nudged]
            moved = _farthest([(a, b) for (a, _), b in zip(pairs, off, strict=True)])
            # What turns infinite says nothing about how far an output may be off.
            if math.isfinite(moved):
                tolerance = max(tolerance, min(_MOVED_TOLERANCE * moved, _MOST * largest))
        checks.append(
            NumericsCheck(
                twin="sparse",
                output=name,
                shapes=tuple(tuple(a.shape) for a, _ in pairs),
                max_abs_difference=difference,
                tolerance=tolerance,
                passed=difference <= tolerance,
            )
        )
    return tuple(checks)


@contextmanager
def nudged_inputs(model: nn.Module, quantized: QuantizedModel) -> Iterator[None]:
    """Let what quantised layers read be off in its last bit, up or down at random, while it lasts.

    Where a value lies between two numbers, that decides to which it is rounded, as another kernel
    for what comes before does.
    """
    hooks = [
        layer_at(model, name).register_forward_pre_hook(_nudge(seed), prepend=True)
        for seed, name in enumerate(quantized.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nudge(seed: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read = given[0]
        up = torch.randint(2, read.shape, generator=draw).to(read.device) * 2 - 1
        return read * (1 + torch.finfo(read.dtype).eps * up).to(read.dtype), *given[1:]

    return hook


@dataclass(frozen=True, slots=True)
class _Numbers:
    """One layer: what it multiplies, its weight as a matrix (n, k), and its bias."""

    stored: QuantizedLayer
    matrix: Tensor
    bias: Tensor | None

    def products(self, read: Tensor) -> Tensor:
        """What the layer must give, in float32 rounded to the dtype of what it reads."""
        numbers = to_numbers(read, self.stored.input_scale, self.matrix.dtype).float()
        factor = self.stored.weight_scale.to(read.device).float() * self.stored.input_scale
        values = numbers @ self.matrix.to(read.device).float().T * factor
        return (values if self.bias is None else values + self.bias.float()).to(read.dtype)


class LayerNumbers:
    """What the layers of a model that multiply 8-bit numbers must give for what they read.

    Args:
        model: before its layers are replaced, for their kind says how a weight lies.
        quantized: what they multiply.
    """

    def __init__(self, model: nn.Module, quantized: QuantizedModel) -> None:
        self._layers = {}
        for name in multiplied(model, quantized):
            layer, stored = layer_at(model, name), quantized.layers[name]
            self._layers[name] = _Numbers(stored, to_matrix(layer, stored.weight), layer.bias)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Mapping[str, float]]:
        """Hold each layer to its numbers whenever it runs.

        Yields:
            By layer that ran, its largest difference as a share of its largest output.
        """
        off: dict[str, float] = {}
        hooks = [
            # In front of that which rounds what the layer gives.
            model.get_submodule(name).register_forward_hook(_watch(name, layer, off), prepend=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield off
        finally:
            for hook in hooks:
                hook.remove()


def _watch(
    name: str, layer: _Numbers, off: dict[str, float]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        must = layer.products(given[0]).float()
        share = _farthest([(must, made.float())]) / max(_largest(must), 1e-30)
        # A NaN is not smaller than anything, and stays.
        if not share <= off.get(name, 0.0):
            off[name] = share
        off.setdefault(name, share)

    return hook


def _farthest(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest difference within any pair; by tensors, for Python's max passes over a NaN."""
    return float(torch.stack([_distance(a, b) for a, b in pairs]).max())


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Largest difference; a NaN stays one, and the same infinity on both sides is no difference."""
    apart = torch.where(first == second, 0.0, first - second).abs()
    return apart.max() if apart.numel() else apart.new_zeros(())


def _largest(tensor: Tensor) -> float:
    """Largest finite magnitude; 0 of nothing."""
    finite = torch.where(tensor.isfinite(), tensor, 0.0).abs()
    return float(finite.max()) if finite.numel() else 0.0
