"""Round a weight to numbers of a format, its zeros fixed: to the nearest, or with feedback.

With feedback, columns are rounded one after the other, and what rounding one costs the output is
made up for, as far as can be, by those that are still to come: the column-wise solution of Frantar
et al., "GPTQ" (arXiv 2210.17323), here in the normalised units of `LayerProblem` and on a mask. A
pruned element is one whose only number is 0, so that what reaches it goes on to later columns.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.factors import inverse_factor
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.quantization.formats import NumberFormat, exact_scale

# Largest magnitudes of a row that its scale is tried for, as shares of the true one.
_SHARES = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.72)
_BLOCK = 128


def weight_scales(weight: Tensor, importance: Tensor, form: NumberFormat) -> Tensor:
    """One scale for each row of a weight (n, k), of several the one of the least weighted error.

    Args:
        weight: float32.
        importance: (k,), mean squares of the inputs.
        form: to round to.

    Returns:
        (n,) float32, each exact in float16 and bfloat16; that of a row of zeros is 1.
    """
    largest = weight.abs().amax(1)
    best = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest)
    for share in _SHARES:
        scale = exact_scale(torch.where(largest > 0, largest * share / form.largest, 1.0))
        rounded = form.values(form.weight_numbers(weight, scale), scale[:, None])
        error = (rounded - weight).square() @ importance
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return scales


def rounded_with_feedback(
    problem: LayerProblem, weight: Tensor, kept: Tensor, scale: Tensor, form: NumberFormat
) -> Tensor:
    """Numbers of a weight (n, k), zero outside of `kept`.

    Args:
        problem: the quadratic of the layer, whose inputs are rounded already; its curvature counts.
        weight: float32, zero outside of `kept`.
        kept: (n, k) bool.
        scale: (n,).
        form: to round to.
    """
    # What matters most first, while there are most columns left to make up for it.
    order = problem.scale.argsort(descending=True)
    unit = problem.scale[order]
    factor = inverse_factor(problem.curvature[order][:, order].double()).float()
    rest = (weight * problem.scale)[:, order]
    mask = kept[:, order]
    numbers = torch.zeros_like(rest)
    width = rest.shape[1]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.zeros_like(rest[:, start:end])
        for i in range(start, end):
            value = (rest[:, i] / unit[i])[:, None]
            number = form.weight_numbers(value, scale).float().masked_fill(~mask[:, i : i + 1], 0)
            numbers[:, i] = number[:, 0]
            error = (rest[:, i] - number[:, 0] * scale * unit[i]) / factor[i, i]
            rest[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    found = torch.empty_like(numbers)
    found[:, order] = numbers
    # What is read as nothing but zeros says nothing of its weights.
    nearest = form.weight_numbers(weight, scale)
    return torch.where(problem.dead, nearest.float(), found).to(form.dtype)
