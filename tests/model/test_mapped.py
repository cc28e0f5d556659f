"""Models whose weights lie in mapped files are the same models."""

import errno
import os
from pathlib import Path

import pytest
import torch
from family_batches import batch, recipe_of
from tiny_families import tiny_model
from torch import nn

from prox24_deploy.model import directory as directories
from prox24_deploy.model import mapped
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.directory import load_model, open_model_dir, structure_of
from prox24_deploy.model.mapped import MappedFiles, Memory, load_mapped
from prox24_deploy.model.offload import fits, float_bytes, is_offloaded, logits_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _all_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)


def mapped_bytes() -> int:
    """Of this process, in files that are deleted already."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(".tensor (deleted)")]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_tensor_keeps_its_bits_in_a_file_that_goes_with_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    given = (1000 * torch.randn(33, 7)).to(dtype).T
    before = mapped_bytes()
    kept = MappedFiles(tmp_path).keep(given)
    assert torch.equal(kept, given)
    assert kept.dtype == dtype
    assert mapped_bytes() > before
    kept.zero_()
    assert given.any()
    assert not [*tmp_path.iterdir()]
    del kept
    assert mapped_bytes() == before


def test_a_small_tensor_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 5)
    given = torch.ones(1)
    assert MappedFiles(tmp_path).keep(given) is given


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        MappedFiles(tmp_path).keep(torch.ones(9))
    assert not [*tmp_path.iterdir()]


# A shared embedding, an encoder and a decoder, convolutions with buffers, and plain blocks.
@pytest.mark.parametrize("row", ["gpt2", "t5", "resnet, classes", "llama"])
def test_a_mapped_model_is_the_model(row: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(row)
    recipe = recipe_of(model)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    directory = open_model_dir(tmp_path / "model")
    held, found = load_model(directory, recipe, CPU), load_mapped(directory, recipe, tmp_path / "w")
    assert not is_offloaded(found)
    assert mapped_bytes() >= float_bytes(found)
    expected = held.state_dict()
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert all(torch.equal(*pair) for pair in zip(found.buffers(), held.buffers(), strict=True))
    assert float_bytes(found) == float_bytes(held)
    assert not any("forward" in vars(module) for module in found.modules())
    with torch.no_grad():
        outputs = [run_model(each, batch(recipe), recipe.task)[0] for each in (held, found)]
    assert torch.equal(*outputs)
    for parameter in found.parameters():
        parameter.zero_()
    directory.require_unchanged()


def opened(memory: Memory, path: Path) -> nn.Module:
    model = tiny_model("llama")
    model.save_pretrained(path)  # type: ignore[operator]
    return memory.load(open_model_dir(path), recipe_of(model), CPU)


@pytest.mark.parametrize(("limit", "files"), [(2**40, False), (1, True)])
def test_a_model_is_mapped_where_it_does_not_fit(
    limit: int, tmp_path: Path, *, files: bool
) -> None:
    memory = Memory(folder=tmp_path / "files", limit=limit, models=1)
    before = mapped_bytes()
    model = opened(memory, tmp_path / "model")
    assert (mapped_bytes() > before) == files
    directory = open_model_dir(tmp_path / "model")
    assert (memory.keep(directory, recipe_of(model)) is not None) == files


def test_the_structure_is_built_once_for_all_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def noted(path: Path, *rest: object, **more: object) -> nn.Module:
        built.append(path)
        return untrained(path, *rest, **more)  # type: ignore[arg-type]

    untrained = directories.build_untrained
    monkeypatch.setattr(directories, "build_untrained", noted)
    memory = Memory(folder=tmp_path / "files", limit=1, models=1)
    model = opened(memory, tmp_path / "model")
    assert memory.keep(open_model_dir(tmp_path / "model"), recipe_of(model)) is not None
    assert built == [tmp_path / "model"]


def test_predictions_of_a_vocabulary_count(tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = recipe_of(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    structure = structure_of(open_model_dir(tmp_path), recipe)
    samples = [batch(recipe)]
    predicted = run_model(model, samples[0], recipe.task).logits
    assert logits_bytes(structure, samples) == predicted.numel() * 4
    weights = 2.25 * float_bytes(structure)
    room = int(weights + 2 * logits_bytes(structure, samples))
    assert fits(structure, 2, CPU, room, samples=samples)
    assert not fits(structure, 2, CPU, room - 1, samples=samples)
    assert logits_bytes(nn.Linear(3, 4), samples) == 0


def test_what_a_model_in_memory_is_turned_into_has_a_folder_for_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    directory = open_model_dir(tmp_path / "model")
    memory = Memory(folder=tmp_path / "files", limit=1, models=1)
    keep = memory.keep(directory, recipe_of(model))
    assert keep is not None
    assert torch.equal(keep(torch.ones(3)), torch.ones(3))
