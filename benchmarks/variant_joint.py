"""The paper's prox inside the recovery loop: masks and weights are learned together.

Training begins with the dense weights. After each step of the optimiser every layer goes through
the prox, with λ rising geometrically until every cell is 2:4, at half of the steps at the latest;
then the masks are fixed and training goes on as `recover` does. The schedule is this project's own.
Beside it: `recover` from the pruned model, on the same text, for as many steps.
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from variant_lab import Figures, Lab

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.core.types import silent
from prox24_deploy.model.batch import withhold
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.checkpoint import renamed_tensors
from prox24_deploy.model.layers import layer_at
from prox24_deploy.pipeline.context import vocabulary_of
from prox24_deploy.pruning.solvers.prox import prox_24
from prox24_deploy.recovery.lesson import Lesson, masked_step, trainable
from prox24_deploy.recovery.objective import objective_for
from prox24_deploy.recovery.optimizer import make_optimizer, set_rates
from prox24_deploy.recovery.schedule import Schedule, schedule, tokens_of
from prox24_deploy.recovery.session import Session, recover_model
from prox24_deploy.recovery.student import Trained, find_trained, put, values_of
from prox24_deploy.sparsity.pattern import final_mask, is_24, project_24, unconverged_groups

# λ in the first step and where the masks are fixed at the latest, over 1 / mean |W̃_row|.
_START, _END = 1e-3, 2.0
# Share of the steps by which the masks are fixed, and steps between two looks at all cells.
_FREE, _LOOK = 0.5, 5


def recovered(lab: Lab, pruned: nn.Module) -> tuple[nn.Module, Figures]:
    """A copy of a pruned model, recovered."""
    model = deepcopy(pruned)
    with tempfile.TemporaryDirectory() as folder:
        found = recover_model(_session(lab, model, Path(folder)), silent)
    figures = {"before": found.outcome.before or 0.0, "withheld": found.outcome.after or 0.0}
    return model, {"steps": found.outcome.taken, "kept": found.outcome.kept, **figures}


def _session(lab: Lab, model: nn.Module, folder: Path) -> Session:
    source = lab.context.source
    named = replace(source, renamed=renamed_tensors(source, model, lab.recipe))
    return Session(
        dense=lab.dense,
        sparse=model,
        trained=find_trained(model, named, lab.recipe),
        recipe=lab.recipe,
        calibration=lab.lessons,
        options=RecoverOptions(steps=lab.steps, write=False),
        vocabulary=vocabulary_of(source.config),
        author=None,
        padding=0,
        seed=0,
        folder=folder,
        guard=lambda: None,
        began=time.perf_counter(),
    )


def learned(lab: Lab, *, normalised: bool) -> tuple[nn.Module, Figures]:
    """The dense model with masks and weights learned together.

    Args:
        lab: the model and its texts.
        normalised: whether the prox sees W √E[x²], as the solver does, or the weights as they are.
    """
    model = deepcopy(lab.dense)
    with torch.no_grad():
        for path in lab.targets:
            # What may be trained is told by a model that is 2:4.
            weight = layer_at(model, path).weight
            weight.copy_(project_24(weight))
    with tempfile.TemporaryDirectory() as folder:
        session = _session(lab, model, Path(folder))
    paths = {id(layer_at(model, path).weight): path for path in lab.targets}
    scales = _scales(lab) if normalised else {}
    cells = [
        _Cells(trained=i, scale=scales.get(paths[id(each.parameter)]))
        for i, each in enumerate(session.trained)
        if each.zeros is not None
    ]
    with torch.no_grad():
        for path in lab.targets:
            layer_at(model, path).weight.copy_(layer_at(lab.dense, path).weight)
    trained = [replace(each, zeros=None, scale=_size(each)) for each in session.trained]
    trained_on, withheld = withhold(session.calibration.batches)
    batches = session.regrouped(trained_on)
    lesson = Lesson(
        dense=lab.dense,
        sparse=model,
        trained=trained,
        objective=objective_for(lab.recipe.task),
        batches=batches,
        given=len(batches),
        withheld=session.regrouped(withheld),
        unit=session.unit,
    )
    tokens = tokens_of(lesson.withheld, session.unit)
    plan = schedule(lab.steps, session.step_tokens, tokens)
    run = _Learning(lesson=lesson, cells=cells, plan=plan, rate=session.rates(lab.steps)[0])
    figures = run.go()
    for path in lab.targets:
        assert is_24(layer_at(model, path).weight), path
    return model, figures


def _size(each: Trained) -> float:
    """What a relative rate is multiplied by: that of the dense weights of a layer."""
    if each.zeros is None:
        return each.scale
    return float(each.parameter.square().mean().sqrt())


@torch.no_grad()
def _scales(lab: Lab) -> dict[str, Tensor]:
    """√E[x²] of the inputs of each layer, (d,), in the dense model."""
    found: dict[str, Tensor] = {}
    layers = {path: layer_at(lab.dense, path) for path in lab.targets}

    def note(path: str, read: Tensor) -> None:
        squares = read.flatten(0, -2).square().mean(0)
        found[path] = found[path] + squares if path in found else squares

    with ExitStack() as stack:
        for path, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, p=path: note(p, args[0]))
            stack.callback(handle.remove)
        for batch in lab.calibration:
            run_model(lab.dense, batch, lab.recipe.task)
    return {path: (total / len(lab.calibration)).sqrt() for path, total in found.items()}


@dataclass(slots=True)
class _Cells:
    """A layer whose mask is learned: its number among what is trained, and its units."""

    trained: int
    scale: Tensor | None
    base: Tensor | float = 0.0

    def seen(self, weight: Tensor) -> Tensor:
        """Weights as the prox sees them."""
        return weight if self.scale is None else weight * self.scale

    def shrink(self, weight: Tensor, lam: float) -> None:
        """One step of the prox, in place."""
        after = prox_24(self.seen(weight), lam * self.base)
        weight.copy_(after if self.scale is None else after / self.scale)


@dataclass(slots=True, kw_only=True)
class _Learning:
    """One run; `lesson` changes where the masks are fixed."""

    lesson: Lesson
    cells: Sequence[_Cells]
    plan: Schedule
    rate: float

    def go(self) -> Figures:
        """Train, and leave the best 2:4 weights in the model, rounded as they are stored."""
        lesson, steps = self.lesson, self.plan.steps
        until = max(1, round(_FREE * steps))
        growth = (_END / _START) ** (1 / until)
        self._begin()
        optimizer = make_optimizer("adamw", lesson.trained)
        sizes = [tokens_of([batch], lesson.unit) for batch in lesson.batches]
        best: tuple[float, int, list[Tensor]] | None = None
        fixed, left = 0, 0.0
        with trainable(lesson) as graph:
            order = islice(self.plan.batches(sizes, 0), steps)
            for step, chosen in enumerate(order):
                set_rates(optimizer, lesson.trained, self.rate * self.plan.rate(step))
                self.lesson.gradient(chosen, graph)
                masked_step(optimizer, self.lesson.trained)
                if not fixed:
                    self._shrink(_START * growth**step)
                    if (step + 1) % _LOOK == 0 or step + 1 == until:
                        left = self._unconverged()
                    if step + 1 == until or ((step + 1) % _LOOK == 0 and not left):
                        fixed = step + 1
                        self._fix()
                if fixed and self.plan.is_check(step + 1):
                    found = self._measured(step + 1)
                    best = found if best is None or found[0] < best[0] else best
        assert best is not None, "the last step is measured"
        put(lesson.trained, best[2])
        return {
            "steps": steps, "fixed": fixed, "left": left, "kept": best[1], "withheld": best[0]
        }  # fmt: skip

    @torch.no_grad()
    def _begin(self) -> None:
        for each in self.cells:
            rows = each.seen(self.lesson.trained[each.trained].parameter)
            mean = rows.abs().mean(1, keepdim=True)
            each.base = 1 / mean.where(mean > 0, 1.0)

    @torch.no_grad()
    def _shrink(self, lam: float) -> None:
        for each in self.cells:
            each.shrink(self.lesson.trained[each.trained].parameter, lam)

    @torch.no_grad()
    def _unconverged(self) -> float:
        """Share of the cells that are not 2:4."""
        weights = [self.lesson.trained[each.trained].parameter for each in self.cells]
        return 4 * sum(map(unconverged_groups, weights)) / sum(w.numel() for w in weights)

    @torch.no_grad()
    def _fix(self) -> None:
        """Fix the masks; a cell that is not yet 2:4 keeps its largest two."""
        trained = list(self.lesson.trained)
        for each in self.cells:
            weight = trained[each.trained].parameter
            mask = final_mask(each.seen(weight), each.seen(weight))
            trained[each.trained] = replace(trained[each.trained], zeros=~mask)
            weight.masked_fill_(~mask, 0.0)
        self.lesson = replace(self.lesson, trained=trained)

    def _measured(self, step: int) -> tuple[float, int, list[Tensor]]:
        """Withheld loss of the weights as they are stored, and these."""
        now, stored = (values_of(self.lesson.trained, stored=each) for each in (False, True))
        put(self.lesson.trained, stored)
        loss = self.lesson.withheld_loss()
        put(self.lesson.trained, now)
        return loss, step, stored
