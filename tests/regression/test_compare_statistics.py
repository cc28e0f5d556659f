"""How often a gate is wrong, by simulation of whole measurements with fixed seeds."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from builders import make_records

from prox24_deploy.config.limits import GivenLimits, MetricLimits, MetricTable
from prox24_deploy.core.intervals import (
    judge,
    median_ratio_interval,
    paired_difference,
    ratio_of_intervals,
    unpaired_difference,
)
from prox24_deploy.core.records import Estimate, LatencyRow, PairedMetric
from prox24_deploy.core.types import Judgement
from prox24_deploy.latency.measure import (
    DEFAULT_OPTIONS,
    PairSamples,
    latency_verdict,
    speedup_interval,
    timing,
)
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.compare import compare_reports
from prox24_deploy.report.schema import Report

RUNS = 200
NOISE = 0.05
# Two and a half binomial standard deviations over 5 % of RUNS.
ALARMS = round(RUNS * 0.05 + 2.5 * (RUNS * 0.05 * 0.95) ** 0.5)
SPEED_UP, LATENCY = (
    "speed-up/onnxruntime/batch=1,sequence=128",
    "latency/onnxruntime/batch=1,sequence=128",
)


def table(name: str, **limits: float) -> MetricTable:
    keys = {key.replace("_", "-"): value for key, value in limits.items()}
    return {"*": MetricLimits(), name: MetricLimits.model_validate(keys)}


@pytest.fixture(scope="module")
def plain() -> Report:
    return make_records(gated=True).report()


def measured(
    plain: Report,
    seed: int,
    *,
    slowdown: float = 0.0,
    drift: float = 0.0,
    noise: float = NOISE,
    rounds: int = DEFAULT_OPTIONS.min_rounds,
) -> Report:
    """A report with one row of latency; `drift` slows both twins and is never in the ratio."""
    random = np.random.default_rng(seed)
    draw: npt.NDArray[np.float64] = 1 + random.gamma(4.0, noise / 2, (2, rounds, 1))
    both = 10.0 * (1 + drift) * draw
    pair = PairSamples(both[0], both[1] * (1 + slowdown))
    speedup = speedup_interval(pair, resamples=400, seed=seed)
    row: LatencyRow = replace(
        plain.latency[0],
        dense=timing(pair.dense),
        sparse=timing(pair.sparse),
        speedup=speedup,
        verdict=latency_verdict(speedup, 0.02),
    )
    return plain.model_copy(update={"latency": (row,)})


def verdicts_of(
    pairs: Iterator[tuple[Report, Report]], name: str, limits: MetricTable
) -> Counter[Judgement]:
    found: Counter[Judgement] = Counter()
    for new, old in pairs:
        comparison = compare_reports(
            new, Baseline(source="before", report=old), limits=GivenLimits(metrics=limits)
        )
        change = next(change for change in comparison.changes if change.name == name)
        assert change.gated
        found[change.verdict] += 1
    return found


@pytest.mark.parametrize(
    "rounds", [DEFAULT_OPTIONS.min_rounds, pytest.param(60, marks=pytest.mark.large)]
)
def test_no_change_fails_in_at_most_5_percent_even_without_any_tolerance(
    plain: Report, rounds: int
) -> None:
    """The hardest case: the limit is no change at all, and nothing changed."""
    pairs = (
        (measured(plain, 2 * i, rounds=rounds), measured(plain, 2 * i + 1, rounds=rounds))
        for i in range(RUNS)
    )
    found = verdicts_of(pairs, SPEED_UP, table(SPEED_UP, max_degradation_percent=0))
    assert found["fail"] <= ALARMS
    assert found["inconclusive"] > RUNS / 2


def test_no_change_never_fails_the_default_limits_and_drift_of_the_machine_does_not_either(
    plain: Report,
) -> None:
    failed = 0
    for i in range(RUNS // 3):
        drift = (i % 5 - 2) / 10
        new, old = measured(plain, 2 * i, drift=drift), measured(plain, 2 * i + 1)
        comparison = compare_reports(new, Baseline(source="before", report=old))
        failed += any(
            change.verdict == "fail"
            for change in comparison.changes
            if change.name in {SPEED_UP, LATENCY}
        )
    assert failed <= RUNS / 3 * 0.05


@pytest.mark.parametrize(
    "rounds", [DEFAULT_OPTIONS.min_rounds, pytest.param(60, marks=pytest.mark.large)]
)
def test_three_percent_slower_is_found_or_left_open_at_the_default_limit(
    plain: Report, rounds: int
) -> None:
    pairs = (
        (
            measured(plain, 2 * i, slowdown=0.03, rounds=rounds),
            measured(plain, 2 * i + 1, rounds=rounds),
        )
        for i in range(RUNS)
    )
    found = verdicts_of(pairs, SPEED_UP, table(SPEED_UP, max_degradation_percent=2))
    assert found["fail"] + found["inconclusive"] >= 0.95 * RUNS


def test_three_percent_slower_is_found_outright_where_there_are_enough_rounds(
    plain: Report,
) -> None:
    """So that the test above cannot hold by never deciding; 500 rounds are the most measured."""
    rounds, seeds = DEFAULT_OPTIONS.max_rounds, range(40)
    limits = table(SPEED_UP, max_degradation_percent=0)
    slower = (
        (
            measured(plain, 2 * i, slowdown=0.03, rounds=rounds),
            measured(plain, 2 * i + 1, rounds=rounds),
        )
        for i in seeds
    )
    assert verdicts_of(slower, SPEED_UP, limits)["fail"] >= 0.95 * len(seeds)
    tolerant = table(SPEED_UP, max_degradation_percent=5)
    same = (
        (measured(plain, 2 * i, rounds=rounds), measured(plain, 2 * i + 1, rounds=rounds))
        for i in seeds
    )
    assert verdicts_of(same, SPEED_UP, tolerant)["pass"] >= 0.95 * len(seeds)


def test_a_large_slowdown_fails_the_latency_too_and_a_slow_machine_leaves_it_open(
    plain: Report,
) -> None:
    limits = table(LATENCY, max_degradation_percent=10)
    seeds = range(60)
    slower = ((measured(plain, 2 * i, slowdown=0.3), measured(plain, 2 * i + 1)) for i in seeds)
    assert verdicts_of(slower, LATENCY, limits)["fail"] >= 0.95 * len(seeds)
    drifted = ((measured(plain, 2 * i, drift=0.3), measured(plain, 2 * i + 1)) for i in seeds)
    found = verdicts_of(drifted, LATENCY, limits)
    assert found["fail"] <= 0.05 * len(seeds)
    assert found["pass"] == 0


@pytest.mark.parametrize("rounds", [20, 60])
def test_ratio_intervals_hold_the_truth_about_95_times_in_100(rounds: int) -> None:
    inside = Counter[str]()
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        new, old = (1 + random.gamma(4.0, NOISE / 2, (2, rounds, 1)) for _ in range(2))
        pairs = [PairSamples(part[0], part[1] / 1.3) for part in (new, old)]
        first, second = (speedup_interval(pair, resamples=400, seed=seed) for pair in pairs)
        speed = ratio_of_intervals(first, second)
        inside["speed-up"] += speed.low <= 1 <= speed.high
        value = float(np.median(new[0]) / np.median(old[0]))
        plain_ratio = median_ratio_interval(
            new[0].ravel().tolist(), old[0].ravel().tolist(), value, resamples=400, seed=seed
        )
        inside["latency"] += plain_ratio.low <= 1 <= plain_ratio.high
    assert min(inside.values()) >= RUNS - ALARMS, inside


def test_pairs_see_a_change_that_hides_in_the_spread_of_the_text() -> None:
    """Texts differ by 1, the change is 0.02: samples in pairs find it, means do not."""
    found: Counter[str] = Counter()
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        text = random.normal(3.0, 1.0, 256)
        old, new = text, text + random.normal(0.02, 0.05, 256)
        paired = paired_difference(new.tolist(), old.tolist())
        means = [
            Estimate(value=float(x.mean()), standard_error=float(x.std(ddof=1)) / 16)
            for x in (new, old)
        ]
        found[f"paired {judge(paired, 0.0)}"] += 1
        found[f"unpaired {judge(unpaired_difference(means[0], means[1], 256), 0.0)}"] += 1
    assert found["paired fail"] >= 0.95 * RUNS
    assert found["unpaired inconclusive"] == RUNS


def test_unchanged_accuracy_rarely_fails_and_an_equal_one_never_does(plain: Report) -> None:
    name = "perplexity"
    limits = table(name, max_degradation=0)
    found: Counter[Judgement] = Counter()
    for seed in range(RUNS):
        random = np.random.default_rng(seed)
        text = random.normal(12.0, 2.0, 64)
        reports = [with_metric(plain, name, text + random.normal(0, 0.1, 64)) for _ in range(2)]
        found += verdicts_of(iter([(reports[0], reports[1])]), name, limits)
    assert found["fail"] <= ALARMS
    same = with_metric(plain, name, np.random.default_rng(0).normal(12.0, 2.0, 64))
    assert verdicts_of(iter([(same, same)]), name, limits) == {"pass": 1}


def with_metric(plain: Report, name: str, values: npt.NDArray[np.float64]) -> Report:
    found = Estimate(
        value=float(values.mean()), standard_error=float(values.std(ddof=1)) / len(values) ** 0.5
    )
    metric = PairedMetric(
        name=name,
        higher_is_better=False,
        samples=len(values),
        dense=found,
        sparse=found,
        difference=None,
        values=tuple(values.tolist()),
    )
    accuracy = plain.accuracy.model_copy(update={"metrics": (metric,)})
    return plain.model_copy(update={"accuracy": accuracy, "latency": ()})


@pytest.mark.parametrize(("new", "old"), [([1.0, 2.0], [1.0]), ([1.0], [1.0])])
def test_what_is_no_pairs_is_refused(new: list[float], old: list[float]) -> None:
    with pytest.raises(ValueError, match="are no pairs, expected two or more"):
        paired_difference(new, old)
