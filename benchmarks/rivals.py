"""Methods of others that the package does not offer, for comparison only.

`gradual_admm` follows Boža, *Fast and Effective Weight Update for Pruned Large Language Models*,
arXiv 2401.02938, with the defaults of the authors' program: the same splitting as prox-ADMM, but
with a mask where that has the prox. Written from the description, in this project's terms.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.sparsity.pattern import mask_24

GRADUAL_DAMPING = 0.1


def gradual_admm(
    problem: LayerProblem, *, iterations: int = 20, ramp: int = 15, rho: float = 1.0
) -> tuple[Tensor, Tensor]:
    """ADMM whose mask drops more weights in each of its first iterations, then stays.

    The two largest of every cell are never dropped; of the others, over all rows at once, the
    share that is dropped rises as 1 - (1 - k/ramp)³. The authors damp by `GRADUAL_DAMPING`.

    Returns:
        (weights, mask): normalised weights (rows, d), zero outside the mask.
    """
    identity = torch.eye(len(problem.scale), device=problem.scale.device)
    inverse = torch.linalg.inv(problem.curvature + rho * identity)
    weight, dual = problem.start, torch.zeros_like(problem.start)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(iterations):
        shifted = weight + dual
        if step < ramp:
            mask = _largest(shifted, 1 - (1 - (step + 1) / ramp) ** 3)
        split = shifted.masked_fill(~mask, 0.0)
        dual = shifted - split
        weight = (problem.linear + rho * (split - dual)) @ inverse
    return (weight + dual).masked_fill(~mask, 0.0), mask


def _largest(values: Tensor, dropped: float) -> Tensor:
    """Keep two per cell, and of the rest all but the smallest `dropped` of them."""
    kept = mask_24(values.abs())
    rest = values.abs().masked_fill(kept, torch.inf)
    count = int(dropped * int((~kept).sum()))
    if count == 0:
        return torch.ones_like(kept)
    return rest > rest.flatten().kthvalue(count).values
