"""Quantiles and intervals against tables, integration and simulation."""

import math

import numpy as np
import pytest

from prox24_deploy.core.intervals import (
    around,
    around_metric,
    judge,
    standard_error,
    student_95,
    unpaired_difference,
    worst,
)
from prox24_deploy.core.records import DirectMetric, Estimate, Interval

# Of any table of Student's t, two-sided 95 %.
TABLE = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042,
    60: 2.000, 120: 1.980, 200: 1.972, 201: 1.972, 1000: 1.962, 10**9: 1.960,
}  # fmt: skip


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_table(degrees: int, quantile: float) -> None:
    assert student_95(degrees) == pytest.approx(quantile, abs=5.1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 28, 200, 201, 500])
def test_the_density_holds_95_percent_within_the_quantile(degrees: int) -> None:
    """Gauss-Legendre over the density itself, whose constant comes from the gamma function."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    quantile = student_95(degrees)
    t = quantile * nodes
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    density = constant / math.sqrt(degrees * math.pi) * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert quantile * float(weights @ density) == pytest.approx(0.95, abs=1e-8)


def test_quantiles_fall_to_the_normal_one_and_need_a_degree_of_freedom() -> None:
    found = [student_95(degrees) for degrees in range(1, 400)]
    assert found == sorted(found, reverse=True)
    with pytest.raises(ValueError, match="no 0 degrees of freedom"):
        student_95(0)


@pytest.mark.parametrize("samples", [3, 5, 30])
def test_intervals_of_few_samples_hold_the_truth_95_times_in_100(samples: int) -> None:
    """With 1.96 standard errors, three samples would hold it 81 times in 100."""
    draws = np.random.default_rng(samples).normal(1.0, 0.5, (4000, samples))
    inside = 0
    for draw in draws:
        error = float(draw.std(ddof=1)) / math.sqrt(samples)
        interval = around(Estimate(value=float(draw.mean()), standard_error=error), samples)
        inside += interval.low <= 1.0 <= interval.high
    assert inside / len(draws) == pytest.approx(0.95, abs=0.012)
    assert standard_error(
        around(Estimate(value=1.0, standard_error=0.3), samples), samples
    ) == pytest.approx(0.3)


def agreement(values: list[float], name: str = "nearest-neighbour agreement") -> Interval:
    array = np.array(values)
    spread = float(array.std(ddof=1)) if len(values) > 1 else 0.0
    found = Estimate(value=float(array.mean()), standard_error=spread / math.sqrt(len(values)))
    metric = DirectMetric(
        name=name,
        higher_is_better=True,
        samples=len(values),
        agreement=found,
        values=tuple(values),
    )
    return around_metric(found, metric)


@pytest.mark.parametrize("samples", [2, 10, 59])
def test_samples_that_all_agree_are_no_proof(samples: int) -> None:
    interval = agreement([1.0] * samples)
    assert interval.low == pytest.approx(1 - 3 / samples)
    # What fails once in 20 shows no failure among so many with a chance of at least 5 %.
    assert 0.95**samples >= 0.048
    assert interval.low <= 0.95
    assert agreement([1.0] * 61).low > 0.95
    assert agreement([0.97] * samples, "embedding cosine").low < 0.95


def test_a_share_near_one_is_not_surer_than_if_none_had_failed() -> None:
    """Where the true share is 0.95, the 2.5 % tail stays below that with either rule."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        values = (random.random(60) < 0.95).astype(float)
        wrong += agreement(values.tolist()).low > 0.95
    assert wrong / 2000 <= 0.05


def test_values_that_vary_and_metrics_without_bounds_keep_their_own_interval() -> None:
    values = np.random.default_rng(1).normal(0.96, 0.02, 40).clip(0, 1).tolist()
    interval = agreement(values, "embedding cosine")
    error = float(np.std(values, ddof=1)) / math.sqrt(40)
    assert interval.value - interval.low == pytest.approx(student_95(39) * error)
    same = agreement([0.3] * 5, "KL divergence")
    assert same.high - same.low == pytest.approx(0, abs=1e-12)


def test_a_difference_of_two_means_has_the_fewer_degrees_of_freedom() -> None:
    found = unpaired_difference(
        Estimate(value=2.0, standard_error=0.3), Estimate(value=1.0, standard_error=0.4), 5
    )
    assert found.value == 1.0
    assert found.high - found.value == pytest.approx(0.5 * student_95(4))


def test_the_whole_interval_decides() -> None:
    assert judge(Interval(value=0, low=-1, high=1), 1) == "pass"
    assert judge(Interval(value=0, low=-1, high=1), 0.5) == "inconclusive"
    assert judge(Interval(value=0, low=-1, high=1), -1) == "inconclusive"
    assert judge(Interval(value=0, low=-1, high=1), -1.1) == "fail"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["fail", "inconclusive"]) == "fail"
    assert worst([]) == "pass"
