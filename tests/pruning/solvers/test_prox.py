"""The exact prox against multi-start minimisation and against its own symmetries."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Array, prox_minimum, prox_objective

from prox24_deploy.pruning.solvers import prox
from prox24_deploy.pruning.solvers.prox import objective_24, prox_24
from prox24_deploy.sparsity.pattern import is_24

DRAW = np.random.default_rng(5)
FAMILIES: dict[str, Array] = {
    "gaussian": DRAW.normal(size=(12, 4)),
    "four equal": np.full((1, 4), 0.7),
    "three equal": np.array([[1.0, 1, 1, 0.2], [0.3, 0.3, 0.3, 1.0], [0.5, 0.5, 0.5, 0.0]]),
    "two equal": np.array([[1.0, 1, 0.4, 0.2], [1.0, 0.4, 0.4, 0.2], [1.0, 0.4, 0.2, 0.2]]),
    "zeros": np.array([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [1.0, -2, 0, 0], [0.0, 1, 0.5, -0.25]]),
    "spread": np.array([[1.0, 1e-3, 1e-6, 1e-9], [1.0, 1, 1e-8, 1e-8], [1e-3, 1, 1e-3, 1]]),
    "near dense": 1.0 + 1e-3 * DRAW.normal(size=(4, 4)),
}
# In units of 1 / largest magnitude: around 0.3 to 2 the number of non-zeros changes.
LAMBDAS = (1e-12, 1e-7, 1e-3, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 1.99, 2.01, 10.0, 1e6, 1e12)

CELL = st.lists(
    st.floats(-10, 10, allow_nan=False).map(lambda v: round(v, 3)), min_size=4, max_size=4
)
LAM = st.floats(1e-3, 30.0)


@pytest.fixture(autouse=True, scope="module", params=["eager", "compiled"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here holds for both forms of the operator, whatever the size of its input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prox, "COMPILED_FROM", 0 if request.param == "compiled" else 1 << 60)
        yield request.param


def solve(group: Array, lam: float, dtype: torch.dtype = torch.float64) -> Array:
    result: Array = prox_24(torch.from_numpy(group).to(dtype), lam).double().numpy()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_no_start_of_a_multi_start_search_finds_less(family: str) -> None:
    for lam in LAMBDAS:
        found = prox_objective(solve(FAMILIES[family], lam), FAMILIES[family], lam)
        for group, value in zip(FAMILIES[family], found, strict=True):
            best = prox_minimum(group, lam)
            assert value - best <= 1e-9 * max(best, 1e-3), (group, lam)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1.0, 1e6])
def test_float32_is_within_a_millionth_of_the_energy(family: str, magnitude: float) -> None:
    groups = (FAMILIES[family] * magnitude).astype(np.float32).astype(np.float64)
    energy = 0.5 * np.square(groups).sum(-1)
    for lam in (value / magnitude for value in LAMBDAS):
        single = prox_objective(solve(groups, lam, torch.float32), groups, lam)
        double = prox_objective(solve(groups, lam), groups, lam)
        assert (single - double <= 1e-6 * energy).all()


def test_lambda_times_weight_may_underflow() -> None:
    """λz of 1e-44 is subnormal in float32; the group must come back almost unchanged, not zero."""
    group = torch.full((1, 4), 1e-20)
    assert torch.allclose(prox_24(group, 1e-24), group, rtol=1e-6, atol=0.0)


def test_lambda_zero_is_the_identity_bit_for_bit() -> None:
    weight = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prox_24(weight, 0.0), weight)


@pytest.mark.parametrize("lam", [1e-6, 1.0, 1e6])
def test_24_groups_are_fixed_points_bit_for_bit(lam: float) -> None:
    weight = torch.tensor([[1.5, 0.0, -2.5, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(prox_24(weight, lam), weight)


def test_a_large_lambda_gives_the_projection() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert prox_24(weight, 1e3).tolist() == [[3.0, 0.0, 2.0, 0.0]]
    assert not bool(torch.signbit(prox_24(weight, 1e3))[0, 1])


def test_zeros_are_positive() -> None:
    weight = torch.tensor([[-3.0, -1.0, -2.0, -0.5, -0.0, -0.0, 1.0, 0.0]])
    for lam in (0.0, 0.2, 5.0):
        result = prox_24(weight, lam)
        assert not bool(torch.signbit(result[result == 0]).any())


def test_every_group_is_24_beyond_the_threshold() -> None:
    """λ times the largest magnitude above 2 always leaves two non-zeros."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    smallest = weight.unflatten(-1, (-1, 4)).abs().amax(-1).min()
    assert is_24(prox_24(weight, 2.001 / float(smallest)))
    assert not is_24(prox_24(weight, 0.01))


def test_a_lambda_per_row_is_the_rows_one_by_one() -> None:
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    lam = torch.tensor([0.0, 0.1, 0.5, 1.0, 100.0])
    together = prox_24(weight, lam[:, None])
    for row in range(5):
        assert torch.equal(together[row], prox_24(weight[row], float(lam[row])))


def test_more_groups_than_one_chunk_are_the_chunks_one_by_one() -> None:
    weight = torch.randn(3, 4 * 30000, generator=torch.Generator().manual_seed(3))
    together = prox_24(weight, 0.6)
    for row in range(3):
        assert torch.equal(together[row], prox_24(weight[row], 0.6))


@pytest.mark.parametrize("per_row", [1, 7, 511, 512, 513, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_does_not_depend_on_its_block(per_row: int, dtype: torch.dtype) -> None:
    """Rows may start anywhere in a block of 512 groups, beside rows with more or no work."""
    lam = torch.tensor([0.3, 0.0, 1.0, 100.0, 1e-9, 0.6, 3.0], dtype=dtype)[:, None]
    weight = torch.randn(7, 4 * per_row, generator=torch.Generator().manual_seed(6), dtype=dtype)
    together = prox_24(weight, lam)
    for row in range(7):
        alone = prox_24(weight[row], float(lam[row]))
        assert torch.equal(together[row], alone)
        assert torch.equal(prox_24(weight[row, :4], float(lam[row])), alone[:4])
    backwards = prox_24(weight.unflatten(1, (-1, 4)).flip(0, 1).flatten(1), lam.flip(0))
    assert torch.equal(backwards.unflatten(1, (-1, 4)).flip(0, 1).flatten(1), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_groups_share_a_block_with_any_other(dtype: torch.dtype) -> None:
    """Ties, zeros and vanishing roots take the same vector instructions as their neighbours."""
    groups = np.concatenate(list(FAMILIES.values()))
    for lam in LAMBDAS:
        weight = torch.from_numpy(groups).to(dtype)
        alone = torch.cat([prox_24(group, lam) for group in weight])
        assert bool(alone.isfinite().all())
        assert torch.equal(prox_24(weight, lam).flatten(), alone)
        assert torch.equal(prox_24(weight.flatten(), lam), alone)


def test_the_last_axis_must_be_whole_groups() -> None:
    with pytest.raises(ValueError, match="last axis has length 6"):
        prox_24(torch.zeros(2, 6), 1.0)


def test_the_objective_is_that_of_the_definition() -> None:
    candidate, weight = DRAW.normal(size=(2, 7, 4))
    expected = prox_objective(candidate, weight, 0.3)
    found = objective_24(torch.from_numpy(candidate), torch.from_numpy(weight), 0.3)
    assert np.allclose(found.numpy()[:, 0], expected, rtol=1e-14)


@settings(max_examples=80)
@given(group=CELL, lam=LAM, signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_signs_carry_through(group: list[float], lam: float, signs: list[float]) -> None:
    z, s = np.array(group), np.array(signs)
    assert np.array_equal(solve(s * z, lam), s * solve(z, lam))


@settings(max_examples=80)
@given(group=CELL, lam=LAM, order=st.permutations(range(4)))
def test_the_order_of_a_group_does_not_matter(
    group: list[float], lam: float, order: list[int]
) -> None:
    z = np.array(group)
    direct, permuted = solve(z, lam), solve(z[order], lam)
    assert np.allclose(np.sort(np.abs(direct)), np.sort(np.abs(permuted)), rtol=1e-12, atol=0)
    if len(set(np.abs(z))) == 4:
        assert np.allclose(permuted, direct[order], rtol=1e-12, atol=0)


@settings(max_examples=80)
@given(group=CELL, lam=LAM, exponent=st.integers(-30, 30))
def test_a_power_of_two_scales_out(group: list[float], lam: float, exponent: int) -> None:
    """prox(c z, λ / c) = c prox(z, λ), exactly so in binary arithmetic."""
    z, c = np.array(group), math.ldexp(1.0, exponent)
    assert np.allclose(solve(c * z, lam / c), c * solve(z, lam), rtol=1e-12, atol=0)


@settings(max_examples=80)
@given(group=CELL, lam=LAM, factor=st.floats(1.001, 10.0))
@example(group=[0.0, 1.0, 1.0, 1.93], lam=0.625, factor=2.0)
def test_a_larger_lambda_never_has_the_larger_regulariser(
    group: list[float], lam: float, factor: float
) -> None:
    z = np.array(group)
    energy = 0.5 * float(z @ z)
    small, large = solve(z, lam), solve(z, factor * lam)
    penalty = [float(prox_objective(w, w, 1.0)) for w in (small, large)]
    assert penalty[1] <= penalty[0] + 1e-9 * (energy / lam + 1)
    assert (np.abs(small) <= np.abs(z)).all()


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05])
def test_both_forms_agree_on_large_matrices(spread: float) -> None:
    """Elements of one size are where supports of two, three and four are near in objective."""
    draw = torch.randn(64, 4096, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = draw if spread == 1 else 1 + spread * draw
    lam = torch.linspace(0.0, 4.0, 64, dtype=torch.float64)[:, None]
    eager = prox._prox_eager(weight, lam, 12)
    compiled = prox_24(weight, lam)
    gap = objective_24(compiled, weight, lam) - objective_24(eager, weight, lam)
    assert float(gap.abs().max()) < 1e-13
    assert float(((eager != 0) == (compiled != 0)).double().mean()) > 0.9999


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_a_nearly_double_root_is_found(spread: float) -> None:
    """Close to y = (√½, √½, ½) three and two are as good, and steps towards three get short."""
    draw = spread * torch.randn(
        1 << 16, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    large = math.sqrt(0.5) * (1 + draw[:, :2])
    third = large.prod(1) * (1 + 1e-2 * draw[:, 2])
    groups = torch.stack([*large.T, third, draw[:, 3].abs()], 1)
    best = prox._prox_eager(groups, torch.ones(len(groups), 1, dtype=torch.float64), 60)
    gap = objective_24(prox_24(groups, 1.0), groups, 1.0) - objective_24(best, groups, 1.0)
    assert float(gap.max()) < 1e-12


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05])
def test_four_win_only_where_three_beat_two(spread: float) -> None:
    """The eager form compares all candidates; the others rely on this."""
    groups = 1 + spread * torch.randn(
        1 << 17, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    groups = groups.abs()
    lam = torch.empty(len(groups), 1, dtype=torch.float64).uniform_(
        0.2, 1.2, generator=torch.Generator().manual_seed(7)
    )
    four = (prox_24(groups, lam, newton_iterations=12) != 0).all(1)
    without = groups.masked_fill(groups == groups.amin(1, keepdim=True), 0.0)
    three = (prox_24(without, lam, newton_iterations=12) != 0).sum(1) == 3
    assert 1000 < int(four.sum()) < len(four) - 1000
    assert int((three & ~four).sum()) > 0
    assert int((four & ~three).sum()) == 0
