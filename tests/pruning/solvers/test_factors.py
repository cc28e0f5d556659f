"""Inverses and factors by halves and panels, against float64."""

import pytest
import torch
from torch import Tensor

from prox24_deploy.pruning.solvers import factors

SIZE = 84


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Positive definite, (d, d), and larger than a leaf and a panel."""
    monkeypatch.setattr(factors, "_LEAF", 16)
    monkeypatch.setattr(factors, "_PANEL", 20)
    rows = torch.randn(2 * SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows / len(rows) + 0.05 * torch.eye(SIZE)


def test_a_triangle_is_inverted(matrix: Tensor) -> None:
    lower = torch.linalg.cholesky(matrix)
    found = factors.inverse_triangle(lower)
    assert torch.equal(found, found.tril())
    exact = torch.linalg.inv(lower.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_factor_is_that_of_the_inverse(matrix: Tensor) -> None:
    found = factors.upper_factor_of_inverse(matrix)
    exact = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_an_inverse_of_panels_is_symmetric(matrix: Tensor) -> None:
    panels = factors._gram(factors.inverse_triangle(torch.linalg.cholesky(matrix)))
    assert torch.equal(panels, panels.T)
    exact = torch.linalg.inv(matrix.double())
    for found in (panels, factors.inverse_of(matrix)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_they_are_as_exact_as_float32() -> None:
    rows = torch.randn(12000, 5000, generator=torch.Generator().manual_seed(0))
    matrix = (rows.T @ rows / len(rows) + 0.02 * torch.eye(5000)).cuda()
    exact = torch.linalg.inv(matrix.double())
    size = exact.diagonal().mean()
    inverse, factor = factors.inverse_of(matrix), factors.upper_factor_of_inverse(matrix)
    for found in (inverse.double(), factor.double().T @ factor.double()):
        assert float((found - exact).abs().max() / size) < 1e-4
    in_float32 = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    bound = 2 * (in_float32.double() - exact).norm()
    assert bool((inverse.double() - exact).norm() < bound)
