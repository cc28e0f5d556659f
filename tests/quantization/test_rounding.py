"""Rounding on a mask: what it never does, and that feedback pays."""

import pytest
import torch
from torch import Tensor

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.rounding import rounded_with_feedback, weight_scales
from prox24_deploy.sparsity.pattern import is_24, project_24

BOTH: list[QuantizedFormat] = ["fp8", "int8"]


def drawn(seed: int = 0, rows: int = 24, width: int = 256) -> tuple[Tensor, Tensor]:
    """A 2:4 weight, and correlated inputs with a few large channels."""
    draw = torch.Generator().manual_seed(seed)
    weight = project_24(torch.randn(rows, width, generator=draw))
    common = torch.randn(900, 8, generator=draw) @ torch.randn(8, width, generator=draw)
    inputs = common + 0.3 * torch.randn(900, width, generator=draw)
    inputs[:, :5] *= 8
    return weight, inputs


def problem_of(weight: Tensor, inputs: Tensor) -> LayerProblem:
    return layer_problem(weight, inputs.T @ inputs / len(inputs), 0.01)


@pytest.mark.parametrize("name", BOTH)
def test_feedback_keeps_the_mask_and_loses_less_than_the_nearest_numbers(
    name: QuantizedFormat,
) -> None:
    form = FORMATS[name]
    weight, inputs = drawn()
    scales = weight_scales(weight, inputs.square().mean(0), form)

    def error(numbers: Tensor) -> float:
        values = form.values(numbers, scales[:, None])
        return float((inputs @ (values - weight).T).square().sum())

    nearest = form.weight_numbers(weight, scales)
    made = rounded_with_feedback(problem_of(weight, inputs), weight, weight != 0, scales, form)
    assert made.dtype == form.dtype
    assert not bool(made.float()[weight == 0].any())
    assert is_24(made.float())
    assert error(made) < 0.6 * error(nearest)


@pytest.mark.parametrize("name", BOTH)
def test_without_correlation_there_is_nothing_to_make_up_for(name: QuantizedFormat) -> None:
    form = FORMATS[name]
    weight, _ = drawn(1)
    problem = layer_problem(weight, torch.diag(torch.linspace(0.5, 3.0, weight.shape[1])), 0.01)
    scales = weight_scales(weight, torch.ones(weight.shape[1]), form)
    made = rounded_with_feedback(problem, weight, weight != 0, scales, form)
    # The weight goes through the units of the problem and back, which may tip a tie.
    differs = made.float() != form.weight_numbers(weight, scales).float()
    assert float(differs.float().mean()) < 1e-3


def test_two_columns_that_are_the_same_share_an_error() -> None:
    # 1.4 + 1.4 is 2.8, nearest 1 + 1; the second column makes up for the first: 1 + 2.
    weight = torch.tensor([[1.4, 1.4]])
    problem = layer_problem(weight, torch.ones(2, 2), 1e-4)
    made = rounded_with_feedback(problem, weight, weight != 0, torch.ones(1), FORMATS["int8"])
    assert sorted(made[0].tolist()) == [1, 2]


def test_a_column_that_was_never_read_gets_the_nearest_numbers() -> None:
    weight, inputs = drawn(2)
    inputs[:, 7] = 0
    form = FORMATS["int8"]
    scales = weight_scales(weight, inputs.square().mean(0), form)
    made = rounded_with_feedback(problem_of(weight, inputs), weight, weight != 0, scales, form)
    assert torch.equal(made[:, 7], form.weight_numbers(weight, scales)[:, 7])


@pytest.mark.parametrize("name", BOTH)
def test_a_scale_is_chosen_by_what_matters_and_a_row_of_zeros_has_one(
    name: QuantizedFormat,
) -> None:
    form = FORMATS[name]
    weight, inputs = drawn(3)
    weight[4] = 0
    importance = inputs.square().mean(0)
    scales = weight_scales(weight, importance, form)
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, scales.bfloat16().float())
    assert float(scales[4]) == 1

    def error(chosen: Tensor) -> Tensor:
        values = form.values(form.weight_numbers(weight, chosen), chosen[:, None])
        return (values - weight).square() @ importance

    widest = weight_scales(weight, torch.zeros_like(importance), form)
    assert bool((error(scales) <= error(widest)).all())
    assert bool((error(scales) < error(widest)).any())
