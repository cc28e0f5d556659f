"""Train the free values of a pruned model against the dense one, masks fixed.

AdamW or Adafactor on the mean loss of each step, its gradient clipped to norm 1. Withheld samples
are looked at with the weights as the checkpoint stores them; the best of these, or the first, are
what remains. Where training diverges and there is a smaller rate left to take, it goes on with that
from them.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from prox24_deploy.core.recovery import RecoveryPoint, Setback
from prox24_deploy.core.types import Progress, RecoverOptimizer
from prox24_deploy.recovery.lesson import Lesson, masked_step, trainable
from prox24_deploy.recovery.optimizer import (
    make_optimizer,
    moments_of,
    put_moments,
    set_rates,
    state_bytes,
)
from prox24_deploy.recovery.schedule import (
    READS,
    Deadline,
    Schedule,
    mean_step,
    schedule,
    tokens_of,
)
from prox24_deploy.recovery.state import StateFile, TrainingState
from prox24_deploy.recovery.step_graph import StepGraph
from prox24_deploy.recovery.student import put, values_of

log = logging.getLogger(__name__)

# Losses above the first one by this much are no noise: of withheld samples, and of one step.
_FAR_WITHHELD, _FAR_STEP = 2.0, 10.0
# Share of the steps that may lie beyond the deadline, or that might still be taken before it.
_OFF = 0.1
# Below this a loss is rounding.
_NO_LOSS = 1e-6


class _DivergedError(Exception):
    """Training left the neighbourhood of the model that it began with; says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run went: steps taken, the step that is kept (0: the first weights) and the curve.

    `failure` says why the first weights had to be kept, and what to change; "" where they had not.
    `setbacks` say where training diverged and went on at the next of its rates, and `fitted` is the
    loss of the kept weights on given samples that were trained on, None for the first weights.
    """

    taken: int = 0
    kept: int = 0
    curve: tuple[RecoveryPoint, ...] = ()
    failure: str = ""
    setbacks: tuple[Setback, ...] = ()
    fitted: float | None = None

    @property
    def before(self) -> float | None:
        """Withheld loss of the first weights, if it was measured."""
        return self.curve[0].withheld if self.curve else None

    @property
    def after(self) -> float | None:
        """Withheld loss of the weights that are kept."""
        return next((point.withheld for point in self.curve if point.step == self.kept), None)


def _why_not(loss: float | None) -> str:
    """Why no step is taken from a model with this loss on withheld samples; "" where it is."""
    if loss is None:
        return (
            "Recovery cannot begin: on withheld samples the loss of the model that was given is "
            "not finite, so that it is kept as it was; compare both models with evaluate."
        )
    if loss <= _NO_LOSS:
        return (
            "There is nothing to recover: on withheld samples the loss of the model that was given "
            f"is {loss:.3g}, so that it is kept as it was; pass the dense model as teacher if this "
            "is another."
        )
    return ""


@dataclass(slots=True, kw_only=True)
class Training:
    """One run.

    Of its learning `rates`, relative to the scale of each parameter, each is taken once training
    has diverged at the one before it. The `schedule` has fewer steps in the end where all of them
    would have gone far beyond the `deadline`, and more where they would have ended long before it.
    """

    lesson: Lesson
    schedule: Schedule
    rates: Sequence[float]
    seed: int
    file: StateFile
    optimizer: RecoverOptimizer = "adamw"
    deadline: Deadline | None = None
    _optimizer: torch.optim.Optimizer = field(init=False)
    # What a step has of the model that was given, at most.
    _first_step: float = field(init=False)

    def run(self, progress: Progress) -> Outcome:
        """Train, and leave the best weights in the model, rounded as the checkpoint stores them.

        Goes on from the state in the file, if there is one. Where the loss is not finite or far
        above the first at the last of the rates, too, the weights in the model are those that it
        had, as after any error, and so they are without a step where there is no loss, or none
        that is finite.
        """
        first = values_of(self.lesson.trained, stored=True)
        state = self.file.load(len(first)) or self._begin(first)
        if failure := _why_not(state.curve[0].withheld):
            return Outcome(curve=tuple(state.curve), failure=failure)
        self._first_step = max(state.curve[0].withheld or 0.0, self.lesson.hardest_loss())
        try:
            with trainable(self.lesson) as graph:
                self._resume(state)
                # Those of now are in the model.
                state.now = []
                self._train(state, graph, progress)
                fitted = self._fitted(state)
        except _DivergedError as error:
            put(self.lesson.trained, first)
            return self._diverged(state, str(error))
        except BaseException:
            put(self.lesson.trained, first)
            raise
        put(self.lesson.trained, state.best)
        return Outcome(
            taken=state.taken,
            kept=state.kept,
            curve=tuple(state.curve),
            setbacks=tuple(state.setbacks),
            fitted=fitted,
        )

    def _fitted(self, state: TrainingState) -> float | None:
        if not state.kept:
            return None
        self._put_best(state)
        loss = self.lesson.fitted_loss()
        return loss if math.isfinite(loss) else None

    def _rate(self, state: TrainingState) -> float:
        return self.rates[len(state.setbacks)]

    def _diverged(self, state: TrainingState, how: str) -> Outcome:
        return Outcome(
            taken=state.taken,
            curve=tuple(state.curve),
            failure=f"Recovery diverged ({how}), so that the model is kept as it was; "
            f"pass a smaller --recover-rate than {self._rate(state):g}.",
            setbacks=tuple(state.setbacks),
        )

    def _begin(self, first: list[Tensor]) -> TrainingState:
        loss = self.lesson.withheld_loss()
        return TrainingState(
            steps=self.schedule.steps,
            rates=tuple(self.rates),
            taken=0,
            kept=0,
            best=first,
            now=first,
            moments=[],
            curve=[
                RecoveryPoint(step=0, trained=None, withheld=loss if math.isfinite(loss) else None)
            ],
        )

    def _resume(self, state: TrainingState) -> None:
        """Put weights, optimiser and schedule where they were."""
        self.rates = state.rates
        self._plan(state.steps)
        put(self.lesson.trained, state.now or state.best)
        self._optimizer = make_optimizer(self.optimizer, self.lesson.trained)
        if state.taken:
            put_moments(self._optimizer, self.lesson.trained, state.moments)
            state.moments = []
        self.file.expect(self._saved_bytes())

    def _saved_bytes(self) -> int:
        """Of the best weights as they are stored, those of now, and what the optimiser keeps."""
        trained = self.lesson.trained
        vectors = sum(each.parameter.numel() for each in trained if each.parameter.ndim < 2)
        whole = sum(each.parameter.numel() for each in trained)
        stored = sum(each.parameter.numel() * each.dtype.itemsize for each in trained)
        return stored + 4 * whole + state_bytes(self.optimizer, whole - vectors, vectors)

    def _train(self, state: TrainingState, graph: StepGraph, progress: Progress) -> None:
        sizes = self.lesson.sizes
        order = self.schedule.batches(sizes, self.seed)
        losses: list[float] = []
        for chosen in islice(order, state.taken, None):
            if state.taken >= self.schedule.steps:
                break
            # A run that goes on may have come so far before.
            if self.schedule.ends(state.taken, state.withheld[1:]):
                log.info("withheld samples gain no more at step %d, training ends", state.taken)
                break
            progress("recover", state.taken, self.schedule.steps)
            state.taken += 1
            try:
                losses.append(self._step(chosen, state, graph))
                if self.deadline:
                    # The first step prepares kernels, and does not count.
                    self.deadline.passed(state.taken)
                if self.schedule.is_check(state.taken):
                    now = self._check(state, losses)
                    # What is saved has the new plan.
                    self._replan(state)
                    if self.lesson.crew.leads and self.file.is_due:
                        self._save(state, now)
                    losses = []
            except _DivergedError as error:
                self._slow_down(state, error)
                losses = []
        if self.lesson.crew.leads:
            # It is over, so that the weights of now lead nowhere.
            self.file.save(replace(state, now=[], moments=[]))
        progress("recover", self.schedule.steps, self.schedule.steps)

    def _plan(self, steps: int) -> None:
        """Plan so many steps, with checks for as many; nothing where they are planned already."""
        if steps == self.schedule.steps:
            return
        tokens, unit = self.schedule.step_tokens, self.lesson.unit
        self.schedule = schedule(steps, tokens, tokens_of(self.lesson.withheld, unit))

    def _replan(self, state: TrainingState) -> None:
        """Plan fewer steps where those that are planned would end too late, or more if too early.

        There are more in the first half alone, where the rate is large, and while no text is read
        too often.
        """
        fitting = self.deadline.fitting(state.taken) if self.deadline else None
        if fitting is None:
            return
        crew, left = self.lesson.crew, self.schedule.steps - state.taken
        # Clocks of several processes differ; all take the same number of steps.
        fitting = int(crew.sums(fitting)[0] / crew.size)
        steps = self.schedule.steps
        if left and fitting < (1 - _OFF) * left:
            steps = state.taken + max(1, fitting)
        # A step more than half for an odd number of them.
        elif state.taken <= left + 1 and fitting > (1 + _OFF) * left:
            sizes = self.lesson.sizes
            most = int(READS * sum(sizes) / mean_step(sizes, self.schedule.step_tokens))
            steps = max(steps, min(state.taken + fitting, most))
        if steps != self.schedule.steps:
            log.info("steps are faster or slower than timed: %d fit, not %d", steps, state.steps)
            state.steps = steps
            self._plan(steps)

    def _slow_down(self, state: TrainingState, error: _DivergedError) -> None:
        """Go back to the best weights and on at the next rate; raises the error if it was the last.

        What the optimiser kept of the gradients that led astray is forgotten.
        """
        rate = self._rate(state)
        if len(state.setbacks) + 1 == len(self.rates):
            raise error
        state.setbacks.append(Setback(step=state.taken, rate=rate, reason=str(error)))
        log.warning(
            "recovery diverged at a rate of %g (%s); it goes on from the weights of step %d at %g",
            rate, error, state.kept, self._rate(state),
        )  # fmt: skip
        self._put_best(state)
        self._optimizer = make_optimizer(self.optimizer, self.lesson.trained)

    @torch.no_grad()
    def _put_best(self, state: TrainingState) -> None:
        """Put the best weights into the model, of all processes, and zero into its gradients."""
        crew = self.lesson.crew
        put(self.lesson.trained, state.best)
        for each in self.lesson.trained:
            assert each.parameter.grad is not None
            each.parameter.grad.zero_()
            if not crew.leads:
                # The first process alone has the best weights.
                each.parameter.zero_()
            crew.add_up(each.parameter)

    def _step(self, chosen: Sequence[int], state: TrainingState, graph: StepGraph) -> float:
        """Take the step that makes as many as were `taken`."""
        rate = self._rate(state) * self.schedule.rate(state.taken - 1)
        set_rates(self._optimizer, self.lesson.trained, rate)
        loss = self.lesson.gradient(chosen, graph)
        if not loss <= max(_FAR_STEP * self._first_step, _NO_LOSS):
            raise _DivergedError(
                f"the loss of step {state.taken} is {loss:.3g}, that of the model that was "
                f"given {self._first_step:.3g}"
            )
        masked_step(self._optimizer, self.lesson.trained)
        return loss

    def _check(self, state: TrainingState, losses: Sequence[float]) -> list[Tensor]:
        """Measure the rounded weights, and keep them if they are the best; returns the others."""
        now = values_of(self.lesson.trained, near=True)
        put(self.lesson.trained, now, rounded=True)
        loss = self.lesson.withheld_loss()
        first = state.withheld[0]
        if not loss <= max(_FAR_WITHHELD * first, _NO_LOSS):
            raise _DivergedError(
                f"the loss on withheld samples after step {state.taken} is {loss:.3g}, that of the "
                f"model that was given {first:.3g}"
            )
        if loss < min(state.withheld):
            state.kept = state.taken
            if self.lesson.crew.leads:
                state.best = values_of(self.lesson.trained, stored=True)
        put(self.lesson.trained, now)
        mean = math.fsum(losses) / len(losses)
        state.curve.append(RecoveryPoint(step=state.taken, trained=mean, withheld=loss))
        log.info("step %d: trained %.5f, withheld %.5f", state.taken, mean, loss)
        return now

    def _save(self, state: TrainingState, now: list[Tensor]) -> None:
        moments = moments_of(self._optimizer, self.lesson.trained)
        self.file.save(replace(state, now=now, moments=moments))
