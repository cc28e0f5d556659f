"""The inverse of a curvature, and a triangular factor of the inverse, by Cholesky in float32.

For the widest layers of a large model these cost as much as what is done with them. Columns of an
inverse do not depend on each other, so that processes that share a run share them, too. Where
rounding to float32 leaves a matrix without a factor, or makes an inverse that does not undo it,
float64 is taken.
"""

import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.products import float32_products
from prox24_deploy.pruning.solvers.shares import WHOLE, Shares

# Columns of a triangular inverse that are solved for at a time; above them all is zero.
_STRIP = 2048
# The matrix times its inverse times a vector may depart from the vector by this share of it.
_SOUND = 0.01


def inverse_of(matrix: Tensor, shares: Shares = WHOLE) -> Tensor:
    """The inverse of a positive definite matrix (d, d); each process solves for some columns.

    All processes have the same matrix and must call this function.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    own = shares.rows(len(matrix))
    rows = _rows_of_inverse(matrix, own)
    vector = torch.zeros_like(matrix[0])
    vector[own] = _probe(matrix)[own]
    solved = rows.T @ vector[own].to(rows.dtype)
    if shares.total(float(not _restores(matrix, solved, vector))):
        rows = _rows_of_inverse(matrix.double(), own)
    return shares.gathered(rows.to(matrix.dtype), len(matrix))


def _rows_of_inverse(matrix: Tensor, own: slice) -> Tensor:
    """Some rows of the inverse, (n, d)."""
    lower = _cholesky(matrix)
    columns = torch.zeros_like(lower[:, own])
    columns[own].fill_diagonal_(1.0)
    # Symmetric, so that columns are rows.
    return torch.cholesky_solve(columns, lower).T.contiguous()


def _probe(matrix: Tensor) -> Tensor:
    """A vector (d,) that lies in no particular direction, the same in all processes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(matrix), generator=generator).to(matrix)


def _restores(matrix: Tensor, solved: Tensor, vector: Tensor) -> bool:
    """Whether a matrix gives back the vector (d,) of which its inverse made another."""
    with float32_products():
        left = matrix @ solved.to(matrix.dtype) - vector
    # Not where it is NaN.
    return bool(left.norm() <= _SOUND * vector.norm())


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
    found, vector = _inverse_factor(matrix), _probe(matrix)
    with float32_products():
        solved = found.T @ (found @ vector.to(found.dtype))
    if not _restores(matrix, solved, vector):
        found = _inverse_factor(matrix.double())
    return found.to(matrix.dtype)


def _inverse_factor(matrix: Tensor) -> Tensor:
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
    return found.flip(0, 1)
