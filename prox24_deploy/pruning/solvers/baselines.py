"""Magnitude, Wanda and SparseGPT at 2:4, on the same quadratic as the prox solver.

All three work in normalised units: score, mask and weights refer to W̃ = W n. Wanda's score
|W_ij|·‖X_j‖ is then plain |W̃|.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.factors import inverse_factor
from prox24_deploy.pruning.solvers.kernels import has_triton
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.products import ExactFactor
from prox24_deploy.sparsity.pattern import GROUP, mask_24

_BLOCK = 128


def magnitude_mask(problem: LayerProblem) -> Tensor:
    """Keep the two largest |W| of every group. (rows, d) bool."""
    return mask_24(problem.to_weight(problem.start).abs())


def wanda_mask(problem: LayerProblem) -> Tensor:
    """Keep the two largest |W_ij|·‖X_j‖ of every group (Sun et al. 2024, arXiv 2306.11695)."""
    return mask_24(problem.start.abs())


def sparsegpt(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Prune column by column, compensating each error in the columns still to come.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774. Deviations: starts from the minimiser of
    the quadratic, which is W0 for the symmetric target, and uses its damping.

    Returns:
        (weights, mask), normalised weights (rows, d) with +0.0 outside the mask.
    """
    factor = inverse_factor(problem.curvature)
    # B UᵀU; the wide factor is not transposed, for that would be one more copy of it.
    half = ExactFactor.of(problem.linear.T).after(factor).T
    weight = ExactFactor.of(factor).after(half)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    features = weight.shape[1]
    for begin in range(0, features, _BLOCK):
        end = min(begin + _BLOCK, features)
        errors = _prune_block(weight, mask, factor, begin, end)
        weight[:, end:] -= ExactFactor.of(factor[begin:end, end:]).after(errors)
    return weight.masked_fill(~mask, 0.0), mask


def _prune_block(weight: Tensor, mask: Tensor, factor: Tensor, begin: int, end: int) -> Tensor:
    """Prune columns begin..end in place and return their scaled errors, (rows, end - begin)."""
    if has_triton(weight):
        from prox24_deploy.pruning.solvers.sparsegpt_cuda import prune_block_cuda

        return prune_block_cuda(weight, mask, factor, begin, end)
    # By columns, which then are contiguous.
    block, factor = weight[:, begin:end].T.contiguous(), factor[begin:end, begin:end]
    kept = torch.zeros_like(block, dtype=torch.bool)
    errors, diagonal = torch.zeros_like(block), factor.diagonal()
    for column in range(end - begin):
        if column % GROUP == 0:
            group = slice(column, column + GROUP)
            kept[group] = mask_24((block[group] / diagonal[group, None]).square(), axis=0)
        pruned = block[column] * ~kept[column]
        errors[column] = pruned / diagonal[column]
        block[column] -= pruned
        block[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
    weight[:, begin:end], mask[:, begin:end] = block.T, kept.T
    return errors.T
