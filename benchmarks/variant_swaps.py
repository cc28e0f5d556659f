"""Swaps: each cell of a solved row takes the best of its six patterns, all kept weights following.

Let S be the kept weights of a row, T = S and the two others of one cell, x the minimum of the row's
quadratic over T, and K the part of (A_TT)⁻¹ that belongs to the cell. Setting two weights Z of the
cell to zero, with all others following, costs ½ x_Zᵀ (K_ZZ)⁻¹ x_Z: one inverse for each row gives
the exact gain of the best other pattern of every cell. The best cells of a row change together; a
row keeps what lowers its loss, and tries half as many cells otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab

from prox24_deploy.pruning import layer_group
from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem
from prox24_deploy.pruning.solvers.products import float32_products
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient
from prox24_deploy.pruning.solvers.solver import LayerSolution, solve_layer
from prox24_deploy.sparsity.pattern import mask_24

_PATTERNS = torch.tensor(list(combinations(range(4), 2)))
# Of the cells of a row those that may change in the first round, and the most rounds.
_FIRST, _ROUNDS = 1 / 16, 16
# A gain below this part of the row's loss is rounding.
_LEAST = 1e-5
# Matrices of half the features that are held for a row, and their bytes on each kind of device.
_HELD, _ROOM = 7, {"cuda": 2**33, "cpu": 2**28}


def with_swaps(lab: Lab) -> tuple[nn.Module, Figures]:
    """Prune with swaps behind the solver."""
    with swapping() as seen:
        model = lab.prune()
    ratios = torch.tensor([after / before for before, after in seen])
    return model, {"layer_loss": float(ratios.mean()), "layer_loss_worst": float(ratios.max())}


@contextmanager
def swapping() -> Iterator[list[tuple[float, float]]]:
    """Polish what the solver gives; yields losses above the minimum of all, before and after."""
    seen: list[tuple[float, float]] = []

    def solve(weight: Tensor, problem: LayerProblem, **options: Any) -> LayerSolution:
        found = solve_layer(weight, problem, **options)
        if found.used == "unchanged":
            return found
        own = found.weight * problem.scale
        with float32_products():
            better, mask = polished(problem, own, found.mask)
            best = torch.linalg.solve(problem.curvature, problem.linear.T).T
            losses = [float(problem.loss(each).double().sum()) for each in (own, better, best)]
        seen.append((losses[0] - losses[2], losses[1] - losses[2]))
        result = problem.to_weight(better).masked_fill(~mask | problem.dead, 0.0)
        return replace(found, weight=result, mask=mask)

    with patch.object(layer_group, "solve_layer", solve):
        yield seen


@dataclass(slots=True)
class _Rows:
    """Where each row is: its loss, and for each cell the gain and the mask of its best pattern."""

    mask: Tensor
    loss: Tensor
    gain: Tensor
    other: Tensor


def polished(problem: LayerProblem, start: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Swap until no row gains.

    Args:
        problem: the quadratic of each row.
        start: normalised weights on the mask, (rows, d).
        mask: (rows, d) bool, two of each four.

    Returns:
        (weights, mask), no row worse than it was.
    """
    known = _looked_at(problem, mask, torch.arange(len(mask), device=mask.device))
    cells = mask.shape[1] // 4
    most = torch.full((len(mask),), max(1, round(_FIRST * cells)), device=mask.device)
    for _ in range(_ROUNDS):
        open_rows = (
            (known.gain > _LEAST * known.loss.abs()[:, None]).any(1) & (most > 0)
        ).nonzero()
        rows = open_rows.flatten()
        if not len(rows):
            break
        tried = _swapped(known, rows, most[rows])
        found = _looked_at(problem, tried, rows)
        won = found.loss < known.loss[rows]
        for name in ("mask", "loss", "gain", "other"):
            getattr(known, name)[rows[won]] = getattr(found, name)[won]
        most[rows[~won]] //= 2
    weight = masked_conjugate_gradient(problem, known.mask, start.masked_fill(~known.mask, 0.0))
    worse = problem.loss(weight) > problem.loss(start)
    return weight.where(~worse[:, None], start), known.mask.where(~worse[:, None], mask)


def _swapped(known: _Rows, rows: Tensor, most: Tensor) -> Tensor:
    """Masks of rows with their best cells changed, as many as each may change."""
    gain = known.gain[rows]
    rank = gain.argsort(1, descending=True).argsort(1)
    change = (rank < most[:, None]) & (gain > 0)
    return known.other[rows].where(change.repeat_interleave(4, 1), known.mask[rows])


def _looked_at(problem: LayerProblem, mask: Tensor, rows: Tensor) -> _Rows:
    """Losses and gains of rows on masks, in parts that memory has room for."""
    half = mask.shape[1] // 2
    size = max(1, _ROOM[mask.device.type] // (4 * _HELD * half**2))
    parts = [
        _exact(problem.curvature, problem.linear[which], own)
        for own, which in zip(mask.split(size), rows.split(size), strict=True)
    ]
    return _Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _exact(curvature: Tensor, linear: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Mask, loss at the minimum on it, gain of each cell's best pattern, mask of these patterns.

    Args:
        curvature: A, (d, d).
        linear: B, (rows, d).
        mask: (rows, d) bool, two of each four.
    """
    kept, left = (each.nonzero()[:, 1].view(len(mask), -1) for each in (mask, ~mask))
    own = curvature[kept[:, :, None], kept[:, None, :]]
    mixed = curvature[kept[:, :, None], left[:, None, :]]
    factor = torch.linalg.cholesky(own)
    eye = torch.eye(kept.shape[1], device=own.device, dtype=own.dtype).expand_as(own)
    root = torch.linalg.solve_triangular(factor, eye, upper=False)
    wanted = linear.gather(1, kept)[:, :, None]
    x = root.mT @ (root @ wanted)
    # One step of refinement, for an inverse in float32 is not as exact as a solution.
    x = x + root.mT @ (root @ (wanted - own @ x))
    loss = -0.5 * (wanted * x).sum((1, 2))
    pull = linear.gather(1, left) - (mixed * x).sum(1)
    block, cell = _block_of_cell(curvature, left, root, root @ mixed)
    free = block[:, :, 2:, 2:] @ pull.unflatten(1, (-1, 2))[..., None]
    first = x.unflatten(1, (-1, 2)) - cell @ free
    cost = _costs(torch.cat([first, free], 2)[..., 0], block)
    least, chosen = cost.min(2)
    # The last pattern sets those to zero that are zero now.
    gain = cost[:, :, -1] - least
    return mask, loss, gain, _other(mask, kept, left, chosen)


def _block_of_cell(
    curvature: Tensor, left: Tensor, root: Tensor, mixed: Tensor
) -> tuple[Tensor, Tensor]:
    """K of each cell, its kept weights first, (rows, cells, 4, 4), and (A_SS)⁻¹ A_SQ there.

    Args:
        curvature: A.
        left: columns that are not kept, (rows, d / 2).
        root: R with RᵀR = (A_SS)⁻¹.
        mixed: R A_SQ for all that is not kept.
    """
    pairs = left.unflatten(1, (-1, 2))
    direct = curvature[pairs[..., :, None], pairs[..., None, :]]
    corner = _inverse(direct - _blocks(mixed, mixed))
    cell = _blocks(root, mixed)
    side = -cell @ corner
    upper = torch.cat([_blocks(root, root) - side @ cell.mT, side], 3)
    return torch.cat([upper, torch.cat([side.mT, corner], 3)], 2), cell


def _blocks(first: Tensor, second: Tensor) -> Tensor:
    """The 2 × 2 blocks on the diagonal of XᵀY, for X and Y (rows, n, n): (rows, n / 2, 2, 2)."""
    parts = [
        torch.stack([(first[:, :, i::2] * second[:, :, j::2]).sum(1) for j in range(2)], -1)
        for i in range(2)
    ]
    return torch.stack(parts, -2)


def _inverse(matrix: Tensor) -> Tensor:
    """Of matrices (..., 2, 2)."""
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    adjugate: Tensor = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2))
    return adjugate / (a * d - b * c)[..., None, None]


def _costs(x: Tensor, block: Tensor) -> Tensor:
    """½ x_Zᵀ (K_ZZ)⁻¹ x_Z of each pair Z of a cell, (rows, cells, 6)."""
    found = []
    for i, j in _PATTERNS.tolist():
        part = block[:, :, [i, j]][..., [i, j]]
        pair = x[:, :, [i, j]]
        found.append(0.5 * (pair * (_inverse(part) @ pair[..., None])[..., 0]).sum(2))
    return torch.stack(found, 2)


def _other(mask: Tensor, kept: Tensor, left: Tensor, chosen: Tensor) -> Tensor:
    """The mask in which every cell has its best pattern, from the pair that becomes zero."""
    columns = torch.cat([kept.unflatten(1, (-1, 2)), left.unflatten(1, (-1, 2))], 2)
    zeros = columns.gather(2, _PATTERNS.to(chosen.device)[chosen])
    return torch.ones_like(mask).scatter(1, zeros.flatten(1), value=False)


def require_exact() -> None:
    """Hold the gain of every cell against a solution of every pattern, in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 12, generator=generator)
    weight = torch.randn(3, 12, generator=generator)
    problem = layer_problem(weight, inputs.T @ inputs, 0.01)
    curvature, linear = problem.curvature.double(), problem.linear.double()
    mask = mask_24(problem.start.abs())
    _, loss, gain, other = _exact(curvature, linear, mask)
    for row in range(3):
        assert abs(_least(curvature, linear[row], mask[row]) - float(loss[row])) < 1e-9
        for cell in range(3):
            where = slice(4 * cell, 4 * cell + 4)
            tried = []
            for pattern in _PATTERNS:
                own = mask[row].clone()
                own[where] = torch.zeros(4, dtype=torch.bool).scatter(0, pattern, value=True)
                tried.append(_least(curvature, linear[row], own))
            own = mask[row].clone()
            own[where] = other[row, where]
            assert abs(float(loss[row] - gain[row, cell]) - min(tried)) < 1e-9
            assert abs(_least(curvature, linear[row], own) - min(tried)) < 1e-9


def _least(curvature: Tensor, linear: Tensor, mask: Tensor) -> float:
    """The least of one row's quadratic on a mask."""
    return -0.5 * float(linear[mask] @ torch.linalg.solve(curvature[mask][:, mask], linear[mask]))
