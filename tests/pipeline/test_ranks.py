"""Several processes prune as one does, by torchrun and Gloo; one that is lost loses no block."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from family_batches import batch, recipe_of
from safetensors.torch import load_file
from tiny_families import tiny_model
from torch import distributed as dist

from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.core.errors import (
    CalibrationError,
    RankError,
    RankGoneError,
    RecipeError,
    UsageError,
)
from prox24_deploy.core.types import silent
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.pipeline import ranks, ranks_job, run
from prox24_deploy.pipeline.api import prune
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pipeline.ranks import ERROR, OPTIONS, PROGRESS, _reason
from prox24_deploy.pruning import directory as pruning
from prox24_deploy.pruning.activations import Resources
from prox24_deploy.pruning.memory import Room
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.ranks import Ranks, during, joined, watched

CPU = torch.device("cpu")
KEPT = ".partial/*/block-0000.safetensors"


def arguments(model: Path, out: Path, prose: Path, *more: str) -> list[str]:
    return [
        "prune", str(model), "-o", str(out), "--calibration", str(prose), "--device", "cpu",
        "--calibration-tokens", "4096", "--evaluation-tokens", "1024", "--preset", "fast", *more,
    ]  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((out / "pruned").glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same(one: Path, other: Path) -> None:
    """The same masks, and weights but for the order of a sum, and one rounding."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert len(left) > 0
    for name, weight in left.items():
        assert torch.equal(weight != 0, right[name] != 0), name
        a, b = weight.double(), right[name].double()
        allowed = 1e-5 * a.abs().max() + torch.finfo(weight.dtype).eps * a.abs()
        assert bool(((a - b).abs() <= allowed).all()), name


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of several batches."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    words = "layer weight sparse dense group kernel batch token engine".split()  # noqa: SIM905
    draw = random.Random(0)
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=24)) for _ in range(400)))
    return path


@contextmanager
def one_thread() -> Iterator[None]:
    """Sum as processes that torchrun starts, in one thread: several come to other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    with one_thread():
        assert run_cli(*arguments(tiny_llama, out, prose)).code == 0
    return out


@pytest.fixture(scope="module")
def together(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / "out"
    run = run_cli(*arguments(tiny_llama, out, prose, "--gpus", "2"))
    assert run.code == 0, run.err
    assert "prune 1/2" in run.err
    return out


def test_two_processes_come_to_the_same_weights(alone: Path, together: Path) -> None:
    same(alone, together)


# Kills itself once the first block is solved by both.
DIES = """
import os, signal
from prox24_deploy.cli import main
from prox24_deploy.pruning.block import BlockSolver

solve = BlockSolver.solve

def dies(solver, step):
    if step.twin.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return solve(solver, step)

BlockSolver.solve = dies
main()
"""


def processes(
    model: Path,
    prose: Path,
    out: Path,
    *,
    other: tuple[str, ...] = (),
    second: tuple[str, ...] = ("-m", "prox24_deploy"),
) -> list["subprocess.Popen[str]"]:
    """Two processes as torchrun starts them; the second is another program or is told more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, (program, more) in enumerate(((("-m", "prox24_deploy"), ()), (second, other))):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, *program, *arguments(model, out, prose, *more)]
        started.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return started


def ended(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_a_lost_process_is_told_with_its_block_and_the_next_run_goes_on(
    tiny_llama: Path, prose: Path, alone: Path, together: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (code, said), (killed, _) = ended(processes(tiny_llama, prose, out, second=("-c", DIES)))
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "model.layers.1 was pruned" in said
    assert "Warning" not in said
    assert list(out.glob(KEPT))
    shutil.copytree(out, tmp_path / "other")
    assert [code for code, _ in ended(processes(tiny_llama, prose, out))] == [0, 0]
    found, undisturbed = weights(out), weights(together)
    assert found.keys() == undisturbed.keys()
    assert all(torch.equal(found[name], undisturbed[name]) for name in found)
    with one_thread():
        assert run_cli(*arguments(tiny_llama, tmp_path / "other", prose)).code == 0
    same(alone, tmp_path / "other")


def test_a_process_with_other_options_is_refused(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    more = ("--calibration-tokens", "3072")
    for code, said in ended(processes(tiny_llama, prose, tmp_path / "out", other=more)):
        assert code == 1
        assert "Process 1 of this run has --calibration-tokens 3072, and process 0 has 4" in said


def test_a_program_cannot_build_where_it_can_only_help(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match="Process 2 of a run by torchrun cannot write"):
        prune(tiny_llama, tmp_path / "out")


@pytest.mark.parametrize("torchrun", [False, True])
def test_more_processes_than_batches_are_refused_before_any_work(
    tiny_llama: Path,
    prose: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    torchrun: bool,
) -> None:
    monkeypatch.setattr(run, "prune_by_processes", lambda *_, **__: pytest.fail("was started"))
    monkeypatch.setattr(run, "shared", lambda _: pytest.fail("has joined"))
    more = ["--calibration-tokens", "1024"]
    if torchrun:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
    else:
        more += ["--gpus", "2"]
    found = run_cli(*arguments(tiny_llama, tmp_path / "out", prose, *more))
    assert found.code == 2
    assert found.err.strip() == (
        "Error: 2 processes need a batch of calibration text each, got 1; pass more text or start "
        "fewer processes."
    )
    assert not (tmp_path / "out").exists()


def help_on_one_batch(model: Path, prose: Path, ranks: Ranks) -> None:
    options = BuildOptions(text=TextOptions(calibration=(prose,), calibration_tokens=1024))
    context = read_context(model, None, options)
    pruning.help_to_prune(
        context.source, context.recipe, context.calibration, context.held_out, options.prune,
        device=CPU, memory_limit=None, ranks=ranks,
    )  # fmt: skip


def test_text_of_the_model_itself_that_is_too_short_is_refused_before_the_model_is_read(
    tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "structure_of", lambda *_: pytest.fail("was read"))
    with pytest.raises(CalibrationError, match="2 processes need a batch"):
        help_on_one_batch(tiny_llama, prose, Ranks(1, 2, CPU))


def test_a_process_takes_its_share_of_the_memory_of_its_machine(
    tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pruning,
        "room_on",
        lambda _, __, processes: Room(device=0, host=0, is_host=True, processes=processes),
    )
    with pytest.raises(UsageError, match="for each of 3 processes"):
        help_on_one_batch(tiny_llama, prose, Ranks(0, 1, CPU, here=3))


def test_a_process_that_has_too_little_memory_ends_all_with_its_words(
    tiny_llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "of_all", lambda _, own: [own, "Pruning takes at least 9 GiB."])
    with pytest.raises(UsageError, match=r"^Pruning takes at least 9 GiB\.$"):
        help_on_one_batch(tiny_llama, prose, Ranks(0, 1, CPU))


def test_more_processes_than_batches_are_refused() -> None:
    model = tiny_model("llama")
    recipe = recipe_of(model)
    with pytest.raises(CalibrationError, match=r"3 processes need a .* each, got 2;"):
        prune_model(
            model, recipe, (batch(recipe), batch(recipe)), (), PruneOptions(),
            stored_dtype=lambda _: torch.float32, store=BlockStore(Path()), progress=silent,
            resources=Resources(ranks=Ranks(0, 3, CPU)),
        )  # fmt: skip


def test_rows_and_samples_are_shared_out_whole() -> None:
    ranks = [Ranks(number, 3, CPU) for number in range(3)]
    for count in (0, 1, 2, 3, 7, 12):
        rows = [row for each in ranks for row in range(count)[each.rows(count)]]
        assert rows == list(range(count))
        samples = [item for each in ranks for item in each.share(range(count))]
        assert sorted(samples) == list(range(count))
        for item in range(count):
            assert item in ranks[ranks[0].owner(item)].share(range(count))


@pytest.mark.parametrize(("told", "here"), [("1", 1), (None, 2)])
def test_processes_wait_for_one_and_know_how_many_share_their_machine(
    monkeypatch: pytest.MonkeyPatch, told: str | None, here: int
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda _, **more: asked.update(more))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    if told:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    with joined(CPU) as ranks:
        assert ranks == Ranks(1, 2, CPU, here)
        assert asked["timeout"] == timedelta(hours=12)


def test_an_ending_is_told_only_where_others_take_part() -> None:
    with pytest.raises(RankError, match=r"was told to end while block b\.1 was pruned"):  # noqa: SIM117
        with during("b.1", Ranks(0, 2, CPU)):
            raise SystemExit(143)
    with pytest.raises(KeyboardInterrupt), during("b.1", Ranks(0, 1, CPU)):
        raise KeyboardInterrupt


def test_what_leads_to_a_block_is_told_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    both, cleared = Ranks(0, 2, CPU), []

    def lost(_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    def steps() -> Iterator[int]:
        yield 0
        yield 1
        cleared.append(True)
        both.sum_in_place(torch.zeros(1))

    monkeypatch.setattr(dist, "all_reduce", lost)
    with pytest.raises(RankGoneError):
        list(watched(steps(), ["b.0", "b.1"], both))
    assert cleared == [True]
    with pytest.raises(RankError, match=r"gone, which showed while block b\.2 was pruned"):
        list(watched(steps(), ["b.0", "b.1", "b.2"], both))


def test_a_process_that_finds_another_gone_leaves_it_to_what_started_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told_by_a_job(RankGoneError("gone"), tmp_path, monkeypatch, capsys) == ""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("a kernel failed"), "Prox24Error", "Internal error, RuntimeError: a kernel"),
        (OSError(errno.ENOSPC, "full", "block"), "UsageError", "No space left on the disk"),
        (MemoryError(), "BackendMissingError", "Not enough memory"),
        (RecipeError("no such target"), "RecipeError", "no such target"),
    ],
)
def test_what_ends_a_process_is_told_to_the_one_that_started_it(
    error: Exception,
    kind: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = json.loads(told_by_a_job(error, tmp_path, monkeypatch, capsys))
    assert (told["kind"], told["type"]) == (ERROR, kind)
    assert said in told["message"]


def told_by_a_job(
    error: Exception,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a job writes whose pruning ends with an error."""

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "prune", failing)
    monkeypatch.setattr(ranks_job, "end_on_termination", lambda: None)
    monkeypatch.setattr(ranks_job, "end_with_starter", lambda: None)
    file = folder / "job.json"
    options = OPTIONS.dump_python(BuildOptions(), mode="json")
    file.write_text(json.dumps({"model_dir": "m", "out": "o", "fresh": False, "options": options}))
    with pytest.raises(type(error)):
        ranks_job.main(str(file))
    return capsys.readouterr().out


SUMMARY = """\
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 8)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_03:44:20
  rank      : 0 (local_rank: 0)
  exitcode  : {code} (pid: 7)
  traceback : {traceback}
============================================================
"""
WARNED = """\
distributed_c10d.py:84: FutureWarning: `all_gather_into_tensor` is deprecated.
  return func(*args, **kwargs)
"""
KILLED = WARNED + SUMMARY.format(code=-9, traceback="Signal 9 (SIGKILL) received by PID 7")
RAISED = "[rank0]: ModuleNotFoundError: No module named 'x'\n"
HELP = "To enable traceback see: https://pytorch.org"


@pytest.mark.parametrize(
    ("code", "log", "why"),
    [
        (1, KILLED, "process 0 was ended by SIGKILL"),
        (-9, WARNED, "torchrun was ended by SIGKILL"),
        (-63, "", "torchrun was ended by signal 63"),
        (1, WARNED, "torchrun ended with exit code 1"),
        (1, SUMMARY.format(code=3, traceback=HELP), "process 0 ended with exit code 3"),
        (
            1, RAISED + WARNED + SUMMARY.format(code=1, traceback=HELP),
            "ModuleNotFoundError: No module named 'x'",
        ),
    ],
)  # fmt: skip
def test_a_warning_is_no_reason_why_a_run_ended(code: int, log: str, why: str) -> None:
    assert _reason(code, log) == why


def told(label: str, done: int, total: int) -> str:
    return json.dumps({"kind": PROGRESS, "label": label, "done": done, "total": total})


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ([], "before the first block"),
        ([told("sensitivity", 3, 9)], "after sensitivity 3/9"),
        ([told("prune", 0, 2), told("prune", 1, 2)], "while block 2 of 2 was pruned"),
        ([told("prune", 1, 2), told("prune", 2, 2)], "after prune 2/2"),
    ],
)
def test_a_run_that_was_killed_says_how_far_it_came(
    lines: list[str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; print(sys.argv[1]); sys.exit(sys.argv[2])"
    command = [sys.executable, "-S", "-c", script, "\n".join(lines), KILLED]
    monkeypatch.setattr(ranks, "_command", lambda *_: command)
    with pytest.raises(RankError) as error:
        ranks.prune_by_processes(
            2, tmp_path, tmp_path, BuildOptions(device="cpu"), fresh=False, progress=silent
        )
    assert str(error.value) == (
        f"Pruning by 2 processes ended {where}: process 0 was ended by SIGKILL; solved blocks are "
        "kept, run the same command again."
    )
