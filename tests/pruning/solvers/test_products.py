"""Products on tensor cores: what is meant to be exact is, and nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prox24_deploy.pruning.solvers import baselines
from prox24_deploy.pruning.solvers.products import (
    ExactFactor,
    _split,
    float32_products,
    tensor_cores,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_high_and_low_bits_sum_to_the_number() -> None:
    matrix = draw(64, 64) * torch.logspace(-30, 30, 64)
    high, low = _split(matrix)
    assert torch.equal(high.double() + low.double(), matrix.double())
    assert bool((low.abs() <= matrix.abs() * 2.0**-10).all())
    mantissa, _ = torch.frexp(high)
    assert torch.equal(mantissa * 2.0**11, (mantissa * 2.0**11).round())


@pytest.mark.parametrize("device", DEVICES)
def test_an_exact_product_is_as_exact_as_float32(device: str) -> None:
    rows, matrix = draw(96, 256, device=device), draw(256, 128, seed=1, device=device)
    exact = rows.double() @ matrix.double()
    size = rows.double().abs() @ matrix.double().abs()
    with tensor_cores(torch.device(device)):
        found = ExactFactor.of(matrix).after(rows)
    assert float(((found.double() - exact).abs() / size).max()) < 1e-6


@pytest.mark.gpu
def test_a_rounded_product_is_rounded_and_the_setting_comes_back() -> None:
    rows, matrix = draw(96, 256, device="cuda"), draw(256, 128, seed=1, device="cuda")
    exact = rows @ matrix
    with tensor_cores(rows.device):
        rounded = rows @ matrix
    assert not torch.equal(rounded, exact)
    assert torch.equal(rows @ matrix, exact)


def test_what_decides_about_tf32_comes_back_as_it_was() -> None:
    def decided() -> tuple[str, ...]:
        mkldnn: Any = torch.backends.mkldnn
        backends = (torch.backends.cuda.matmul, mkldnn.matmul)
        return torch.get_float32_matmul_precision(), *(one.fp32_precision for one in backends)

    before = decided()
    with tensor_cores(torch.device("cuda")):
        within = decided()
        with float32_products():
            assert decided() != within
        assert decided() == within
    assert decided() == before != within


def test_on_a_cpu_nothing_is_rounded() -> None:
    before = torch.get_float32_matmul_precision()
    with tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "begin", "end"), [(40, 0, 96), (70, 128, 256), (5, 256, 260)])
def test_a_block_of_sparsegpt_on_a_gpu_is_that_of_the_cpu(rows: int, begin: int, end: int) -> None:
    inputs = draw(600, 260).double()
    inverse = torch.linalg.inv(inputs.T @ inputs / 600 + 0.01 * torch.eye(260))
    factor = torch.linalg.cholesky(inverse, upper=True).float().contiguous()
    results = []
    for device in ("cpu", "cuda"):
        weight = draw(rows, 260, seed=1, device=device)
        mask = torch.zeros(rows, 260, dtype=torch.bool, device=device)
        errors = baselines._prune_block(weight, mask, factor.to(device), begin, end)
        results.append([each.cpu() for each in (weight, mask, errors)])
    (weight, mask, errors), found = results
    assert torch.equal(found[1], mask)
    torch.testing.assert_close(found[0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], errors, rtol=1e-5, atol=1e-5)
