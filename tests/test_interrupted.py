"""Kills, full disks and missing rights: the next run completes, with the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ANY_EMBEDDING, run_cli, snapshot

KILLS = 5
SMALL = (
    "--calibration-tokens",
    "2048",
    "--evaluation-tokens",
    "1024",
    "--preset",
    "fast",
    *ANY_EMBEDDING,
)


def build_command(model: Path, out: Path, text: Path) -> list[str]:
    return [
        sys.executable, "-m", "prox24_deploy", "build", str(model), "-o", str(out),
        "--calibration", str(text), "--shapes", "batch=1", "sequence=8", *SMALL,
    ]  # fmt: skip


def artefacts(bundle: Path) -> dict[str, str]:
    """Hashes of what must not depend on interruptions: weights and exported models."""
    files = snapshot(bundle)
    return {name: files[name] for name in files if name.startswith(("pruned/", "onnx/"))}


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.perf_counter()
    subprocess.run(build_command(tiny_bert, undisturbed, prose), check=True, capture_output=True)
    whole = time.perf_counter() - began
    draw = random.Random(24)
    cut_short = 0
    for attempt in range(KILLS):
        # Every third attempt starts from nothing, so that early stages are hit as well as late.
        if attempt % 3 == 0:
            shutil.rmtree(killed, ignore_errors=True)
        process = subprocess.Popen(
            build_command(tiny_bert, killed, prose), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(timeout=draw.uniform(0.1, 0.95) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            cut_short += process.wait() == -signal.SIGKILL
    assert cut_short >= KILLS // 2
    ended = subprocess.run(
        build_command(tiny_bert, killed, prose), check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert artefacts(killed) == artefacts(undisturbed)
    assert run_cli("verify", killed).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB, less than the bundle of the tiny model."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=300k", "none", str(mount_point)]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_a_full_disk_is_one_sentence_and_the_next_run_completes(
    small_disk: Path, tiny_bert: Path, prose: Path
) -> None:
    out = small_disk / "bundle"
    arguments = build_command(tiny_bert, out, prose)[3:]
    run = run_cli(*arguments)
    assert run.code == 2, run.err
    assert run.err.startswith("Error: No space left on the disk")
    assert len(run.err.strip().splitlines()) == 1
    grow = ["mount", "-o", "remount,size=20m", str(small_disk)]
    subprocess.run(grow, check=True)
    run = run_cli(*arguments)
    assert run.code == 0, run.err
    assert run_cli("verify", out).code == 0


def test_an_output_without_write_permission_is_refused(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    run = run_cli(*build_command(tiny_bert, closed / "bundle", prose)[3:])
    assert run.code == 2
    assert "cannot be written" in run.err
    assert "-o" in run.err


def test_two_builds_into_one_output_do_not_mix(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    """The second is refused while the first holds the lock, and the first is not disturbed."""
    out = tmp_path / "bundle"
    first = subprocess.Popen(
        build_command(tiny_bert, out, prose), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (out / "manifest.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    run = run_cli(*build_command(tiny_bert, out, prose)[3:])
    assert run.code == 2
    assert "is being written by another build" in run.err
    _, errors = first.communicate()
    assert first.returncode == 0, errors


def test_a_build_that_is_told_to_end_says_so_and_goes_on_later(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    command = [*build_command(tiny_bert, out, prose)]
    command[command.index("build")] = "prune"
    command = command[: command.index("--shapes")] + list(SMALL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Until the first block is solved, which is the middle of the work.
    while not list(out.glob(".partial/**/block-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said == "Terminated; finished stages are kept, run the same command to go on.\n"
    assert printed == ""
    assert not list(out.rglob("*.tmp"))
    run = run_cli(*command[3:])
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
