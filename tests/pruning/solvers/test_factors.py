"""Inverses and their factors are those of float64, whatever is rounded outside and who solves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import correlated_layer
from torch import Tensor

from prox24_deploy.pruning.ranks import Ranks
from prox24_deploy.pruning.solvers import factors
from prox24_deploy.pruning.solvers.factors import inverse_factor, inverse_of
from prox24_deploy.pruning.solvers.products import tensor_cores

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of float32, times how much the curvature of these layers magnifies it.
_EXACT = 1e-4


def departure(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strip", [20, 96, 200])
def test_a_factor_is_that_of_the_inverse(
    device: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_STRIP", strip)
    curvature = correlated_layer(features=96).problem().curvature.to(device)
    right = torch.linalg.cholesky(torch.linalg.inv(curvature.double()), upper=True)
    with tensor_cores(curvature.device):
        found = inverse_factor(curvature)
    assert departure(found, right) < _EXACT
    assert torch.equal(found, found.triu())
    assert found.is_contiguous()


def near_singular(diagonal: float, device: str) -> Tensor:
    """Twelve directions and next to nothing besides; of whole numbers, so that it is exact."""
    rows = torch.randint(-1, 2, (96, 12), generator=torch.Generator().manual_seed(0)).float()
    matrix = rows @ rows.T
    matrix.diagonal().add_(diagonal)
    return matrix.to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_what_float32_cannot_factor_is_factored_in_float64(device: str) -> None:
    matrix = near_singular(2.0**-20, device)
    for each in (matrix, matrix.flip(0, 1)):
        assert torch.linalg.cholesky_ex(each).info > 0
    right = torch.linalg.inv(matrix.double())
    found, factor = inverse_of(matrix), inverse_factor(matrix)
    assert (found.dtype, factor.dtype) == (torch.float32, torch.float32)
    assert departure(found, right) < _EXACT
    assert departure(factor.double().T @ factor.double(), right) < _EXACT
    with pytest.raises(RuntimeError, match="not positive"):
        inverse_of(-torch.eye(3, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_an_inverse_that_does_not_undo_its_matrix_is_made_in_float64(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far enough from singular for a factor in float32.
    matrix = near_singular(2.0**-14, device)
    right = torch.linalg.inv(matrix.double())
    found, factor = inverse_of(matrix), inverse_factor(matrix)
    monkeypatch.setattr(factors, "_SOUND", torch.inf)
    poor, poor_factor = inverse_of(matrix), inverse_factor(matrix)
    assert departure(found, right) < 1e-6 < 1e-3 < departure(poor, right)
    product, poor_product = (each.double().T @ each.double() for each in (factor, poor_factor))
    assert departure(product, right) < 1e-6 < 1e-3 < departure(poor_product, right)


def part_of(matrix: Tensor, number: int, count: int) -> Tensor:
    """What one of some processes gives the others, which are not there."""
    own = Ranks(number, count, matrix.device)
    shares: Any = SimpleNamespace(
        rows=own.rows, gathered=lambda part, _: part, total=lambda value: value
    )
    return inverse_of(matrix, shares)


@pytest.mark.parametrize("device", DEVICES)
# With seven, the last has no column.
@pytest.mark.parametrize("count", [1, 2, 7])
def test_processes_share_an_inverse(device: str, count: int) -> None:
    curvature = correlated_layer(features=36).problem().curvature.to(device)
    right = torch.linalg.inv(curvature.double())
    with tensor_cores(curvature.device):
        found = torch.cat([part_of(curvature, number, count) for number in range(count)])
    assert found.shape == right.shape
    assert departure(found, right) < _EXACT
