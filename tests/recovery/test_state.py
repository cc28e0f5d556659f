"""How often the state of a run is saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prox24_deploy.recovery.state import StateFile, TrainingState


class Clock:
    """One that goes when it is told to, in the place of the module `time`."""

    now = 100.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now


def test_saving_waits_until_it_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()

    def slow(*_: object) -> None:
        clock.now += 3.0

    monkeypatch.setattr("prox24_deploy.recovery.state.time", clock)
    monkeypatch.setattr("prox24_deploy.recovery.state.write_tensors", slow)
    file = StateFile(tmp_path / "state.safetensors", lambda: None)
    weights = [torch.ones(4)]
    state = TrainingState(
        steps=2, rates=(0.1,), taken=1, kept=0, best=weights, now=weights, moments=[]
    )
    file.expect(100_000_000)
    assert file.is_due
    file.save(state)
    clock.now += 56.0
    early = file.is_due
    clock.now += 2.0
    assert (early, file.is_due) == (False, True)


def test_what_takes_long_to_save_is_not_saved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("prox24_deploy.recovery.state.time", clock)
    file = StateFile(tmp_path / "state.safetensors", lambda: None)
    file.expect(3_000_000_000)
    clock.now += 56.0
    early = file.is_due
    clock.now += 2.0
    assert (early, file.is_due) == (False, True)


def test_a_run_that_is_over_leaves_its_best_weights_alone(tmp_path: Path) -> None:
    best, now = [torch.ones(4)], [torch.zeros(4)]
    moments = [{"exp_avg": torch.ones(4)}]
    file = StateFile(tmp_path / "state.safetensors", lambda: None)
    state = TrainingState(
        steps=2, rates=(0.1,), taken=2, kept=1, best=best, now=now, moments=moments
    )
    file.save(state)
    on = file.load(1)
    file.save(replace(state, now=[], moments=[]))
    over = file.load(1)
    assert on is not None
    assert over is not None
    assert torch.equal(on.now[0], now[0])
    assert torch.equal(on.moments[0]["exp_avg"], moments[0]["exp_avg"])
    assert torch.equal(over.best[0], best[0])
    assert (over.taken, over.kept, over.now, over.moments) == (2, 1, [], [{}])


def test_a_tensor_with_two_names_is_saved_under_both(tmp_path: Path) -> None:
    weights = [torch.arange(4.0)]
    file = StateFile(tmp_path / "state.safetensors", lambda: None)
    file.save(
        TrainingState(steps=2, rates=(0.1,), taken=1, kept=0, best=weights, now=weights, moments=[])
    )
    found = file.load(1)
    assert found is not None
    assert torch.equal(found.best[0], weights[0])
    assert torch.equal(found.now[0], weights[0])
