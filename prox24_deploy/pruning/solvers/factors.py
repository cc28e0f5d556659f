"""The inverse of a curvature, and a triangular factor of the inverse, by Cholesky in float32.

For the widest layers of a large model these cost as much as what is done with them. Columns of an
inverse do not depend on each other, so that processes that share a run share them, too. A matrix
that rounding to float32 leaves without a factor gets one in float64.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.products import float32_products
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares

# Columns of a triangular inverse that are solved for at a time; above them all is zero.
_STRIP = 2048


def inverse_of(matrix: Tensor, shares: Shares = WHOLE) -> Tensor:
    """The inverse of a positive definite matrix (d, d); each process solves for some columns.

    All processes have the same matrix and must call this function.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    lower = _cholesky(matrix)
    own = shares.rows(len(matrix))
    columns = torch.zeros_like(lower[:, own])
    columns[own].fill_diagonal_(1.0)
    # Symmetric, so that columns are rows.
    rows = torch.cholesky_solve(columns, lower).T.to(matrix.dtype)
    return shares.gathered(rows.contiguous(), len(matrix))


def _cholesky(matrix: Tensor) -> Tensor:
    """Its lower factor, (d, d), in float64 where there is none in float32: slower, and no worse."""
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        lower, _ = torch.linalg.cholesky_ex(matrix.double(), check_errors=True)
    return lower


def inverse_factor(matrix: Tensor) -> Tensor:
    """U, (d, d) upper triangular with a positive diagonal, with UᵀU = A⁻¹ for a given A.

    With rows and columns in reverse order A is LLᵀ and U is L⁻¹, so that neither the inverse nor a
    second Cholesky factor is made.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    lower = _cholesky(matrix.flip(0, 1))
    found = torch.zeros(lower.shape, dtype=lower.dtype, device=lower.device)
    with float32_products():
        for begin in range(0, len(lower), _STRIP):
            strip = slice(begin, begin + _STRIP)
            found[begin:, strip].fill_diagonal_(1.0)
            found[begin:, strip] = torch.linalg.solve_triangular(
                lower[begin:, begin:], found[begin:, strip], upper=False
            )
    del lower
    return found.flip(0, 1).to(matrix.dtype)
