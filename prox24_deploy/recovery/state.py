"""The state of a training run in one file, so that a killed run goes on where it was."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.recovery import RecoveryPoint, Setback
from prox24_deploy.model.checkpoint import write_tensors

_CURVE = TypeAdapter(tuple[RecoveryPoint, ...])
_SETBACKS = TypeAdapter(tuple[Setback, ...])
# Share of the time that may go into saving: of a large model it takes longer than many steps.
SAVING_SHARE = 0.05
# How fast a disk is taken to be until something was saved, and what is not worth waiting for.
_BYTES_PER_SECOND, _AT_ONCE = 1e9, 1.0
_MOMENT = "moment"


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Where a run is; lists of tensors have one for each trained parameter.

    Attributes:
        steps: steps that are planned.
        rates: learning rates of the run, one after the other.
        taken: steps that were taken.
        kept: step of the best weights.
        best: those weights, as the checkpoint stores them.
        now: weights; none where the run is over, and the best are what is left.
        moments: what the optimiser keeps of each, by name; none likewise.
        curve: measurements until now.
        setbacks: where training diverged until now.
    """

    steps: int
    rates: tuple[float, ...]
    taken: int
    kept: int
    best: list[Tensor]
    now: list[Tensor]
    moments: list[dict[str, Tensor]]
    curve: list[RecoveryPoint] = field(default_factory=list)
    setbacks: list[Setback] = field(default_factory=list)

    @property
    def withheld(self) -> list[float]:
        """Losses on withheld samples: of the model that was given, then at each check."""
        return [point.withheld for point in self.curve if point.withheld is not None]


@dataclass(slots=True)
class StateFile:
    """A file for the state; `guard` raises if what is trained on has changed since."""

    path: Path
    guard: Callable[[], None]
    _due: float = field(default=0.0, init=False)

    @property
    def is_due(self) -> bool:
        """Whether so much time has passed that saving takes little of it."""
        return time.perf_counter() >= self._due

    def expect(self, size: int) -> None:
        """Say how many bytes will be saved; until then saving is due at once."""
        seconds = size / _BYTES_PER_SECOND
        if seconds > _AT_ONCE:
            self._wait_for(seconds)

    def save(self, state: TrainingState) -> None:
        """Replace the file at once."""
        began = time.perf_counter()
        self._save(state)
        self._wait_for(time.perf_counter() - began)

    def _wait_for(self, seconds: float) -> None:
        """Let saving be due once what took so long takes its share of the time."""
        self._due = time.perf_counter() + seconds * (1 - SAVING_SHARE) / SAVING_SHARE

    def _save(self, state: TrainingState) -> None:
        self.guard()
        make_folder(self.path.parent)
        lists = {"best": state.best, "now": state.now}
        tensors = {f"{name}.{i}": t for name, parts in lists.items() for i, t in enumerate(parts)}
        for i, moments in enumerate(state.moments):
            tensors |= {f"{_MOMENT}.{i}.{name}": tensor for name, tensor in moments.items()}
        tensors = _named_once(tensors)
        known = {
            "steps": state.steps,
            "rates": state.rates,
            "taken": state.taken,
            "kept": state.kept,
            "curve": [asdict(point) for point in state.curve],
            "setbacks": [asdict(setback) for setback in state.setbacks],
        }
        write_tensors(self.path, tensors, {"state": json.dumps(known)})

    def load(self, count: int) -> TrainingState | None:
        """The state of so many parameters, on the CPU; None if there is none."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as handle:
                known, names = json.loads(handle.metadata()["state"]), set(handle.keys())

                def read(name: str) -> list[Tensor]:
                    return [handle.get_tensor(f"{name}.{i}") for i in range(count)]

                moments: list[dict[str, Tensor]] = [{} for _ in range(count)]
                for name in names:
                    kind, index, rest = [*name.split(".", 2), ""][:3]
                    if kind == _MOMENT:
                        moments[int(index)][rest] = handle.get_tensor(name)
                return TrainingState(
                    steps=int(known["steps"]),
                    rates=tuple(map(float, known["rates"])),
                    taken=int(known["taken"]),
                    kept=int(known["kept"]),
                    best=read("best"),
                    now=read("now") if "now.0" in names else [],
                    moments=moments,
                    curve=list(_CURVE.validate_python(known["curve"])),
                    setbacks=list(_SETBACKS.validate_python(known["setbacks"])),
                )
        except (SafetensorError, IndexError, KeyError, TypeError, ValueError):
            # Not written by this version, or damaged: beginning anew loses only time.
            return None


def _named_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU; what has a name is copied for another, for a file has one for each."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu()
        place = held.untyped_storage().data_ptr()
        found[name] = held.clone() if place in known else held
        known.add(place)
    return found
