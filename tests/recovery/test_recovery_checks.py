"""Warnings about recovery: overfitting, too few samples, and samples of another domain."""

import html
from dataclasses import replace

import pytest
from builders import (
    Records,
    all_skipped,
    make_records,
    perplexities,
    quantised,
    recovery,
    with_metrics,
)

from prox24_deploy.core.quantized import StraightThrough
from prox24_deploy.core.records import AccuracyStep, Estimate, EvaluateResult, PairedMetric
from prox24_deploy.core.recovery import RecoverResult, RecoveryPoint
from prox24_deploy.report.recovery_checks import recovery_warnings, training_warnings
from prox24_deploy.report.render import render_html


def warnings(found: RecoverResult, evaluate: EvaluateResult | None = None) -> list[str]:
    return list(recovery_warnings(found, evaluate or make_records(2).evaluate))


def curve(*points: tuple[int, float | None, float]) -> tuple[RecoveryPoint, ...]:
    return tuple(RecoveryPoint(step=s, trained=t, withheld=w) for s, t, w in points)


def test_a_loss_far_below_that_of_withheld_samples_says_that_these_are_few() -> None:
    # The text that was written to be trained on is no measure of that.
    points = curve((0, None, 0.62), (10, 0.1, 0.33))
    found = recovery(curve=points, kept=10, after=0.33, fitted=0.1)
    (said,) = warnings(found)
    assert "trained on (KL(dense, sparse) 0.1) far better than withheld ones (0.33)" in said
    assert warnings(replace(found, fitted=0.3)) == warnings(replace(found, fitted=None)) == []


def test_a_loss_that_rises_after_the_kept_step_is_overfitting() -> None:
    points = ((0, None, 0.62), (10, 0.3, 0.33))
    found = recovery(curve=curve(*points, (20, 0.2, 0.4)), kept=10, after=0.33)
    (said,) = warnings(found)
    assert "after step 10, whose weights are kept" in said
    assert "rose from 0.33 to 0.4; pass more text" in said
    assert warnings(replace(found, curve=curve(*points, (20, 0.2, 0.34)))) == []
    (said,) = warnings(replace(found, curve=curve(*points, (20, 0.5, 0.4))))
    assert "rose from 0.3 to 0.5 on what it was trained on, too" in said
    assert said.endswith(f"pass a smaller --recover-rate than {found.learning_rate:g}.")


def test_a_loss_that_is_too_large_names_recovery_where_there_was_none() -> None:
    def told(records: Records, sparse: float) -> bool:
        metrics = perplexities(11.7, sparse, 64, spread=0.01)
        said = with_metrics(records, "text-generation", *metrics).report().warnings
        return any("--recover 5min trains the kept weights" in one for one in said)

    records = make_records(2)
    assert told(records, 33.6)
    assert not told(records, 11.8)
    assert not told(replace(records, recover=recovery()), 33.6)
    assert not told(all_skipped(records), 33.6)


def test_numbers_that_training_left_as_they_were_are_a_warning() -> None:
    found = quantised(make_records(2)).quantize
    assert found is not None
    training = StraightThrough(
        loss="KL(dense, sparse)", steps=9, taken=9, kept=0, before=0.2, after=0.2, warning=""
    )
    assert list(training_warnings(found)) == []
    (idle,) = training_warnings(replace(found, training=training))
    assert "no better numbers on withheld samples in 9 steps" in idle
    failed = replace(training, warning="Recovery diverged.")
    assert list(training_warnings(replace(found, training=failed))) == ["Recovery diverged."]
    better = replace(found, training=replace(training, kept=9, after=0.1))
    assert list(training_warnings(better)) == []
    records = replace(quantised(make_records(2)), quantize=better)
    page = html.unescape(render_html(records.report()))
    assert "9 of 9 steps: KL(dense, sparse) on withheld samples went from 0.2 to 0.1" in page


@pytest.mark.parametrize(
    ("higher", "after", "warned"),
    [
        (True, 0.8, True), (True, 0.95, False), (False, 0.95, True), (False, 0.8, False),
        (True, 0.9, False), (False, 0.9, False),
    ],
)  # fmt: skip
def test_evaluation_samples_that_get_worse_are_of_another_domain(
    *, higher: bool, after: float, warned: bool
) -> None:
    def metric(value: float) -> PairedMetric:
        figure = Estimate(value=value, standard_error=0.01)
        return PairedMetric(
            name="accuracy", higher_is_better=higher, samples=9, dense=figure, sparse=figure,
            difference=None,
        )  # fmt: skip

    steps = (AccuracyStep(name="pruned", metrics=(metric(0.9),)),)
    plain = replace(make_records(2).evaluate, steps=steps, metrics=(metric(after),))
    both = (*steps, AccuracyStep(name="recovered", metrics=(metric(after),)))
    quantised = replace(plain, steps=both, metrics=(metric(0.1),))
    for evaluate in (plain, quantised):
        said = warnings(recovery(), evaluate)
        assert [f"from 0.9 to {after}: calibration is of another domain" in s for s in said] == (
            [True] if warned else []
        )
    assert warnings(recovery(), replace(plain, steps=())) == []
