"""Processes that time algorithms may crash or hang; a stand-in for them does so on demand."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt import trials as trials_module
from prox24_deploy.engines.cusparselt.profile import GemmShape
from prox24_deploy.engines.cusparselt.trials import Trial, run_workers

# Takes n microseconds more than the number of the algorithm, refuses 3, dies of 5, hangs at 6, and
# dies in the middle of its answer to 7.
STAND_IN = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    with open(sys.argv[1], "a") as log:
        log.write(line)
    n, k, m, number = json.loads(line)
    if number == 5:
        os.abort()
    if number == 6:
        time.sleep(60)
    if number == 7:
        print(n, end="", flush=True)
        os.abort()
    print("null" if number == 3 else json.dumps(n + number), flush=True)
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_trials_survive_a_process_that_crashes_or_hangs(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_module, "_TRIAL_SECONDS", 0.5)
    trials = [Trial(GemmShape(n=n, k=64, m=8), number) for n in (16, 32, 48) for number in range(9)]
    seen: list[tuple[int, int]] = []
    found = run_workers(
        [sys.executable, "-c", STAND_IN, str(tmp_path / "log")], trials, workers,
        lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen == [(i + 1, len(trials)) for i in range(len(trials))]
    works = (0, 1, 2, 4, 8)
    assert found == {
        Trial(GemmShape(n=n, k=64, m=8), a): n + a for n in (16, 32, 48) for a in works
    }
    asked = [json.loads(line)[3] for line in (tmp_path / "log").read_text().splitlines()]
    for number in (5, 6, 7):
        assert 1 <= asked.count(number) <= workers, "an algorithm that fails is tried again"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit('first line\\nno such library')", "did not start: no such library."),
        ("pass", "did not start: it said nothing."),
    ],
)
def test_a_process_that_does_not_start_is_an_error(script: str, said: str) -> None:
    trials = [Trial(GemmShape(n=16, k=64, m=8), number) for number in range(3)]
    with pytest.raises(EngineError, match=said):
        run_workers([sys.executable, "-c", script], trials, 1, lambda *_: None)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """An interrupt from outside after some time."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("answers", [True, False])
def test_an_interrupt_ends_trials_and_their_processes_at_once(
    *, answers: bool, tmp_path: Path
) -> None:
    """Also while a process starts, for which much more time is given."""
    script = (
        "import os, sys, time\n"
        "open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close()\n"
        + ("print('ready', flush=True)\n" if answers else "")
        + "time.sleep(60)"
    )
    trials = [Trial(GemmShape(n=16, k=64, m=8), number) for number in range(9)]
    command = [sys.executable, "-c", script, str(tmp_path)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), alarm(2.0):
        run_workers(command, trials, 2, lambda *_: None)
    assert time.monotonic() - began < 8
    started = [int(path.name) for path in tmp_path.iterdir()]
    assert started
    assert not any(map(is_running, started))
