"""A run that is refused loses nothing: neither what an earlier one left nor what it was to read."""

import shutil
from pathlib import Path

import pytest
import torch
from command_line import Run, run_cli, snapshot
from safetensors.torch import save_file

BLOCK = Path(".partial", "prune-0123456789abcdef", "block-0000.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and a bundle that the model was pruned into."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_bert, place / "model")
    shutil.copyfile(prose, place / "text.txt")
    assert prune(place).code == 0
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with a block that an interrupted run with other options left."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / BLOCK).parent.mkdir(parents=True)
    (tmp_path / "out" / BLOCK).write_bytes(b"hours of work")
    return tmp_path


def prune(place: Path, *extra: str | Path, model: str = "model") -> Run:
    text = () if "--calibration" in extra else ("--calibration", place / "text.txt")
    return run_cli(
        "prune", place / model, "-o", place / "out", "--calibration-tokens", "1024",
        "--evaluation-tokens", "1024", "--method", "magnitude", *text, *extra,
    )  # fmt: skip


def assert_refused(place: Path, run: Run, before: dict[str, str], said: str) -> None:
    assert run.code == 2, run
    assert said in run.err
    assert snapshot(place) == before
    again = prune(place)
    assert again.code == 0, again.err
    assert snapshot(place / "out" / "pruned") == {
        name.removeprefix("out/pruned/"): digest
        for name, digest in before.items()
        if name.startswith("out/pruned/")
    }


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ("out/pruned", ()),
        ("model", ("--mask", "out/pruned")),
        ("model", ("--calibration", "out/pruned/README.md")),
    ],
)
def test_what_is_read_may_not_lie_in_the_output(
    place: Path, model: str, extra: tuple[str, ...]
) -> None:
    before = snapshot(place)
    run = prune(place, *(place / one if "/" in one else one for one in extra), model=model)
    assert_refused(place, run, before, f"lies in output {place / 'out'}; pass another -o.")


def test_too_little_memory_loses_neither_the_model_nor_solved_blocks(place: Path) -> None:
    before = snapshot(place)
    run = prune(place, "--method", "wanda", "--memory-limit", "1e-6")
    assert_refused(place, run, before, "--memory-limit")


def test_masks_that_do_not_fit_lose_nothing(place: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.bool)}, place / "masks.safetensors")
    before = snapshot(place)
    run = prune(place, "--mask", place / "masks.safetensors")
    assert_refused(place, run, before, "mask")


def test_a_run_that_begins_removes_what_others_left(place: Path) -> None:
    run = prune(place, "--method", "wanda")
    assert run.code == 0, run.err
    assert not (place / "out" / BLOCK).exists()
