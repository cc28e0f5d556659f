"""Inverses of positive definite matrices and their factors, as exact as float32.

A GPU has no fast routine for either: what torch calls there solves for every column of the identity
in float32. Here most of the work is matrix products, which tensor cores take.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.products import ExactFactor

# Triangles of at most this size are inverted by a solver.
_LEAF = 1024
# Columns of an inverse that are made at a time.
_PANEL = 4096


def inverse_of(matrix: Tensor) -> Tensor:
    """A⁻¹ of a positive definite matrix (d, d), float32."""
    lower = torch.linalg.cholesky(matrix)
    if not matrix.is_cuda:
        return torch.cholesky_inverse(lower)
    triangle = inverse_triangle(lower)
    del lower
    return _gram(triangle)


def upper_factor_of_inverse(matrix: Tensor) -> Tensor:
    """U, upper triangular, with Uᵀ U = A⁻¹, of a positive definite matrix (d, d), float32.

    With rows and columns in reverse order A is L Lᵀ, and U is L⁻¹ in reverse order. It takes no
    inverse of A, and so half of the work.
    """
    return inverse_triangle(torch.linalg.cholesky(matrix.flip(0, 1))).flip(0, 1)


def inverse_triangle(lower: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular matrix (d, d), zero above its diagonal, float32."""
    found = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    _invert(lower, found)
    return found


def _invert(lower: Tensor, found: Tensor) -> None:
    """Put the inverse of a triangle into the lower triangle of `found`, half by half."""
    size = len(lower)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        found.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, second = slice(0, size // 2), slice(size // 2, size)
    for half in (first, second):
        _invert(lower[half, half], found[half, half])
    # Of [[A, 0], [B, C]] it is [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]].
    between = ExactFactor.of(found[first, first]).after(lower[second, first])
    found[second, first] = ExactFactor.of(between).after(found[second, second]).neg_()


def _gram(triangle: Tensor) -> Tensor:
    """Tᵀ T of a lower triangular matrix (d, d), symmetric to the bit."""
    found = torch.empty_like(triangle)
    for column in _panels(len(triangle), 0):
        for row in _panels(len(triangle), column.start):
            # Above its diagonal the triangle is zero.
            left, right = triangle[row.start :, row], triangle[row.start :, column]
            found[row, column] = ExactFactor.of(right).after(left.T)
            found[column, row] = found[row, column].T
    return found


def _panels(size: int, begin: int) -> Iterator[slice]:
    for start in range(begin, size, _PANEL):
        yield slice(start, min(start + _PANEL, size))
