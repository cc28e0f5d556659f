"""How often the state of a run is saved."""

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
    assert file.is_due
    file.save(state)
    clock.now += 56.0
    early = file.is_due
    clock.now += 2.0
    assert (early, file.is_due) == (False, True)
