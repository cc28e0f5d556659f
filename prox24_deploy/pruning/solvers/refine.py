"""Best weights on a fixed mask."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import ExactFactor

# Rows that are done leave the products once no more than this share of them is not.
_FEW = 0.8


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
    keep = mask.to(start.dtype)
    x, at = start.masked_fill(~mask, 0.0), torch.arange(len(start), device=start.device)
    residual, first_loss = _residual_and_loss(problem, curvature, x, keep)
    goal = tolerance**2 * (problem.linear * keep).square().sum(1)
    rows = _Rows(x, residual, residual.clone(), keep, residual.square().sum(1), goal)
    for _ in range(iterations):
        active = rows.energy > rows.goal
        count = int(active.sum())
        if count == 0:
            break
        if count <= _FEW * len(active):
            x = x.index_copy(0, at, rows.x)
            at, rows = at[active], rows.of(active)
            active = torch.ones_like(active[:count])
        rows.step(curvature, active)
    x = x.index_copy(0, at, rows.x)
    _, loss = _residual_and_loss(problem, curvature, x, keep)
    improved = loss <= first_loss
    return torch.where(improved[:, None] & mask, x, start.masked_fill(~mask, 0.0))


def _residual_and_loss(
    problem: LayerProblem, curvature: ExactFactor, x: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """What is left of the linear term on the mask, (rows, d), and the loss, (rows,), of weights.

    As exact as the steps are, where `LayerProblem.loss` may round its products to TF32.
    """
    residual = (problem.linear - curvature.after(x)).mul_(keep)
    return residual, -0.5 * (x * (problem.linear + residual)).sum(1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows on their way to the minimum, as `masked_conjugate_gradient` has them, (rows, d).

    A product with 0 and 1 stands for a mask here, for a CPU is slow at choosing by one.
    """

    x: Tensor
    residual: Tensor
    direction: Tensor
    keep: Tensor
    energy: Tensor
    goal: Tensor

    def of(self, chosen: Tensor) -> "_Rows":
        """Some of the rows, by (rows,) bool."""
        return _Rows(*(getattr(self, each.name)[chosen] for each in fields(self)))

    def step(self, curvature: ExactFactor, active: Tensor) -> None:
        """One step of the active rows, (rows,) bool, in place."""
        image = curvature.after(self.direction).mul_(self.keep)
        bend = (self.direction * image).sum(1)
        step = torch.where(active & (bend > 0), self.energy / bend, 0.0)[:, None]
        self.x.addcmul_(step, self.direction)
        self.residual.addcmul_(step, image, value=-1)
        energy = self.residual.square().sum(1)
        ratio = torch.where(active, energy / self.energy, 0.0)[:, None]
        self.direction.mul_(ratio).add_(self.residual)
        self.energy.copy_(torch.where(active, energy, self.energy))


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
