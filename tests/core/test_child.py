"""A job in a process of its own ends with the process that started it, and cleans up."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prox24_deploy.core import child as child_module
from prox24_deploy.core.child import end_child, run_child

# Says that it listens, and removes its file when it is told to end.
LISTENING = """
import pathlib, sys, time
from prox24_deploy.core.child import end_on_termination
end_on_termination()
file = pathlib.Path(sys.argv[1])
try:
    file.touch()
    time.sleep(60)
finally:
    file.unlink()
"""
DEAF = LISTENING.replace(
    "end_on_termination()\nfile",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nfile",
)


def test_a_job_reads_its_order_and_its_words_are_kept(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        script = "import sys; print(sys.stdin.read()); print('odd', file=sys.stderr); sys.exit(3)"
        assert run_child([sys.executable, "-u", "-c", script], b"order", log) == 3
    assert (tmp_path / "log").read_text() == "order\nodd\n"


@pytest.mark.parametrize(("script", "cleaned"), [(LISTENING, True), (DEAF, False)])
def test_a_job_that_is_told_to_end_ends_whether_it_listens_or_not(
    script: str, *, cleaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_GRACE_SECONDS", 10.0 if cleaned else 0.3)
    file = tmp_path / "half-written"
    job = subprocess.Popen([sys.executable, "-c", script, str(file)], stderr=subprocess.DEVNULL)
    while not file.exists():
        assert job.poll() is None
        time.sleep(0.02)
    end_child(job)
    assert job.poll() is not None
    assert file.exists() != cleaned


def test_an_interrupt_of_the_parent_ends_the_job(tmp_path: Path) -> None:
    file = tmp_path / "half-written"
    parent = f"""
import signal, sys
from prox24_deploy.core.child import run_child
def end(*_):
    raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
with open({str(tmp_path / "log")!r}, "wb") as log:
    run_child([sys.executable, "-c", {LISTENING!r}, {str(file)!r}], b"", log)
"""
    started = subprocess.Popen([sys.executable, "-c", parent])
    while not file.exists():
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == 143
    assert not file.exists()


BEHIND = LISTENING.replace(
    "end_on_termination\nend_on_termination()",
    "end_on_termination, end_with_starter\nend_on_termination()\nend_with_starter()",
)
BETWEEN = "import subprocess, sys; subprocess.run([sys.executable, '-c', {job!r}, {file!r}])"


@pytest.mark.parametrize("between", [False, True])
def test_a_job_ends_when_what_started_it_is_killed(tmp_path: Path, *, between: bool) -> None:
    file = tmp_path / "half-written"
    command = ["-c", BETWEEN.format(job=BEHIND, file=str(file))]
    starter = f"""
import subprocess, sys
command = {command if between else ["-c", LISTENING, str(file)]!r}
subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE).wait()
"""
    started = subprocess.Popen([sys.executable, "-c", starter], stderr=subprocess.DEVNULL)
    while not file.exists():
        assert started.poll() is None
        time.sleep(0.02)
    started.kill()
    started.wait()
    for _ in range(1000):
        if not file.exists():
            break
        time.sleep(0.02)
    assert not file.exists()
