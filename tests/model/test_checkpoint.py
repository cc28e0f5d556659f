"""What is written to disk: only pruned tensors change, and the files are the same every time."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from prox24_deploy.core.errors import ModelDirError, RecipeError, SparsityLostError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.model import checkpoint
from prox24_deploy.model.checkpoint import (
    BlockStore,
    checkpoint_name,
    stored_dtype,
    write_pruned,
    write_tensors,
)
from prox24_deploy.model.directory import ModelDir, open_model_dir
from prox24_deploy.sparsity.declaration import SPARSE_KEY
from prox24_deploy.sparsity.pattern import project_24

TARGET = "model.layers.0.mlp.up_proj.weight"
RECORD = LayerRecord(
    name="a.b",
    shape=(4, 8),
    status="pruned",
    reason="",
    method="prox",
    relative_error=0.1,
    held_out_error=None,
    iterations=3,
    seconds=0.5,
)


def pruned_weight(directory: ModelDir, name: str = TARGET) -> torch.Tensor:
    with safe_open(directory.tensors[name].shard, framework="pt") as handle:
        return project_24(handle.get_tensor(name))


def test_a_block_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks")
    weights = {"a.b": torch.randn(4, 8).half()}
    assert store.load(3) is None
    store.save(3, weights, (RECORD,))
    found = store.load(3)
    assert found is not None
    assert torch.equal(found[0]["a.b"], weights["a.b"])
    assert found[1] == (RECORD,)
    assert store.load(2) is None


def test_a_damaged_block_is_not_used(tmp_path: Path) -> None:
    store = BlockStore(tmp_path)
    store.save(0, {"a": torch.ones(4)}, (RECORD,))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-3])
    assert store.load(0) is None
    save_file({"a": torch.ones(4)}, path)
    assert store.load(0) is None
    save_file({"a": torch.ones(4)}, path, {"records": "[1]"})
    assert store.load(0) is None


def test_only_pruned_tensors_change_and_the_header_names_them(
    tiny_llama: Path, tmp_path: Path
) -> None:
    directory = open_model_dir(tiny_llama)
    weight = pruned_weight(directory)
    digest = write_pruned(directory, {TARGET: weight}, tmp_path / "out")
    for shard in directory.shards:
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert list(before) == list(after)
        for name, tensor in before.items():
            assert torch.equal(after[name], weight if name == TARGET else tensor)
        with safe_open(tmp_path / "out" / shard.name, framework="pt") as handle:
            metadata = handle.metadata()
        assert metadata["format"] == "pt"
        assert json.loads(metadata.get(SPARSE_KEY, "{}")) == (
            {TARGET: 1} if TARGET in before else {}
        )
    written = open_model_dir(tmp_path / "out")
    assert written.tensors.keys() == directory.tensors.keys()
    names = {file.name for file in tiny_llama.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    again = write_pruned(directory, {TARGET: weight}, tmp_path / "again")
    assert again == digest


def test_a_weight_that_is_not_24_on_disk_is_a_lost_sparsity(
    tiny_llama: Path, tmp_path: Path
) -> None:
    directory = open_model_dir(tiny_llama)
    weight = pruned_weight(directory)
    weight[2, 4:8] = 1.0
    with pytest.raises(SparsityLostError, match=rf"{TARGET} in .* the group at \(2, 4\)"):
        write_pruned(directory, {TARGET: weight}, tmp_path / "out")


def test_weights_may_be_read_by_whoever_may_read_other_files(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The library that writes them lets nobody but their owner read them."""
    directory = open_model_dir(tiny_llama)
    write_pruned(directory, {TARGET: pruned_weight(directory)}, tmp_path / "out")
    plain = tmp_path / "plain"
    plain.touch()
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode == plain.stat().st_mode, file


def test_a_weight_of_another_shape_or_dtype_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = open_model_dir(tiny_llama)
    for i, wrong in enumerate((torch.zeros(3, 4).half(), pruned_weight(directory).float())):
        with pytest.raises(ModelDirError, match=f"Tensor {TARGET} of .* is torch.float16"):
            write_pruned(directory, {TARGET: wrong}, tmp_path / f"out{i}")


def test_a_prefix_that_only_one_side_has_is_bridged(tiny_bert: Path, tmp_path: Path) -> None:
    """`BertModel` loads `bert.encoder…` of a classifier's checkpoint, and the reverse."""
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({f"bert.{k}": v for k, v in weights.items()}, model / "model.safetensors")
    directory = open_model_dir(model)
    inner = "encoder.layer.0.output.dense.weight"
    assert checkpoint_name(directory, inner) == f"bert.{inner}"
    assert checkpoint_name(directory, f"bert.{inner}") == f"bert.{inner}"
    assert stored_dtype(directory, inner) == torch.float32
    assert checkpoint_name(open_model_dir(tiny_bert), f"model.{inner}") == inner
    with pytest.raises(RecipeError, match=r"dense.weight .*matches \d+ tensors"):
        checkpoint_name(directory, "dense.weight")
    with pytest.raises(RecipeError, match="matches 0 tensors"):
        checkpoint_name(directory, "encoder.layer.7.output.dense.weight")


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    """The writer puts metadata in the order of a hash that is seeded at random."""
    tensors = {"ä/b": torch.arange(5.0), 'quote "': torch.ones(3, dtype=torch.int8)}
    metadata = {"format": "pt", "records": 'a "b" → \n\x01\x7f', "x": "", "y": "{}", "z": "\\"}
    path = tmp_path / "x.safetensors"
    hashes = set()
    for _ in range(20):
        write_tensors(path, tensors, metadata)
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == metadata
        assert all(torch.equal(handle.get_tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("message", "number"),
    [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("odd", errno.EIO)],
)
def test_a_failed_write_is_an_operating_system_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, number: int
) -> None:
    """The writer's own error type hides the number that tells a full disk from a fault."""

    def fail(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(message)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match=r"odd|No space") as caught:
        write_tensors(tmp_path / "x.safetensors", {}, {})
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []
