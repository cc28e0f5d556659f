"""Proximal gradient descent with a growing λ: the method of the paper, read literally.

Kübler et al., arXiv 2501.18015, minimise the local squared loss plus λ R(W) by proximal gradient
steps of length 1/L on the weights as they are, then fix the mask and go on with masked gradient
steps. Their schedule of λ is not public; `IstaOptions` is this project's own. Preconditioning by
√diag(H) and momentum are not part of the paper's method and are off by default.
"""

from dataclasses import dataclass

from torch import Tensor

from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import ExactFactor
from prox24_deploy.pruning.solvers.prox import prox_24
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares
from prox24_deploy.sparsity.pattern import final_mask, unconverged_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class IstaOptions:
    """Schedule of the proximal gradient solver.

    Attributes:
        start: λ0 in units of 1 / mean |W_row|, for a quadratic whose mean diagonal is 1.
        growth: factor on λ per step, > 1.
        max_iterations: hard cap; groups that are not 2:4 by then are projected.
        check_every: steps between tests for convergence.
        precondition: descend in units of √diag(H) instead of those of the weights.
        momentum: of the extrapolation before each step, in [0, 1).
    """

    start: float = 0.02
    growth: float = 1.05
    max_iterations: int = 1000
    check_every: int = 10
    precondition: bool = False
    momentum: float = 0.0


def ista(
    problem: LayerProblem, options: IstaOptions, shares: Shares = WHOLE
) -> tuple[Tensor, Tensor, int]:
    """Minimise the quadratic plus λ R with λ growing until every group is 2:4.

    Returns:
        (weights, mask, iterations): normalised weights (rows, d), not yet refined, masked.
    """
    own = problem if options.precondition else problem.unscaled()
    step, curvature = 1 / own.largest_curvature(), ExactFactor.of(own.curvature)
    row_scale = own.start.abs().mean(1, keepdim=True)
    # A zero row has no scale; any finite λ leaves it zero.
    base = options.start / row_scale.where(row_scale > 0, 1.0)
    weight = previous = own.start
    iterations = 0
    while iterations < options.max_iterations:
        ahead = weight + options.momentum * (weight - previous)
        previous = weight
        descended = ahead - step * (curvature.after(ahead) - own.linear)
        weight = prox_24(descended, base * (options.growth**iterations * step))
        iterations += 1
        if iterations % options.check_every == 0 and shares.total(unconverged_groups(weight)) == 0:
            break
    mask = final_mask(weight, previous)
    normalised = weight * (problem.scale / own.scale)
    return normalised.masked_fill(~mask, 0.0), mask, iterations
