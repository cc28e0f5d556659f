"""The measuring on a real engine: nothing is found where nothing is, a slow-down where it is."""

import math

import pytest
from measure_noise import COVERAGE, against_itself, bench, verdicts, with_slowdown

from prox24_deploy.latency.measure import MeasureOptions

pytestmark = pytest.mark.slow


@pytest.mark.large
def test_an_engine_against_itself_is_never_found_to_differ() -> None:
    """A hundred short measurements of one model, on whatever else this machine is doing."""
    with bench() as made:
        same = against_itself(made, 100, MeasureOptions(seconds=0.1))
    contained = sum(interval.low <= 1 <= interval.high for interval in same)
    # The true share must be 95 %; of a hundred, two standard errors fewer may be seen.
    error = 100 * math.sqrt(COVERAGE * (1 - COVERAGE) / 100)
    assert contained >= 100 * COVERAGE - 2 * error
    assert verdicts(same)["fail"] <= 100 * (1 - COVERAGE)


def test_a_planted_slowdown_is_found_and_a_small_one_never_passes() -> None:
    """Tests share their machine, so a small one may drown in noise, and then is inconclusive."""
    with bench() as made:
        large = verdicts(with_slowdown(made, 3, MeasureOptions(seconds=1), slowdown=0.3))
        small = verdicts(with_slowdown(made, 2, MeasureOptions(seconds=1)))
    assert large["fail"] >= 1
    assert large["pass"] == small["pass"] == 0
