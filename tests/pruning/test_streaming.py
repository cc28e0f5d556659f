"""A model that does not fit into memory is pruned to the same bits as one that does."""

import errno
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_batches import batch, recipe_of
from safetensors import SafetensorError
from tiny_families import tiny_model
from torch import Tensor

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.errors import WRITING, UsageError
from prox24_deploy.core.records import PruneResult, TextSource
from prox24_deploy.model import mapped, offload
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.directory import load_model, open_model_dir, structure_of
from prox24_deploy.model.offload import bring, drop, is_offloaded
from prox24_deploy.pruning import directory, hidden_states, memory, reconstruct
from prox24_deploy.pruning.hidden_states import OnDisk, OnHost
from prox24_deploy.pruning.memory import (
    Needs,
    Placement,
    Room,
    needs_of,
    place,
    require_disk,
    room_on,
)
from prox24_deploy.pruning.reconstruct import AdamOptions

CPU = torch.device("cpu")
# Plain blocks, blocks that hand each other more than hidden states, an encoder whose blocks run
# again in front of a decoder, blocks of convolutions with buffers, a shared embedding, and experts.
ROWS = ["llama", "t5", "bart", "resnet, classes", "gpt2", "gemma2", "mixtral"]
PLAIN = PruneOptions(method="wanda", preset="fast", permute="none")
HELD = Placement(streamed=False, states="device", bytes=0)
PLACES = [
    Placement(streamed=False, states="disk", bytes=0),
    Placement(streamed=True, states="device", bytes=0),
    Placement(streamed=True, states="host", bytes=0),
    Placement(streamed=True, states="disk", bytes=0),
]


def pruned(
    row: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: Placement,
    *,
    tuned: bool = False,
    options: PruneOptions = PLAIN,
) -> tuple[dict[str, str], PruneResult]:
    """Hashes of the weight files of a pruned tiny model, and the record."""
    torch.manual_seed(0)
    model = tiny_model(row)
    recipe = recipe_of(model)
    model.save_pretrained(out / "model")  # type: ignore[operator]
    source = TextSource(kind="file", sha256="0" * 64, tokens=1, samples=1, paths=())
    samples = Samples(batches=(batch(recipe), batch(recipe)), source=source)
    asked: list[str] = []

    def placed(*_: object, whole: str) -> Placement:
        asked.append(whole)
        return placement

    monkeypatch.setattr(directory, "place", placed)
    result = directory.prune_directory(
        open_model_dir(out / "model"),
        recipe,
        samples,
        samples,
        replace(options, reconstruct=tuned),
        device=CPU,
        solved=out / "solved",
        out=out / "pruned",
        progress=lambda *_: None,
    )
    assert asked == [""]
    assert not (out / "solved" / "scratch").exists()
    files = sorted((out / "pruned").glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}, result


@pytest.mark.parametrize(
    ("row", "tuned"), [*((row, False) for row in ROWS), ("llama", True), ("qwen3_moe", True)]
)
def test_where_things_are_kept_changes_no_bit(
    row: str, *, tuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reconstruct.SCHEDULES, "fast", AdamOptions(steps=8, check_every=4))
    expected, whole = pruned(row, tmp_path / "held", monkeypatch, HELD, tuned=tuned)
    for number, placement in enumerate(PLACES if row == "llama" else PLACES[-1:]):
        found, result = pruned(row, tmp_path / str(number), monkeypatch, placement, tuned=tuned)
        assert found == expected, placement
        assert result.memory != whole.memory
        names = [(layer.name, layer.relative_error) for layer in result.layers]
        assert names == [(layer.name, layer.relative_error) for layer in whole.layers]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("llama", replace(PLAIN, permute="auto")),
        ("bart", replace(PLAIN, permute="auto")),
        ("llama", replace(PLAIN, max_layers=3)),
    ],
)
def test_what_needs_the_whole_model_has_it_in_files_on_a_cpu(
    row: str, options: PruneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)
    expected, whole = pruned(row, tmp_path / "held", monkeypatch, HELD, options=options)
    kept: list[Tensor] = []
    keep = mapped.MappedFiles.keep

    def noted(files: mapped.MappedFiles, one: Tensor) -> Tensor:
        kept.append(keep(files, one))
        return kept[-1]

    monkeypatch.setattr(mapped.MappedFiles, "keep", noted)
    found, result = pruned(row, tmp_path / "files", monkeypatch, PLACES[-1], options=options)
    assert kept
    assert found == expected
    assert result.orders == whole.orders
    assert bool(result.orders) == (options.permute == "auto")


def test_a_mask_needs_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned("llama", tmp_path / "first", monkeypatch, HELD)
    masked = PruneOptions(preset="fast", permute="none", mask=tmp_path / "first" / "pruned")
    expected, _ = pruned("llama", tmp_path / "held", monkeypatch, HELD, options=masked)
    found, _ = pruned("llama", tmp_path / "files", monkeypatch, PLACES[-1], options=masked)
    assert found == expected


def test_a_block_comes_and_goes_and_its_file_stays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = recipe_of(model)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    source = open_model_dir(tmp_path / "model")
    held, found = load_model(source, recipe, CPU), load_model(
        source, recipe, CPU, offload=tmp_path / "offload"
    )  # fmt: skip
    block = found.get_submodule("model.layers.0")
    assert is_offloaded(found)
    bring(block, CPU)
    expected = held.get_submodule("model.layers.0").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in block.state_dict().items())
    for parameter in block.parameters():
        parameter.zero_()
    drop(block)
    assert all(parameter.is_meta for parameter in block.parameters())
    source.require_unchanged()


def test_states_keep_their_bits_on_host_and_disk(tmp_path: Path) -> None:
    states = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for kept in (OnHost(states), OnDisk(states, tmp_path / "states")):
        assert all(torch.equal(*pair) for pair in zip(kept, states, strict=True))
        kept[1] = -states[1]
        assert torch.equal(kept[1], -states[1])
        assert torch.equal(kept[2], states[2])


def test_a_disk_that_is_full_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    kept = OnDisk([torch.ones(1, 2, 3)], tmp_path / "states")
    monkeypatch.setattr(hidden_states, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        kept[0] = torch.zeros(1, 2, 3)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "states" / "00000.safetensors")
    assert WRITING in caught.value.__notes__


def test_hidden_states_that_the_disk_has_no_room_for_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "OUT" / "scratch"
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    require_disk(3 << 30, folder)
    with pytest.raises(UsageError, match=r"take 3\.01 GiB on the disk of .*scratch, and 3\.00 GiB"):
        require_disk((3 << 30) + 1, folder)
    # What a killed run left there goes before anything is written.
    folder.mkdir(parents=True)
    (folder / "states").write_bytes(b"1")
    require_disk((3 << 30) + 1, folder)


NEEDS = Needs(model=1000, outside=100, block=50, blocks=2, states=400, working=30)
OVER = NEEDS.streamed() - (100 + 2 * 50 + 30)


@pytest.mark.parametrize(
    ("device", "host", "streamed", "states", "takes"),
    [
        (OVER + 1480, 0, False, "device", OVER + 1480),
        (OVER + 1479, 0, True, "device", OVER + 630),
        (OVER + 629, 801, True, "host", OVER + 230),
        (OVER + 629, 799, True, "disk", OVER + 230),
    ],
)
def test_as_much_is_kept_in_memory_as_there_is_room_for(
    *, device: int, host: int, streamed: bool, states: str, takes: int
) -> None:
    room = Room(device=device, host=host, is_host=False)
    found = place(NEEDS, room)
    assert (found.streamed, found.states, found.bytes) == (streamed, states, takes)


def test_the_memory_of_a_host_is_not_taken_twice() -> None:
    room = Room(device=OVER + 629, host=OVER + 629, is_host=True)
    assert place(NEEDS, room).states == "disk"


def test_a_cpu_keeps_some_of_what_is_worked_with_on_its_heap() -> None:
    """Tensors below 32 MiB are freed to the heap of the C library, not to the system."""
    plenty = 1 << 40
    for working, kept in ((30, 30), (1 << 30, 5 << 26)):
        needs = replace(NEEDS, working=working)
        on_gpu, on_cpu = (
            place(needs, Room(device=plenty, host=plenty, is_host=is_host)).bytes
            for is_host in (False, True)
        )
        assert on_cpu - on_gpu == kept


def test_processes_of_one_machine_share_its_memory_and_each_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 800)
    monkeypatch.setattr(offload, "free_memory", lambda: 800)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (500, 600))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert room_on(cpu, None, 8) == Room(device=100, host=100, is_host=True, processes=8)
    assert room_on(cpu, 400, 8).device == 50
    assert room_on(gpu, None, 8) == Room(device=500, host=100, is_host=False, processes=8)
    assert room_on(gpu, 400, 8).device == 400


def test_too_little_memory_for_several_processes_says_that_fewer_would_do() -> None:
    room = Room(device=OVER, host=0, is_host=True, processes=8)
    with pytest.raises(UsageError, match=r"for each of 8 processes; .*, start fewer processes or"):
        place(NEEDS, room)


@pytest.mark.parametrize(
    ("whole", "end"),
    [("", "larger device."), ("--permute auto", "; --permute auto needs the whole model, without")],
)
def test_too_little_memory_is_refused_with_what_it_takes(whole: str, end: str) -> None:
    with pytest.raises(UsageError, match=r"takes at least 0\.51 GiB.*--memory-limit") as error:
        place(NEEDS, Room(device=OVER, host=0, is_host=True), whole=whole)
    assert end in str(error.value)
    # A need that is rounded up, and room that is rounded down, never look alike.
    assert "and 0.50 GiB are free or allowed" in str(error.value)


def test_needs_are_those_of_the_weights_and_samples(tmp_path: Path) -> None:
    model = tiny_model("llama")
    recipe = recipe_of(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    structure = structure_of(open_model_dir(tmp_path), recipe)
    assert all(parameter.is_meta for parameter in structure.parameters())
    samples = (batch(recipe), batch(recipe))
    needs = needs_of(structure, recipe, samples, PruneOptions())
    block = 4 * sum(p.numel() for p in model.get_submodule("model.layers.0").parameters())
    assert needs.model == 4 * sum(p.numel() for p in model.parameters())
    assert (needs.block, needs.outside) == (block, needs.model - 2 * block)
    assert needs.states == 2 * 4 * 32 * 2 * 36
    assert needs_of(structure, recipe, samples, PruneOptions(reconstruct=True)).blocks == 3
