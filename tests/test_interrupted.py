"""Signals: a build that is told to end says so, keeps what is finished, and goes on later."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run_cli

SMALL = ("--calibration-tokens", "2048", "--preset", "fast")


def test_a_build_that_is_told_to_end_says_so_and_goes_on_later(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    arguments = ["prune", str(tiny_bert), "-o", str(out), "--calibration", str(prose), *SMALL]
    command = [sys.executable, "-m", "prox24_deploy", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Until the first block is solved, which is the middle of the work.
    while not list(out.glob(".partial/**/block-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 143
    *progress, last = said.splitlines()
    assert last == "Terminated; finished stages are kept, run the same command to go on."
    assert all(" prune " in line or " permute " in line for line in progress)
    assert printed == ""
    assert not list(out.rglob("*.tmp"))
    run = run_cli(*arguments)
    assert run.code == 0, run.err


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nohup` and init systems ask for."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_cli("doctor").code == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run_cli("--version").code == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
