"""Accuracy against the dense model: each kind of metric at both sides of its limit."""

import math
from dataclasses import replace

import numpy as np
import pytest
from builders import perplexities

from prox24_deploy.config.limits import Limits, MetricLimits, MetricTable
from prox24_deploy.core.intervals import FEW
from prox24_deploy.core.records import DirectMetric, Estimate, Metric, PairedMetric
from prox24_deploy.core.types import Verdict
from prox24_deploy.report.against_dense import Group, Judged, judge_metrics

SHARP = 1e-5


def limits(**given: float) -> MetricLimits:
    return MetricLimits.model_validate({k.replace("_", "-"): float(v) for k, v in given.items()})


def paired(
    name: str, dense: float, sparse: float, error: float, samples: int = 500
) -> PairedMetric:
    return PairedMetric(
        name=name,
        higher_is_better=name != "word error rate",
        samples=samples,
        dense=Estimate(value=dense, standard_error=0.01),
        sparse=Estimate(value=sparse, standard_error=0.01),
        difference=Estimate(value=sparse - dense, standard_error=error),
    )


def direct(name: str, value: float, error: float, samples: int = 500) -> DirectMetric:
    higher = name not in {"KL divergence", "score change", "word error rate to dense"}
    return DirectMetric(
        name=name,
        higher_is_better=higher,
        samples=samples,
        agreement=Estimate(value=value, standard_error=error),
    )


def judged(task: str, *metrics: Metric, table: MetricTable | None = None) -> list[Judged]:
    names = [metric.name for metric in metrics]
    applied = Limits().over_defaults(task, names).against_dense if table is None else table
    return list(judge_metrics([Group("", metrics)], applied))


@pytest.mark.parametrize(
    ("sparse", "verdict"), [(12.8, "pass"), (12.95, "fail"), (11.0, "pass"), (33.6, "fail")]
)
def test_perplexity_may_rise_by_a_tenth(sparse: float, verdict: Verdict) -> None:
    """11.7 may become 12.87; 64 windows tell 0.07 from it."""
    found, log = judged("text-generation", *perplexities(11.7, sparse, 64, spread=0.01))
    assert found.check.verdict == verdict
    assert found.check.limit == pytest.approx(12.87)
    assert found.check.value == pytest.approx(sparse)
    assert log.check.verdict == "not gated"
    assert log.check.message.endswith("not gated, it informs")


def test_perplexity_is_judged_by_the_pairs_of_its_logarithm() -> None:
    """Windows differ by 0.3 nats each, the models by 0.01: only their difference decides."""
    metric, log = perplexities(11.7, 12.4, 64, spread=0.01)
    assert metric.sparse is not None
    assert metric.sparse.standard_error > 0.4
    (found, _) = judged("text-generation", metric, log)
    assert found.check.verdict == "pass"
    assert "perplexity +5.98 %, 11.70 → 12.40, 64 samples" in found.check.message
    assert log.difference is not None
    margin = 1.998 * log.difference.standard_error
    low, high = (100 * math.expm1(math.log(12.4 / 11.7) + side * margin) for side in (-1, 1))
    assert f"95 % interval {low:+.3g} % to {high:+.3g} %" in found.check.message
    assert found.check.message.endswith("limit: at most 10 % worse than dense")


@pytest.mark.parametrize(
    ("given", "sparse", "verdict"),
    [
        ({"threshold": 13}, 12.0, "pass"),
        ({"threshold": 13}, 14.5, "fail"),
        ({"threshold": 0}, 11.0, "fail"),
        ({"max_degradation": 1}, 12.6, "pass"),
        ({"max_degradation": 1}, 12.8, "fail"),
        ({"min_improvement": 1}, 10.6, "pass"),
        ({"min_improvement": 1}, 10.8, "fail"),
        ({"min_improvement": 12}, 10.8, "fail"),
        ({"max_degradation_standard_errors": 3}, 11.7 * math.exp(2.9 * 0.001), "pass"),
        ({"max_degradation_standard_errors": 3}, 11.7 * math.exp(3.1 * 0.001), "fail"),
        ({"max_degradation_percent": 10, "threshold": 12}, 12.5, "fail"),
    ],
)
def test_every_kind_of_limit_applies_to_perplexity(
    given: dict[str, float], sparse: float, verdict: Verdict
) -> None:
    """Standard errors of 0.001 in the logarithm, of either model and of the difference."""
    metric, log = perplexities(11.7, sparse, 64)
    sharp = Estimate(value=math.log(sparse / 11.7), standard_error=0.001)
    log = replace(
        log, sparse=Estimate(value=math.log(sparse), standard_error=0.001), difference=sharp
    )
    found = judged("text-generation", metric, log, table={"perplexity": limits(**given)})[0]
    assert found.check.verdict == verdict


@pytest.mark.parametrize(
    ("task", "metric", "verdict"),
    [
        ("feature-extraction", direct("embedding cosine", 0.953, 0.001), "pass"),
        ("feature-extraction", direct("embedding cosine", 0.951, 0.001), "inconclusive"),
        ("feature-extraction", direct("embedding cosine", 0.940, 0.001), "fail"),
        ("text-encoding", direct("nearest-neighbour agreement", 0.86, 0.02), "pass"),
        ("text-encoding", direct("nearest-neighbour agreement", 0.77, 0.02), "inconclusive"),
        ("text-encoding", direct("nearest-neighbour agreement", 0.70, 0.02), "fail"),
        ("image-classification", paired("accuracy", 0.80, 0.79, 0.004), "pass"),
        ("image-classification", paired("accuracy", 0.80, 0.78, 0.004), "inconclusive"),
        ("image-classification", paired("accuracy", 0.80, 0.75, 0.004), "fail"),
        ("text-classification", direct("top-1 agreement", 0.97, 0.005), "pass"),
        ("text-classification", direct("top-1 agreement", 0.93, 0.005), "fail"),
        ("text-classification", direct("score change", 0.20, 0.01), "pass"),
        ("text-classification", direct("score change", 0.30, 0.01), "fail"),
        ("automatic-speech-recognition", paired("word error rate", 0.1, 0.11, 0.003), "pass"),
        ("automatic-speech-recognition", paired("word error rate", 0.1, 0.15, 0.003), "fail"),
        ("automatic-speech-recognition", direct("word error rate to dense", 0.02, 0.01), "pass"),
        ("automatic-speech-recognition", direct("word error rate to dense", 0.09, 0.01), "fail"),
        ("text-generation", direct("top-1 agreement", 0.2, 0.01), "not gated"),
        ("text-generation", direct("KL divergence", 2.0, 0.01), "not gated"),
    ],
)
def test_defaults_of_every_task(task: str, metric: Metric, verdict: str) -> None:
    (found,) = judged(task, metric)
    assert found.check.verdict == verdict
    assert (found.check.part, found.check.kind) == ("accuracy", "accuracy")


def test_tasks_of_the_harness_may_lose_two_points_and_other_figures_of_it_inform() -> None:
    group = Group("lm-eval/", (
        paired("arc/acc", 0.60, 0.59, 0.002),
        paired("arc/acc_norm", 0.60, 0.55, 0.002),
        paired("gsm8k/exact_match (strict-match)", 0.60, 0.55, 0.002),
        paired("squad/f1", 80.0, 60.0, 0.2),
    ))  # fmt: skip
    table = Limits().over_defaults("text-generation", []).against_dense
    assert [found.check.verdict for found in judge_metrics([group], table)] == [
        "pass", "fail", "fail", "not gated",
    ]  # fmt: skip


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("sparse", [11.7, 33.6])
def test_fewer_than_three_samples_decide_nothing(samples: int, sparse: float) -> None:
    found, _ = judged("text-generation", *perplexities(11.7, sparse, samples))
    assert found.check.verdict == "inconclusive"
    assert found.check.message.endswith("fewer than 3 samples decide nothing")
    assert found.wanted == FEW
    agreed = direct("embedding cosine", 1.0, 0.0, samples)
    assert judged("feature-extraction", agreed)[0].check.verdict == "inconclusive"


def test_three_windows_decide_by_students_t() -> None:
    """A rise of 8 % ± 0.5 %: 1.96 standard errors would keep the limit, 4.3 do not."""
    metric, log = perplexities(11.7, 11.7 * 1.08, 3)
    error = 0.008
    log = replace(log, difference=Estimate(value=math.log(1.08), standard_error=error))
    assert math.log(1.08) + 1.96 * error < math.log(1.10)
    assert judged("text-generation", metric, log)[0].check.verdict == "inconclusive"
    assert judged("text-generation", *perplexities(11.7, 33.6, 3))[0].check.verdict == "fail"


@pytest.mark.parametrize(
    ("samples", "verdict"), [(10, "inconclusive"), (59, "inconclusive"), (61, "pass")]
)
def test_samples_that_agree_prove_no_more_than_their_number(samples: int, verdict: str) -> None:
    values = (1.0,) * samples
    metric = replace(direct("top-1 agreement", 1.0, 0.0, samples), values=values)
    assert judged("image-classification", metric)[0].check.verdict == verdict
    same = replace(paired("accuracy", 0.5, 0.5, 0.0, samples), values=values)
    assert judged("image-classification", same)[0].check.verdict == "inconclusive"
    many = paired("accuracy", 0.5, 0.5, 0.0, 151)
    assert judged("image-classification", many)[0].check.verdict == "pass"


@pytest.mark.parametrize(
    "metric",
    [
        replace(paired("perplexity", 11.7, math.inf, 1.0), difference=None),
        paired("accuracy", math.nan, 0.5, 0.1),
        direct("embedding cosine", math.nan, 0.1),
        direct("embedding cosine", 0.99, math.inf),
        replace(direct("embedding cosine", 0.99, 0.1), agreement=None),
        replace(paired("accuracy", 0.5, 0.5, 0.1), sparse=None),
    ],
)
def test_a_figure_that_is_not_finite_fails_also_without_a_limit(metric: Metric) -> None:
    (found,) = judged("text-generation", metric, table={})
    assert (found.check.verdict, found.check.value) == ("fail", None)
    assert found.check.message.endswith("a figure is not finite")


def test_without_pairs_both_models_are_taken_as_independent() -> None:
    metric = replace(paired("perplexity", 11.7, 12.0, 0.1), difference=None, higher_is_better=False)
    metric = replace(
        metric,
        dense=Estimate(value=11.7, standard_error=0.3),
        sparse=Estimate(value=12.0, standard_error=0.4),
    )
    (found,) = judged("text-generation", metric)
    assert found.check.verdict == "inconclusive"
    assert "95 % interval −5.83 % to +11 %" in found.check.message


def test_a_limit_that_cannot_apply_to_a_direct_metric_does_not_pass() -> None:
    metric = direct("embedding cosine", 1.0, SHARP)
    (found,) = judged("feature-extraction", metric, table={"*": limits(max_degradation_percent=5)})
    assert found.check.verdict == "inconclusive"
    assert "does not apply to a metric that compares the models directly" in found.check.message


def test_so_many_samples_as_are_wanted_decide() -> None:
    """What would decide, were all else the same, does so once it is there."""
    few = direct("embedding cosine", 0.953, 0.002, 200)
    (found,) = judged("feature-extraction", few)
    assert found.check.verdict == "inconclusive"
    assert found.wanted is not None
    assert found.wanted > 200
    error = 0.002 * math.sqrt(200 / found.wanted)
    more = direct("embedding cosine", 0.953, error, found.wanted)
    assert judged("feature-extraction", more)[0].check.verdict == "pass"
    at_the_limit = direct("embedding cosine", 0.95, 0.002, 200)
    assert judged("feature-extraction", at_the_limit)[0].wanted is None


def test_unchanged_models_are_wrongly_failed_at_most_once_in_twenty() -> None:
    """No tolerance at all, and nothing changed but the noise of few windows."""
    table = {"perplexity": limits(max_degradation=0)}
    wrong = sum(
        judged("text-generation", *perplexities_by_chance(seed), table=table)[0].check.verdict
        == "fail"
        for seed in range(400)
    )
    assert wrong / 400 <= 0.045


def perplexities_by_chance(seed: int) -> tuple[Metric, ...]:
    gap = float(np.random.default_rng(seed + 10_000).normal(0, 0.05 / math.sqrt(5)))
    return perplexities(11.7, 11.7 * math.exp(gap), 5, spread=0.05, seed=seed)
