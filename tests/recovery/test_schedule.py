"""Steps, rates, checks and batches of a training run."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.model.batch import Batch, rows_of, withhold
from prox24_deploy.recovery.schedule import (
    Pace,
    Schedule,
    check_seconds,
    mean_step,
    regroup,
    schedule,
    steps_within,
    tokens_of,
    wanted_text,
)
from prox24_deploy.recovery.state import SAVING_SHARE


def batch_of(rows: int, width: int, first: int = 0) -> Batch:
    ids = first + torch.arange(rows * width).view(rows, width)
    return Batch({"input_ids": ids}, torch.ones(rows, width, dtype=torch.bool), ids)


@pytest.mark.parametrize(("steps", "warm"), [(10, 3), (100, 30), (400, 40), (5000, 250)])
def test_rates_rise_until_gradients_are_known_and_then_fall_to_nothing(
    steps: int, warm: int
) -> None:
    plan = Schedule(steps=steps, step_tokens=1, check_every=10)
    rates = [plan.rate(step) for step in range(steps)]
    assert rates[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert 0 < rates[-1] < rates[warm] < 1
    assert steps < 100 or rates[-1] < 1e-3
    assert Schedule(steps=1, step_tokens=1, check_every=1).rate(0) == 1


def test_training_ends_where_it_gains_no_more_once_the_rate_has_fallen() -> None:
    plan = Schedule(steps=100, step_tokens=1, check_every=5)
    assert plan.rate(60) > 0.5 > plan.rate(65)
    for losses in ([0.9, *[0.5] * 12], [0.3 + 0.1 * i for i in range(13)]):
        assert not plan.ends(60, losses[:12])
        assert plan.ends(65, losses)


def test_training_that_gains_goes_on_though_the_first_model_was_better() -> None:
    plan = Schedule(steps=527, step_tokens=8192, check_every=27)
    # SmolLM2-135M behind a reconstruction, which had 0.381; the loss was still falling at step 270.
    losses = [0.458, 0.532, 0.571, 0.522, 0.477, 0.448, 0.436, 0.442, 0.403, 0.385]
    assert not plan.ends(270, losses)
    assert plan.ends(405, [*losses, 0.386, 0.39, 0.386, 0.391, 0.388])


def test_training_goes_on_before_there_is_anything_to_compare_with() -> None:
    plan = Schedule(steps=100, step_tokens=1, check_every=20)
    assert plan.rate(100) < 0.01
    assert not plan.ends(100, [0.5] * 5)


@pytest.mark.parametrize(
    ("steps", "withheld", "every"),
    [(2000, 8192, 100), (30, 8192, 10), (9, 8192, 5), (1, 1, 1), (30, 100, 2)],
)
def test_checks_take_a_fifth_of_the_time_at_most_but_for_the_last_two(
    steps: int, withheld: int, every: int
) -> None:
    plan = schedule(steps, 2048, withheld)
    assert plan.check_every == every
    assert plan.is_check(steps)


def test_every_batch_is_read_before_any_is_again_and_a_step_is_large_enough() -> None:
    plan = Schedule(steps=30, step_tokens=100, check_every=1)
    sizes = [40, 60, 80, 30, 50, 70, 20]
    chosen = list(islice(plan.batches(sizes, seed=3), 30))
    assert all(sum(sizes[i] for i in step) >= 100 for step in chosen)
    drawn = [i for step in chosen for i in step]
    for start in range(0, len(drawn) - 7, 7):
        assert Counter(drawn[start : start + 7]) == Counter(range(7))
    assert list(islice(plan.batches(sizes, seed=3), 10, 30)) == chosen[10:]
    assert list(islice(plan.batches(sizes, seed=4), 30)) != chosen


def test_a_step_reads_whole_batches() -> None:
    assert mean_step([64], 64) == 64
    assert mean_step([300], 512) == 600
    assert 512 < mean_step([100, 500], 512) < 700


@pytest.mark.parametrize(
    ("steps", "tokens", "blocks", "first"),
    [
        (1, 2048, 8, 0.00058),
        (100, 2048, 6, 0.0027),
        (100, 8192, 8, 0.0054),
        (300, 8192, 30, 0.0021),
        (1000, 2048, 8, 0.0058),
        (1000, 8192, 1, 0.01),
        (5000, 2048, 32, 0.0025),
        (90_000, 2048, 8, 0.01),
    ],
)
def test_few_steps_few_tokens_and_many_blocks_have_a_smaller_rate(
    steps: int, tokens: int, blocks: int, first: float
) -> None:
    rates = RecoverOptions(steps=steps).rates(steps, tokens, blocks)
    assert rates == pytest.approx((first, first / 4, first / 16))
    given = RecoverOptions(steps=steps, learning_rate=0.3)
    assert given.rates(steps, tokens, blocks) == (0.3,)


def test_an_eighth_is_withheld() -> None:
    batches = [batch_of(2, 4, first=i) for i in range(16)]
    trained, withheld = withhold(batches)
    assert (len(trained), len(withheld)) == (14, 2)
    trained, withheld = withhold([batch_of(16, 4)])
    assert [len(part[0].real) for part in (trained, withheld)] == [13, 3]


def test_batches_of_one_shape_are_joined_and_cut_anew() -> None:
    given = [batch_of(2, 4), batch_of(3, 6, 100), batch_of(5, 4, 200)]
    made = regroup(given, 12, 1)
    assert [tuple(b.real.shape) for b in made] == [(3, 4), (3, 4), (1, 4), (2, 6), (1, 6)]
    assert tokens_of(made, 1) == tokens_of(given, 1) == 46
    for batches in (made, given):
        values = torch.cat([b.inputs["input_ids"].flatten() for b in batches])
        assert sorted(values.tolist()) == sorted(
            v for b in given for v in b.inputs["input_ids"].flatten().tolist()
        )
    assert all(torch.equal(b.inputs["input_ids"], b.targets) for b in made if b.targets is not None)
    assert [len(b.real) for b in regroup([batch_of(3, 40)], 10, 1)] == [1, 1, 1]
    assert rows_of(batch_of(3, 2), slice(1, 2)).real.shape == (1, 2)


def test_minutes_pay_for_steps_and_for_the_text_that_they_need() -> None:
    pace = Pace(step=2.0, check=0.0, copy=0.0, token=0.01)
    # Ten steps read 1000 tokens, no more than thrice what is given.
    assert steps_within(_beside_saving(24.0), pace, 100, given=400) == 10
    steps = steps_within(_beside_saving(200.0), pace, 100, given=400)
    written = wanted_text(steps, 100, 400)
    assert written > 0
    assert 190 < 1.2 * steps * pace.step + written * pace.token <= 202
    assert 3 * (400 + written) >= steps * 100
    assert steps_within(0.0, pace, 100, given=0) == 1


def test_minutes_pay_for_the_checks_of_a_short_run() -> None:
    """A look before all steps and two on the way, each of five seconds."""
    pace = Pace(step=2.0, check=check_seconds(2.0, 100, 500), copy=0.0, token=0.0)
    assert pace.check == 5
    assert steps_within(_beside_saving(25.0), pace, 100, given=10**6) == 5
    copied = replace(pace, copy=0.5)
    assert steps_within(_beside_saving(35.0), copied, 100, given=10**6) == 5


def _beside_saving(seconds: float) -> float:
    return seconds / (1 - SAVING_SHARE) + 1e-9
