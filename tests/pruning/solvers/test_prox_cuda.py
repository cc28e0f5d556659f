"""The kernel on a GPU against the form in float64, and its step of ADMM against its parts."""

import pytest
import torch
from torch import Tensor

from prox24_deploy.pruning.solvers.admm_step import AdmmState, admm_step
from prox24_deploy.pruning.solvers.prox import _prox_eager, objective_24, prox_24
from prox24_deploy.sparsity.pattern import is_24

pytestmark = pytest.mark.gpu
LAMBDAS = (1e-12, 1e-7, 1e-3, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 1.99, 2.01, 10.0, 1e6, 1e12)
SHAPES = ((1, 4), (3, 8), (5, 252), (4, 256), (2, 260), (65, 4096))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda")


def excess(found: Tensor, weight: Tensor, lam: float) -> float:
    """Largest excess of the objective over that of the eager form in float64, in ½|z|²."""
    exact = weight.double()
    best = _prox_eager(exact, torch.full_like(exact[..., :1], lam), 12)
    energy = 0.5 * exact.unflatten(-1, (-1, 4)).square().sum(-1)
    gap = objective_24(found.double(), exact, lam) - objective_24(best, exact, lam)
    return float((gap / energy.clamp_min(1e-300)).max())


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e6])
def test_no_group_loses_a_millionth_of_its_energy(lam: float, scale: float) -> None:
    weight = draw(8, 20_000) * scale
    assert excess(prox_24(weight, lam / scale), weight, lam / scale) <= 1e-6


def test_ten_million_groups_agree_with_float64() -> None:
    weight = draw(1000, 40_000)
    for lam in (0.1, 0.3, 1.0):
        assert excess(prox_24(weight, lam), weight, lam) <= 1e-6


# Close to a double root of Θ, where a short step does not mean that the root is near.
NEAR_DOUBLE = (
    (0.8945716619491577, 0.153156116604805, 0.1466154009103775, 0.14654318988323212),
    (0.6042792797088623, 0.44261789321899414, 0.29381200671195984, 0.29347023367881775),
    (0.8602483868598938, 0.16657081246376038, 0.1544986069202423, 0.15410062670707703),
    (0.6876869201660156, 0.3684598207473755, 0.28328797221183777, 0.28259649872779846),
    (0.6517788767814636, 0.6515418291091919, 0.42471256852149963, 0.42471256852149963),
    (0.9729954600334167, 0.029757753014564514, 0.02975156158208847, 0.029720695689320564),
    (0.7052615284919739, 0.306514173746109, 0.22250598669052124, 0.22250114381313324),
    (0.562954306602478, 0.5260156393051147, 0.4943268597126007, 0.4358568787574768),
    (0.6181232929229736, 0.4881103038787842, 0.4401470720767975, 0.4106013774871826),
)


def alone(groups: Tensor) -> Tensor:
    """Groups (n, 4) as rows of 32, the others zero: no group has company in its warp."""
    rows = torch.zeros(len(groups), 128, device="cuda")
    rows[:, :4] = groups
    return rows


def test_nearly_double_roots_are_found_without_company() -> None:
    known = torch.tensor(NEAR_DOUBLE, device="cuda")
    share = torch.rand(400_000, 4, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    first, second = 0.4 + 0.6 * share[:, 0], 0.1 + 0.3 * share[:, 1]
    third = second * (1 - 0.1 * share[:, 2])
    groups = torch.stack([first, second, third, third * (1 - 0.001 * share[:, 3])], 1)
    corner = torch.tensor([0.5**0.5, 0.5**0.5, 0.5, 0.5], device="cuda")
    around = (corner + draw(40_000, 4) * 10 ** (-6 * draw(40_000, 1).abs())).abs()
    for weight in map(alone, (known, groups, around.sort(1, descending=True).values)):
        found = prox_24(weight, 1.0)
        assert excess(found, weight, 1.0) <= 2e-7
        # The smallest is not kept where a larger one is dropped.
        assert not bool(((found[:, 2] == 0) & (found[:, 3] != 0)).any())


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    groups = draw(4096, 4)
    for lam in (0.3, 0.5, 1.0):
        together = prox_24(groups.view(16, -1), lam).view(-1, 4)
        assert torch.equal(prox_24(alone(groups), lam)[:, :4], together)


@pytest.mark.parametrize("lam", [1e-45, 1e-39, 1.1e-38, 1.3e-38])
def test_a_lambda_too_small_to_divide_by_changes_nothing(lam: float) -> None:
    weight = draw(4, 256)
    assert torch.equal(prox_24(weight, lam), weight)


@pytest.mark.parametrize("lam", [8e37, 3e38])
def test_a_lambda_too_large_to_divide_by_leaves_the_largest_two(lam: float) -> None:
    weight = draw(4, 256)
    assert torch.equal(prox_24(weight, lam), prox_24(weight, 1e12))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_ends_where_it_ends_and_has_a_lambda_of_its_own(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    lam = torch.linspace(0.0, 3.0, shape[0], device="cuda")[:, None]
    found = prox_24(weight, lam)
    for row in range(shape[0]):
        alone = prox_24(weight[row : row + 1], float(lam[row]))
        assert torch.equal(found[row : row + 1], alone)
    assert torch.equal(found[0], weight[0])


def test_groups_of_equal_elements_keep_the_first_ones() -> None:
    groups = torch.tensor(
        [[1.0, 1, 1, 1], [1, 0, 1, 2], [-1, 1, -1, 0], [0, 0, 0, 0], [0, -2, 0, 0], [3, 3, -3, 1]]
    )
    found = prox_24(groups.cuda(), 1e6).cpu()
    expected = torch.tensor(
        [[1.0, 1, 0, 0], [1, 0, 0, 2], [-1, 1, 0, 0], [0, 0, 0, 0], [0, -2, 0, 0], [3, 3, 0, 0]]
    )
    assert torch.equal(found, expected)
    assert not torch.signbit(found[found == 0]).any()
    assert torch.equal(prox_24(groups, 1e6), expected)


def test_masks_are_those_of_the_cpu_but_for_near_ties() -> None:
    weight = draw(64, 16_384)
    for lam in (0.3, 1.0, 10.0):
        here, there = prox_24(weight, lam).cpu() != 0, prox_24(weight.cpu(), lam) != 0
        assert (here == there).float().mean() >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_storage_alone(dtype: torch.dtype) -> None:
    weight = draw(16, 4096).to(dtype)
    found = prox_24(weight, 0.7)
    assert found.dtype == dtype
    assert torch.equal(found, prox_24(weight.float(), 0.7).to(dtype))


def test_what_is_not_contiguous_or_empty_is_served() -> None:
    weight = draw(4096, 64)
    assert torch.equal(prox_24(weight.t(), 0.7), prox_24(weight.t().contiguous(), 0.7))
    assert prox_24(torch.empty(0, 8, device="cuda"), 1.0).shape == (0, 8)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 10.0])
def test_a_step_of_admm_is_its_parts(lam: float) -> None:
    weight, dual, linear = (draw(48, 1020, seed=i) for i in range(3))
    rows = torch.full((48, 1), lam, device="cuda")
    state = AdmmState(weight, torch.empty_like(weight), dual.clone(), torch.empty_like(weight))
    admm_step(state, linear, rows, 0.7)
    split = state.split
    assert torch.equal(split, prox_24(weight + dual, rows))
    assert torch.equal(state.dual, weight + dual - split)
    torch.testing.assert_close(state.target, linear + 0.7 * (split - state.dual))
    if lam == 10.0:
        assert (split.view(-1, 4) != 0).sum(1).le(2).float().mean() > 0.99
    assert not is_24(weight)
