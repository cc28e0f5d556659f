"""One recovery of two loaded models: on what, for how many steps, and what came of it."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.recovery import WrittenText
from prox24_deploy.core.types import Progress
from prox24_deploy.data.written import Author, write_text
from prox24_deploy.model.batch import Batch, Samples, withhold
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.recovery.lesson import Lesson, masked_step, trainable
from prox24_deploy.recovery.objective import objective_for
from prox24_deploy.recovery.optimizer import make_optimizer, set_rates
from prox24_deploy.recovery.processes import Crew
from prox24_deploy.recovery.schedule import (
    READS,
    Deadline,
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
from prox24_deploy.recovery.state import StateFile
from prox24_deploy.recovery.student import Trained, put, values_of
from prox24_deploy.recovery.training import Outcome, Training

log = logging.getLogger(__name__)

_STEP_TOKENS = {"cuda": 8192}
_STEP_TOKENS_ELSEWHERE = 2048
# Logits in one forward pass: of a large vocabulary fewer tokens are run at once.
_MOST_LOGITS = 2**27
_FEWEST_AT_ONCE = 512
# Steps are timed for this share of the minutes, so many at most and at least two.
_TIMING_SHARE, _MOST_TIMED = 0.02, 16
_SCHEDULE = TypeAdapter(Schedule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a recovery begins with.

    Attributes:
        dense: the model to be like.
        sparse: the model to train.
        trained: its parameters that may change.
        recipe: of both.
        calibration: samples that were given.
        options: budget and schedule.
        vocabulary: number of tokens, 1 for a model that gives no logits over tokens.
        author: the dense model as one that writes; None where it does not, or must not.
        padding: the token on padding.
        seed: of the order of samples.
        folder: for what an interrupted run goes on from.
        guard: raises if a model directory was written since it was opened.
        began: when, by `time.perf_counter`.
        crew: the processes that train together.
    """

    dense: nn.Module
    sparse: nn.Module
    trained: Sequence[Trained]
    recipe: Recipe
    calibration: Samples
    options: RecoverOptions
    vocabulary: int
    author: Author | None
    padding: int
    seed: int
    folder: Path
    guard: Callable[[], None]
    began: float
    crew: Crew = field(default_factory=Crew)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        device = self.trained[0].parameter.device.type
        return self.options.step_tokens or _STEP_TOKENS.get(device, _STEP_TOKENS_ELSEWHERE)

    def rates(self, steps: int) -> tuple[float, ...]:
        """Learning rates to take in so many steps, each once the one before it diverged."""
        blocks = sum(len(find_blocks(self.sparse, part)) for part in self.recipe.parts)
        return self.options.rates(steps, self.step_tokens, blocks)

    @property
    def at_once(self) -> int:
        """Tokens of one forward pass."""
        fitting = max(_FEWEST_AT_ONCE, _MOST_LOGITS // max(1, self.vocabulary))
        return min(self.step_tokens, fitting)

    def regrouped(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """The same samples, as many at once as a forward pass takes."""
        return regroup(batches, self.at_once, self.unit)

    @property
    def unit(self) -> int:
        """What an image or a recording counts in tokens; 1 for a token."""
        return self.recipe.modality.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What came of a session; the weights are in the model.

    `rate` is the learning rate that was last taken, and `peak_gib` is of a GPU.
    """

    schedule: Schedule
    outcome: Outcome
    withheld: int
    written: WrittenText | None
    rate: float
    peak_gib: float | None = None


def state_file(folder: Path, guard: Callable[[], None] = lambda: None) -> StateFile:
    """Where the state of a session lies in its folder."""
    return StateFile(folder / "training.safetensors", guard)


def recover_model(session: Session, progress: Progress) -> Recovered:
    """Train `session.sparse` in place; it ends with weights that are no worse, or as it was."""
    trained_on, withheld = withhold(session.calibration.batches)
    batches = session.regrouped(trained_on)
    lesson = Lesson(
        dense=session.dense,
        sparse=session.sparse,
        trained=session.trained,
        objective=objective_for(
            session.recipe.task,
            temperature=session.options.temperature,
            top_k=session.options.top_k,
        ),
        batches=batches,
        given=len(batches),
        withheld=session.regrouped(withheld),
        unit=session.unit,
        # What is computed twice restores random states, which a capture cannot.
        captures=not session.options.checkpointing,
        crew=session.crew,
    )
    written: WrittenText | None = None
    with _checkpointed(session):
        plan, deadline = _planned(session, lesson)
        sizes = lesson.sizes
        wanted = wanted_text(plan.steps, mean_step(sizes, plan.step_tokens), sum(sizes))
        if session.author is not None and wanted:
            names = [spec.name for spec in session.recipe.inputs]
            with session.crew.one_by_one():
                own, written = write_text(session.author, wanted, names, session.padding, progress)
            lesson = replace(lesson, batches=(*lesson.batches, *session.regrouped(own)))
        training = Training(
            lesson=lesson,
            schedule=plan,
            rates=session.rates(plan.steps),
            seed=session.seed,
            optimizer=session.options.optimizer,
            file=state_file(session.folder, session.guard),
            deadline=deadline,
        )
        outcome = training.run(progress)
    count = sum(len(batch.real) for batch in withheld)
    return Recovered(
        schedule=training.schedule,
        outcome=outcome,
        withheld=count,
        written=written,
        rate=training.rates[len(outcome.setbacks)],
    )


def _planned(session: Session, lesson: Lesson) -> tuple[Schedule, Deadline | None]:
    """The schedule; minutes are turned into steps once, and a run that goes on keeps those.

    A run that does not go on has until these minutes are over.
    """
    file = session.folder / "plan.json"
    withheld = tokens_of(lesson.withheld, session.unit)
    if session.options.steps is not None:
        return schedule(session.options.steps, session.step_tokens, withheld), None
    if file.is_file():
        try:
            return _SCHEDULE.validate_json(file.read_bytes()), None
        except ValidationError:
            log.warning("%s is damaged; the steps are timed again", file)
    # Clocks of several processes differ; all take the same number of steps.
    timed = session.crew.sums(_timed_steps(session, lesson))[0] / session.crew.size
    plan = schedule(max(1, int(timed)), session.step_tokens, withheld)
    if session.crew.leads:
        write_atomic(file, _SCHEDULE.dump_json(plan))
    return plan, Deadline(session.began + 60 * (session.options.minutes or 0.0))


def _timed_steps(session: Session, lesson: Lesson) -> int:
    """How many steps the minutes allow, from the times of a few steps and some written tokens."""
    sizes = lesson.sizes
    given, reads = sum(sizes), mean_step(sizes, session.step_tokens)
    first = values_of(lesson.trained)
    try:
        step = _step_seconds(session, lesson)
    finally:
        put(lesson.trained, first)
    withheld = tokens_of(lesson.withheld, session.unit)
    check = check_seconds(step, reads, withheld)
    copy = _copy_seconds(lesson)
    minutes = session.options.minutes or 0.0
    left = max(0.0, 60 * minutes - (time.perf_counter() - session.began))
    token = 0.0
    if session.author is not None and left / step * reads > READS * given:
        token = session.author.seconds_per_token()
    pace = Pace(step=step, check=check, copy=copy, token=token)
    return steps_within(left, pace, reads, given)


def _step_seconds(session: Session, lesson: Lesson) -> float:
    """Seconds of a step at a rate of 0.

    That is the median of some, for a batch of a new shape takes longer; the first step prepares
    kernels and does not count.
    """
    plan = Schedule(steps=_MOST_TIMED, step_tokens=session.step_tokens, check_every=1)
    sizes = lesson.sizes
    optimizer = make_optimizer(session.options.optimizer, lesson.trained)
    until = time.perf_counter() + 60 * _TIMING_SHARE * (session.options.minutes or 0.0)
    found: list[float] = []
    with trainable(lesson) as graph:
        for chosen in islice(plan.batches(sizes, session.seed), plan.steps):
            began = time.perf_counter()
            set_rates(optimizer, lesson.trained, 0.0)
            lesson.gradient(chosen, graph)
            masked_step(optimizer, lesson.trained)
            _wait(lesson.device)
            found.append(time.perf_counter() - began)
            # Several processes take each step together, so that all end with the same one.
            early = session.crew.sums(float(time.perf_counter() < until))[0] == session.crew.size
            if len(found) > 1 and not early:
                break
    return statistics.median(found[1:])


def _copy_seconds(lesson: Lesson) -> float:
    """Seconds that a check takes to copy all values, and to round them and put them back."""
    began = time.perf_counter()
    values = values_of(lesson.trained, near=True)
    put(lesson.trained, values, rounded=True)
    put(lesson.trained, values)
    _wait(lesson.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    """Until a GPU has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _checkpointed(session: Session) -> Iterator[None]:
    """Compute the activations within each block of the sparse model twice, where asked for."""
    if not session.options.checkpointing:
        yield
        return
    parts = [find_blocks(session.sparse, part) for part in session.recipe.parts]
    blocks = [block for part in parts for block in part]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
