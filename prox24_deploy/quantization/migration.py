"""Move the scales of input channels out of the inputs of a layer, into what comes before it.

Where a few channels are far larger than the others, one scale for all wastes most numbers on them.
Divided by a factor of each channel in what makes the inputs, and multiplied by it in the weight
that reads them, the function stays what it was (Xiao et al., "SmoothQuant", arXiv 2211.10438). Here
factors are powers of two, so that nothing is rounded, and what comes before a layer is found by
trial: a place that leaves the output of the block as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.model.layers import is_layer

# A factor is at most this, and at least one over it.
_MOST_FACTOR = 64.0
# Of the largest output of a block; what is not the same function is far off.
_TOLERANCE = 1e-4
STRENGTHS = (0.5, 0.65, 0.8)


@dataclass(frozen=True, slots=True)
class Place:
    """A module that makes the inputs of a layer, by its path in the block."""

    path: str
    module: nn.Module

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What its outputs are proportional to: weight and, if there is one, bias, by name."""
        found = [(name, getattr(self.module, name, None)) for name in ("weight", "bias")]
        return [(name, p) for name, p in found if isinstance(p, nn.Parameter)]

    def divide(self, factors: Tensor) -> None:
        """Make its output channels smaller by these factors, (d,)."""
        for _, parameter in self.parameters:
            parameter.div_(factors.reshape(-1, *[1] * (parameter.ndim - 1)))


def migration_factors(largest: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Powers of two by which to divide input channels.

    Args:
        largest: (d,), magnitude of each channel.
        weight: (n, d), of all layers that read them.
        strength: 0 leaves all to the weight, 1 takes all from it.
    """
    columns = weight.abs().amax(0)
    usable = (largest > 0) & (columns > 0)
    wanted = largest.pow(strength) / columns.clamp(min=1e-12).pow(1 - strength)
    # Around their middle, so that neither inputs nor weights grow as a whole.
    middle = wanted[usable].log2().median() if bool(usable.any()) else 0.0
    exponent = torch.where(usable, wanted.clamp(min=1e-30).log2() - middle, 0.0).round()
    return torch.exp2(exponent).clamp(1 / _MOST_FACTOR, _MOST_FACTOR)


@torch.no_grad()
def place_before(
    block: nn.Module, readers: Sequence[nn.Module], width: int, run: Callable[[], Tensor]
) -> Place | None:
    """The module of a block whose output channels are those that `readers` read; None if unknown.

    Args:
        block: that all are in.
        readers: linear layers with `width` inputs, all that share them.
        width: d.
        run: a forward pass of the block.
    """
    expected = run()
    allowed = _TOLERANCE * float(expected.abs().amax())
    factors = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(-(-width // 4))[:width]
    for place in _places(block, readers, width):
        with _tried(place, readers, factors.to(expected.device)):
            found = run()
        if bool(torch.isfinite(found).all()) and float((found - expected).abs().amax()) <= allowed:
            return place
    return None


def multiply_columns(readers: Sequence[nn.Module], factors: Tensor) -> None:
    """Make up in linear layers for inputs divided by `factors`, (d,)."""
    for reader in readers:
        weight: Tensor = reader.weight  # type: ignore[assignment]
        weight.mul_(factors if isinstance(reader, nn.Linear) else factors[:, None])


def _places(block: nn.Module, readers: Sequence[nn.Module], width: int) -> Iterator[Place]:
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or any(module is each for each in readers):
            continue
        # A norm has one number for a channel, and a linear layer one row.
        norm = weight.ndim == 1 and not is_layer(module)
        if len(weight) == width and (norm or isinstance(module, nn.Linear)):
            yield Place(path, module)


@contextmanager
def _tried(place: Place, readers: Sequence[nn.Module], factors: Tensor) -> Iterator[None]:
    """Move factors, and back to the same bits."""
    changed = [p for _, p in place.parameters]
    changed += [reader.weight for reader in readers]  # type: ignore[misc]
    before = [parameter.clone() for parameter in changed]
    try:
        place.divide(factors)
        multiply_columns(readers, factors)
        yield
    finally:
        for parameter, values in zip(changed, before, strict=True):
            parameter.copy_(values)
