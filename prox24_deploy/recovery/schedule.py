"""When a training run does what: its steps, its learning rate, its checks and its batches."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.model.batch import Batch, Samples, rows_of
from prox24_deploy.recovery.state import SAVING_SHARE

LEAST_SAMPLES = 8
# Text is written until nothing need be read more often than this: from many more times on, what is
# learnt no longer holds elsewhere.
READS = 3
# Until the optimiser knows how gradients vary, its steps all go one way and are far too long; so
# the rate rises over so many steps, or over this share of many, and at most over that of few.
_WARM_STEPS, _WARM_UP, _MOST_WARM_UP = 40, 0.05, 0.3
_MOST_CHECKS, _FEWEST_CHECKS = 20, 2
# Steps by which it is told what one reads.
_TRIED_STEPS = 64
# A check runs both models forward, a step also the sparse one backward, at twice the price: checks
# may take this share of what the steps take.
_CHECK_COST, _STEP_COST, CHECK_SHARE = 2, 4, 0.2
# Checks that are compared with as many before them to tell whether training still helps, and the
# rate above which it goes on in any case: while the rate is large the loss on withheld samples
# often stands still, and falls with the rate.
_PATIENCE, _LARGE_RATE = 5, 0.5


def require_samples(samples: Samples) -> None:
    """Refuse too few samples to train on some and watch others.

    Raises:
        CalibrationError: says how many there are.
    """
    if samples.source.samples < LEAST_SAMPLES:
        raise CalibrationError(
            f"Recovery needs at least {LEAST_SAMPLES} calibration samples, some to train on and "
            f"some to tell when to stop, got {samples.source.samples}; pass more with "
            "--calibration or --calibration-tokens."
        )


def regroup(batches: Sequence[Batch], tokens: int, unit: int) -> tuple[Batch, ...]:
    """The same samples, of each shape as many in a batch as give about `tokens`.

    `unit` is what an entry of `Batch.real` counts for.
    """
    alike: dict[tuple[torch.Size, ...], list[Batch]] = {}
    for batch in batches:
        alike.setdefault(tuple(t.shape[1:] for t in _tensors(batch)), []).append(batch)
    found = []
    for group in alike.values():
        whole = _joined(group)
        rows = max(1, tokens * len(whole.real) // (whole.real.numel() * unit))
        found += [rows_of(whole, slice(i, i + rows)) for i in range(0, len(whole.real), rows)]
    return tuple(found)


def _joined(group: Sequence[Batch]) -> Batch:
    targets = [batch.targets for batch in group if batch.targets is not None]
    return Batch(
        inputs={name: torch.cat([b.inputs[name] for b in group]) for name in group[0].inputs},
        real=torch.cat([batch.real for batch in group]),
        targets=torch.cat(targets) if targets else None,
    )


def _tensors(batch: Batch) -> list[Tensor]:
    known = [*batch.inputs.values(), batch.real]
    return known if batch.targets is None else [*known, batch.targets]


def tokens_of(batches: Sequence[Batch], unit: int) -> int:
    """Size of batches, padding included."""
    return sum(batch.real.numel() * unit for batch in batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Steps, tokens in each, and how many steps lie between two checks."""

    steps: int
    step_tokens: int
    check_every: int

    def rate(self, step: int) -> float:
        """Share of the largest learning rate in a step, from 0 on: warm-up, then half a cosine."""
        wanted = max(_WARM_STEPS, _WARM_UP * self.steps)
        warm = max(1, round(min(wanted, _MOST_WARM_UP * self.steps)))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm) / (self.steps + 1 - warm)))

    def is_check(self, taken: int) -> bool:
        """Whether to look at withheld samples after so many steps."""
        return taken % self.check_every == 0 or taken == self.steps

    def ends(self, taken: int, withheld: Sequence[float]) -> bool:
        """Whether training ends before its time after so many steps.

        `withheld` has the losses at the checks so far. They are compared with those shortly before,
        not with that of the model that was given: one whose blocks were tuned as a whole loses at
        first, and is passed late.
        """
        recent, before = withheld[-_PATIENCE:], withheld[-2 * _PATIENCE : -_PATIENCE]
        fallen = self.rate(taken) < _LARGE_RATE
        return fallen and bool(before) and min(recent) >= min(before)

    def batches(self, sizes: Sequence[int], seed: int) -> Iterator[list[int]]:
        """For each step, without end, the batches to train on: all in seeded order, then anew."""
        drawn = _shuffled(len(sizes), seed)
        while True:
            chosen: list[int] = []
            while sum(sizes[i] for i in chosen) < self.step_tokens:
                chosen.append(next(drawn))
            yield chosen


def mean_step(sizes: Sequence[int], step_tokens: int) -> float:
    """Tokens that a step reads: whole batches of these sizes, until they are `step_tokens`."""
    plan = Schedule(steps=_TRIED_STEPS, step_tokens=step_tokens, check_every=1)
    drawn = islice(plan.batches(sizes, 0), plan.steps)
    return sum(sizes[i] for chosen in drawn for i in chosen) / plan.steps


def schedule(steps: int, step_tokens: int, withheld: int) -> Schedule:
    """A schedule whose checks on so many withheld tokens take a fifth of its time at most."""
    budget = CHECK_SHARE * steps * step_tokens * _STEP_COST / (_CHECK_COST * max(withheld, 1))
    checks = min(max(int(budget), _FEWEST_CHECKS), _MOST_CHECKS)
    return Schedule(
        steps=steps, step_tokens=step_tokens, check_every=max(1, math.ceil(steps / checks))
    )


@dataclass(slots=True)
class Deadline:
    """When training has to be done, by `time.perf_counter`."""

    end: float
    _first: tuple[float, int] | None = field(default=None, init=False)

    def passed(self, taken: int) -> None:
        """Say that so many steps are done; the pace is taken from the first call on."""
        if self._first is None:
            self._first = (time.perf_counter(), taken)

    def fitting(self, taken: int) -> int | None:
        """How many steps still fit after so many, by the pace so far; None where it is unknown."""
        if self._first is None or self._first[1] == taken:
            return None
        now = time.perf_counter()
        began, before = self._first
        return int((self.end - now) * (taken - before) / (now - began))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds that things take.

    Attributes:
        step: a step.
        check: a look at the withheld samples.
        copy: the copies of all values that belong to a look.
        token: a written token.
    """

    step: float
    check: float
    copy: float
    token: float


def check_seconds(step: float, step_tokens: float, withheld: int) -> float:
    """What a look at so many withheld tokens takes, from what a step of others takes."""
    return step * _CHECK_COST * withheld / (_STEP_COST * step_tokens)


def steps_within(seconds: float, pace: Pace, step_tokens: float, given: int) -> int:
    """How many steps fit in a time, with checks and the text to be written; at least one.

    `given` tokens are there to begin with; `wanted_text` says how many are written.
    """
    seconds = seconds * (1 - SAVING_SHARE) - _MOST_CHECKS * pace.copy
    # One look comes before all steps, and the checks are two or take a fifth of the steps.
    few = seconds - (1 + _FEWEST_CHECKS) * pace.check
    many = (seconds - pace.check) / (1 + CHECK_SHARE)
    left = min(few, many)
    if left / pace.step * step_tokens > READS * given:
        wanted = left + given * pace.token
        return max(1, int(wanted / (pace.step + step_tokens * pace.token / READS)))
    return max(1, int(left / pace.step))


def wanted_text(steps: int, step_tokens: float, given: int) -> int:
    """Tokens to write, so that no token of this and the given text is read over `READS` times."""
    return max(0, math.ceil(steps * step_tokens / READS) - given)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
