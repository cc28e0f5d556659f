"""A rotation under which 2:4 drops less: descent from the identity over orthonormal matrices.

Each layer of the blocks is scored by what magnitude pruning in units of its inputs would drop,
the two smallest of four w² E[x²] of every group, over the energy of its outputs. Steps are Cayley
transforms of the projected gradient with momentum, as in Li et al., arXiv 2002.01113; the score
and the schedule are this project's own.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.core.types import Progress
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import real_rows, run_model
from prox24_deploy.rotation.stream import ResidualStream
from prox24_deploy.sparsity.pattern import GROUP

# Root mean square of an element of the first step's generator, times √d, and the decay of momentum.
_STEP, _MOMENTUM = 0.05, 0.9
# Of the rows that score a rotation every so many are looked at in a step, others in the next.
_STRIDE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Matrices that read the stream behind one norm, or one that writes it, under a rotation Q.

    Attributes:
        weights: (rows, channels) of layers that read, W Q; (channels, inputs) of the one that
            writes, Qᵀ W.
        moments: E[x xᵀ] of what readers read, (channels, channels); E[x²] of what a writer reads,
            (inputs,).
        energies: E‖y‖² of the output of each, without its bias.
    """

    weights: tuple[Tensor, ...]
    moments: Tensor
    energies: tuple[float, ...]

    def dropped(self, turn: Tensor, part: slice) -> Tensor:
        """What 2:4 drops of the scores of some of its groups over their energies, summed."""
        if self.moments.ndim == 2:
            sizes = ((self.moments @ turn) * turn).sum(0)
            squares = [(weight[part] @ turn).square() * sizes for weight in self.weights]
        else:
            sizes = self.moments.unflatten(0, (-1, GROUP))[part].flatten()
            groups = [w.unflatten(1, (-1, GROUP))[:, part].flatten(1) for w in self.weights]
            squares = [(turn.T @ each).square() * sizes for each in groups]
        shares = [
            _two_smallest(each).sum() / energy
            for each, energy in zip(squares, self.energies, strict=True)
        ]
        return torch.stack(shares).sum()


@torch.no_grad()
def sides_of(
    model: nn.Module, stream: ResidualStream, batches: Sequence[Batch], task: str
) -> list[Side]:
    """Every matrix of the blocks with what it reads and gives on the tokens of some batches.

    What gives nothing but zeros, or does not run, is left out, and what writes and whose inputs are
    no multiple of four, for it is not pruned.
    """
    watch = _Watch(stream)
    with watch.hooked():
        for batch in batches:
            watch.real = batch.real
            run_model(model, batch, task)
    sides = []
    for index, gram in watch.grams.items():
        moments = gram / watch.tokens[index]
        weights = [layer.weight for layer in stream.readings[index].layers]
        energies = [float(((weight @ moments) * weight).sum()) for weight in weights]
        sides.append(_side(weights, moments, energies))
    for index, squares in watch.squares.items():
        if len(squares) % GROUP == 0:
            count, weight = watch.written[index], stream.writers[index].weight
            sides.append(_side([weight], squares / count, [watch.energies[index] / count]))
    return [side for side in sides if side.weights]


def _side(weights: Sequence[Tensor], moments: Tensor, energies: Sequence[float]) -> Side:
    """Those of some matrices that give something."""
    kept = [(w, energy) for w, energy in zip(weights, energies, strict=True) if energy > 0]
    return Side(
        weights=tuple(weight for weight, _ in kept),
        moments=moments,
        energies=tuple(energy for _, energy in kept),
    )


class _Watch:
    """Sums over all tokens of what layers of the blocks read and what writers give."""

    real: Tensor

    def __init__(self, stream: ResidualStream) -> None:
        self._stream = stream
        self.grams: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = {}
        self.squares: dict[int, Tensor] = {}
        self.energies: dict[int, float] = {}
        self.written: dict[int, int] = {}

    def hooked(self) -> ExitStack:
        """While this is open, what runs is added."""
        stack = ExitStack()
        for index, reading in enumerate(self._stream.readings):
            handle = reading.norm.register_forward_hook(
                lambda _, __, out, i=index: self._read(i, out)
            )
            stack.callback(handle.remove)
        for index, writer in enumerate(self._stream.writers):
            handle = writer.register_forward_hook(
                lambda layer, given, out, i=index: self._wrote(i, layer, given[0], out)
            )
            stack.callback(handle.remove)
        return stack

    def _read(self, index: int, out: Tensor) -> None:
        rows = real_rows(out, self.real)
        _add(self.grams, index, rows.T @ rows)
        self.tokens[index] = self.tokens.get(index, 0) + len(rows)

    def _wrote(self, index: int, layer: nn.Linear, given: Tensor, out: Tensor) -> None:
        rows, own = real_rows(given, self.real), real_rows(out, self.real)
        if layer.bias is not None:
            own = own - layer.bias
        _add(self.squares, index, rows.square().sum(0))
        self.energies[index] = self.energies.get(index, 0.0) + float(own.square().sum())
        self.written[index] = self.written.get(index, 0) + len(rows)


def _add(sums: dict[int, Tensor], index: int, more: Tensor) -> None:
    sums[index] = sums[index] + more if index in sums else more


@torch.no_grad()
def score_of(sides: Sequence[Side], turn: Tensor) -> float:
    """Mean over all matrices of what 2:4 drops, as a share of their energy."""
    return sum(float(side.dropped(turn, slice(None))) for side in sides) / _count(sides)


def _count(sides: Sequence[Side]) -> int:
    return sum(len(side.weights) for side in sides)


def learned(sides: Sequence[Side], width: int, steps: int, progress: Progress) -> Tensor:
    """An orthonormal matrix, (width, width), float64, that many steps of descent lead to."""
    eye = torch.eye(width, device=sides[0].moments.device)
    turn, momentum = eye, torch.zeros_like(eye)
    for number in range(steps):
        progress("rotate", number, steps)
        tangent = turn.T @ _gradient(sides, turn, number % _STRIDE)
        momentum = _MOMENTUM * momentum + tangent - tangent.T
        length = _STEP * (0.5 + 0.5 * math.cos(math.pi * number / steps))
        scale = float(momentum.square().mean().sqrt()) * math.sqrt(width)
        if scale == 0:
            break
        step = -0.5 * length * momentum / scale
        turn = turn @ torch.linalg.solve(eye - step, eye + step)
    progress("rotate", steps, steps)
    # Rounding of many products is taken out: the nearest orthonormal matrix.
    left, _, right = torch.linalg.svd(turn.double())
    nearest: Tensor = left @ right
    return nearest


@torch.enable_grad()
def _gradient(sides: Sequence[Side], turn: Tensor, begin: int) -> Tensor:
    """Of the score on some of the rows; side by side, so that no more than one is in memory."""
    free = turn.detach().requires_grad_()
    total = torch.zeros_like(turn)
    for side in sides:
        dropped = side.dropped(free, slice(begin, None, _STRIDE)) * (_STRIDE / _count(sides))
        total += torch.autograd.grad(dropped, free)[0]
    return total


def _two_smallest(scores: Tensor) -> Tensor:
    """Sum of the two smallest of each four along the last axis."""
    a, b, c, d = scores.unflatten(-1, (-1, GROUP)).unbind(-1)
    first, second = torch.minimum(a, b), torch.minimum(c, d)
    return torch.minimum(first + second, torch.minimum(a + b, c + d))
