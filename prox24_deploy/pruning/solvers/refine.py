"""Best weights on a fixed mask."""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import ExactFactor


def masked_conjugate_gradient(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> Tensor:
    """Minimise the loss of every row over its kept weights by conjugate gradients.

    The diagonal of the curvature is constant in normalised units, so this is Jacobi-preconditioned
    as it stands. Each row has its own step length and stops at its own residual.

    Args:
        problem: the quadratic, d features.
        mask: (rows, d) bool, True where a weight is kept.
        start: (rows, d) normalised weights; masked elements are ignored.
        iterations: upper bound.
        tolerance: a row stops at this residual relative to its masked linear term.

    Returns:
        (rows, d), zero (+0.0) outside the mask. No row is worse than its masked start.
    """
    curvature = ExactFactor.of(problem.curvature)
    x = start.masked_fill(~mask, 0.0)
    residual = (problem.linear - curvature.after(x)).masked_fill(~mask, 0.0)
    direction = residual
    energy = residual.square().sum(1)
    goal = tolerance**2 * problem.linear.masked_fill(~mask, 0.0).square().sum(1)
    for _ in range(iterations):
        active = energy > goal
        if not bool(active.any()):
            break
        image = curvature.after(direction).masked_fill(~mask, 0.0)
        bend = (direction * image).sum(1)
        step = torch.where(active & (bend > 0), energy / bend, 0.0)[:, None]
        x = x + step * direction
        residual = residual - step * image
        new_energy = residual.square().sum(1)
        ratio = torch.where(active, new_energy / energy, 0.0)[:, None]
        direction = residual + ratio * direction
        energy = torch.where(active, new_energy, energy)
    masked_start = start.masked_fill(~mask, 0.0)
    improved = problem.loss(x) <= problem.loss(masked_start)
    return torch.where(improved[:, None] & mask, x, masked_start)


def masked_gradient(
    problem: LayerProblem,
    mask: Tensor,
    start: Tensor,
    *,
    iterations: int = 300,
    precondition: bool = False,
) -> Tensor:
    """Descend on the kept weights by gradient steps of 1/L: the refinement of the paper.

    Slower than conjugate gradients towards the same minimum; kept to reproduce the paper
    (arXiv 2501.18015), which applies it to masks of any method.

    Args:
        problem: the quadratic, d features.
        mask: (rows, d) bool, True where a weight is kept.
        start: (rows, d) normalised weights; masked elements are ignored.
        iterations: steps.
        precondition: step in normalised units instead of those of the weights.

    Returns:
        (rows, d), normalised, zero (+0.0) outside the mask.
    """
    own = problem if precondition else problem.unscaled()
    to_own = own.scale / problem.scale
    x = (start * to_own).masked_fill(~mask, 0.0)
    step, curvature = 1 / own.largest_curvature(), ExactFactor.of(own.curvature)
    for _ in range(iterations):
        x = x - step * (curvature.after(x) - own.linear).masked_fill(~mask, 0.0)
    return x / to_own
