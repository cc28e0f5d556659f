"""Slow, plain references in float64, sharing no code with what they check."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

PAIRS = tuple(itertools.combinations(range(4), 2))
_STARTS = 24
_SWEEPS = 4000


def prox_objective(group: Array, target: Array, lam: float) -> Array:
    """½|w - z|² + λ Σ |w_i w_j w_k| over the four triples. Shapes (..., 4) -> (...)."""
    size = np.abs(group)
    triples = sum(np.prod(np.delete(size, i, axis=-1), axis=-1) for i in range(4))
    distance: Array = 0.5 * np.square(group - target).sum(-1) + lam * triples
    return distance


def prox_minimum(target: Array, lam: float, seed: int = 0) -> float:
    """Smallest objective of one group: exact coordinate descent from many starts.

    One coordinate has a closed form (soft threshold by λ times the sum of the other pairs'
    products), so every sweep descends; starts cover all supports, the target and random points.
    """
    draw = np.random.default_rng(seed)
    supports = np.array(list(itertools.product((0.0, 1.0), repeat=4)))
    starts = np.concatenate([
        supports * target, supports * target * 0.5, draw.uniform(0, 1, (_STARTS, 4)) * target,
    ])  # fmt: skip
    values = np.abs(starts)
    goal = np.abs(target)
    for sweep in range(_SWEEPS):
        before = values.copy()
        for i in draw.permutation(4) if sweep < 20 else range(4):
            a, b, c = (values[:, j] for j in range(4) if j != i)
            values[:, i] = np.maximum(goal[i] - lam * (a * b + b * c + c * a), 0.0)
        if np.array_equal(before, values):
            break
    return float(prox_objective(values, goal, lam).min())


def best_mask(score: Array) -> float:
    """Largest sum of scores that two elements of a group can have."""
    return max(float(score[list(pair)].sum()) for pair in PAIRS)


def least_squares_on_mask(curvature: Tensor, linear: Tensor, mask: Tensor) -> Tensor:
    """argmin ½ w A wᵀ - w b over the kept weights of every row, solved densely in float64."""
    curvature, linear = curvature.double(), linear.double()
    solution = torch.zeros_like(linear)
    for row, (keep, target) in enumerate(zip(mask, linear, strict=True)):
        system = curvature[keep][:, keep]
        solution[row, keep] = torch.linalg.solve(system, target[keep])
    return solution


def optimum_over_masks(curvature: Tensor, linear: Tensor) -> float:
    """Smallest ½ w A wᵀ - w b of one row over every 2:4 mask, in float64."""
    groups = len(linear) // 4
    best = float("inf")
    for pairs in itertools.product(PAIRS, repeat=groups):
        keep = [4 * group + i for group, pair in enumerate(pairs) for i in pair]
        system, target = curvature[keep][:, keep].double(), linear[keep].double()
        solution = torch.linalg.solve(system, target)
        best = min(best, float(-0.5 * solution @ target))
    return best


def optimal_brain_surgeon(
    weight: Tensor, curvature: Tensor, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """Prune column by column with the textbook update, recomputing the inverse at each step.

    `choose` takes the saliencies w² / [H⁻¹]_jj of a group's columns, (rows, 4), and returns the
    mask to keep. Saliencies use the inverse over the columns from each one on, as in the paper.
    """
    weight, curvature = weight.double().clone(), curvature.double()
    features = weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for column in range(features):
        rest = torch.linalg.inv(curvature[column:, column:])
        if column % 4 == 0:
            diagonal = torch.stack([
                torch.linalg.inv(curvature[j:, j:])[0, 0] for j in range(column, column + 4)
            ])  # fmt: skip
            group = slice(column, column + 4)
            keep[:, group] = choose(weight[:, group].square() / diagonal)
        error = weight[:, column].masked_fill(keep[:, column], 0.0) / rest[0, 0]
        weight[:, column:] -= error[:, None] * rest[0]
        weight[:, column].masked_fill_(~keep[:, column], 0.0)
    return weight
