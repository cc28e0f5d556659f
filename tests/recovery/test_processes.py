"""Recovery in two processes: the same masks and the same curve as in one, and how failures end."""

import logging
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import CPU, FAST, case, recover, tensors
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from prox24_deploy.core.errors import CalibrationError, EngineError, UsageError
from prox24_deploy.core.types import Progress, silent
from prox24_deploy.recovery.processes import Crew, require_processes, run_together
from prox24_deploy.recovery.recover import Recovery
from prox24_deploy.recovery.schedule import regroup
from prox24_deploy.recovery.training import Training

TWO = replace(FAST, processes=2, write=False)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Recovery:
    pytest.importorskip("accelerate")
    return case(tiny_llama, prose, {}, tmp_path_factory)


def test_two_processes_go_on_where_one_was_killed_with_its_curve(
    llama: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = replace(llama, options=replace(TWO, processes=1))
    whole = recover(alone, tmp_path / "whole")
    step, taken = Training._step, []

    def killed(self: Training, *rest: Any) -> float:
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(alone, tmp_path / "two")
    two = recover(replace(llama, options=TWO), tmp_path / "two")
    assert (two.taken, two.processes) == (12, 2)
    # Points before the kill are of one process, those after it of two.
    pairs = list(zip(whole.curve, two.curve, strict=True))
    assert [a.step for a, _ in pairs] == [b.step for _, b in pairs]
    for a, b in pairs:
        assert b.withheld == pytest.approx(a.withheld, rel=1e-3)
        assert a.trained is None or b.trained == pytest.approx(a.trained, rel=1e-3)
    assert two.after is not None
    assert two.before is not None
    assert two.after < two.before
    given, left = tensors(llama.pruned.path), tensors(tmp_path / "two" / "out")
    for name in given:
        if 2 * int((given[name] == 0).sum()) == given[name].numel():
            assert torch.equal(given[name] == 0, left[name] == 0), name


def test_every_row_has_one_process(llama: Recovery) -> None:
    batches = llama.calibration.batches[:3]
    parts = [Crew(rank=rank, size=2).shares(batches) for rank in range(2)]
    rows = [len(batch.real) for part in parts for batch in part]
    assert sum(rows) == sum(len(batch.real) for batch in batches)
    assert all(rows)


def test_batches_go_round_whole_and_the_last_by_rows(llama: Recovery) -> None:
    batches = [llama.calibration.batches[i] for i in (0, 1, 0)]
    parts = [Crew(rank=rank, size=2).shares(batches) for rank in range(2)]
    # A pass over a whole batch costs less than two over halves of it.
    assert all(part[0] is batch for part, batch in zip(parts, batches, strict=False))
    last = [part[1].inputs["input_ids"] for part in parts]
    assert all(map(torch.equal, last, (batches[2].inputs["input_ids"][i::2] for i in range(2))))


def test_batches_of_one_row_go_round(llama: Recovery) -> None:
    batches = regroup(llama.calibration.batches[:1], 1, 1)
    assert {len(batch.real) for batch in batches} == {1}
    parts = [Crew(rank=rank, size=3).shares(batches) for rank in range(3)]
    turns = [batch.inputs["input_ids"] for turn in zip_longest(*parts) for batch in turn if batch]
    assert all(map(torch.equal, turns, (batch.inputs["input_ids"] for batch in batches)))
    assert len(turns) == len(batches) > 3


# Those of as many batches of one row.
MANY = [torch.full((3,), float(i)) for i in range(300)]


def failing(
    error: Exception | None, samples: list[Tensor], crew: Crew, device: Any, progress: Progress
) -> None:
    """A task whose second process fails, which the first would wait for."""
    assert all(map(torch.equal, samples, MANY))
    progress("told", crew.rank, 2)
    logging.getLogger("prox24_deploy.recovery").warning("said by %d", crew.rank)
    if error is None:
        return
    crew.sums(1.0)
    if crew.rank:
        raise error
    crew.sums(1.0)


def test_what_one_process_raises_ends_all(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("accelerate")
    told: list[Any] = []
    with pytest.raises(CalibrationError, match="too few"):
        run_together(
            partial(failing, CalibrationError("too few"), MANY),
            2,
            CPU,
            lambda *each: told.append(each),
        )
    assert told == [("told", 0, 2)]
    assert [r.getMessage() for r in caplog.records if "prox24" in r.name] == ["said by 0"]


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        ("OutOfMemoryError: CUDA out of memory", torch.OutOfMemoryError, "out of memory"),
        ("ValueError: odd", ProcessRaisedException, "odd"),
    ],
)
def test_a_lack_of_memory_is_told_from_other_faults(
    monkeypatch: pytest.MonkeyPatch, raised: str, kind: type[Exception], said: str
) -> None:
    """Processes that end so are stood in for by what torch raises then."""
    ended = ProcessRaisedException(raised, 1, 0)
    monkeypatch.setattr(f"{run_together.__module__}.start_processes", lambda *_, **__: Ended(ended))
    with pytest.raises(kind, match=said):
        run_together(partial(failing, None, MANY), 2, CPU, silent)


def test_a_process_that_was_killed_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = ProcessExitedException("signal SIGKILL", 1, 0, -9, "SIGKILL")
    monkeypatch.setattr(f"{run_together.__module__}.start_processes", lambda *_, **__: Ended(ended))
    with pytest.raises(EngineError, match=r"ended without a word \(signal SIGKILL\); .* goes on"):
        run_together(partial(failing, None, MANY), 2, CPU, silent)


class Ended:
    """Processes that have ended with an error."""

    processes: tuple[Any, ...] = ()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def join(self, timeout: float) -> bool:
        raise self.error


def test_more_processes_than_can_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="takes 1 process or more, got 0"):
        require_processes(0, CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"--recover-processes 2 takes a GPU each, .* finds 1;"):
        require_processes(2, torch.device("cuda"))
    require_processes(2, CPU)
    require_processes(1, CPU)
