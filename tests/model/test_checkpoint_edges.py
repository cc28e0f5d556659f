"""What is written: 2:4 weights in their places, every other byte as it was, or nothing at all."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import BERT, CPU, LLAMA, LLAMA_TARGETS, NO_FILES, load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel

from prox24_deploy.core.errors import ModelDirError, RecipeError, SparsityLostError
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.model import checkpoint
from prox24_deploy.model.checkpoint import (
    BlockStore,
    checkpoint_name,
    saving,
    stored_dtype,
    write_pruned,
    write_tensors,
)
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.model.shards import StoredTensor
from prox24_deploy.sparsity.declaration import SPARSE_KEY
from prox24_deploy.sparsity.pattern import is_24, project_24

INDEX = "model.safetensors.index.json"
NAMES = [f"model.layers.{i}.{target}.weight" for i in range(2) for target in LLAMA_TARGETS]


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return dict(handle.metadata())


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: equal bits, where `torch.equal` takes -0.0 for +0.0."""
    return tensor.contiguous().view(torch.uint8)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def projected(directory: ModelDir, names: list[str]) -> dict[str, Tensor]:
    return {name: project_24(load_file(directory.tensors[name].shard)[name]) for name in names}


def directory_of(*names: str) -> ModelDir:
    """A model directory that exists only as a list of tensors."""
    stored = StoredTensor(Path("x/model.safetensors"), torch.float32, 1)
    return ModelDir(
        path=Path("x"),
        config={"model_type": "bert"},
        shards=(),
        tensors=dict.fromkeys(names, stored),
        snapshot=NO_FILES,
    )


@pytest.fixture
def solved() -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(8, 4, generator=generator)
    # Rows of one stacked solution share their memory, as the solver leaves them.
    weights = {"q_proj": stacked[:4], "k_proj": stacked[4:], "o_proj": 3 * stacked.half()}
    weights["o_proj"][0, 0] = -0.0
    records = (
        LayerRecord(
            name="layers.0.q_proj",
            shape=(4, 4),
            status="pruned",
            reason="",
            method="prox",
            relative_error=0.1 + 0.2,
            held_out_error=None,
            iterations=55,
            seconds=1e-3,
        ),
        LayerRecord(
            name="layers.0.ä",
            shape=(4, 6),
            status="skipped",
            reason="größe 6",
            method="",
            relative_error=None,
            held_out_error=None,
            iterations=0,
            seconds=0.0,
        ),
    )
    return weights, records


def test_a_solved_block_comes_back_bit_for_bit(
    tmp_path: Path, solved: tuple[dict[str, Tensor], tuple[LayerRecord, ...]]
) -> None:
    store = BlockStore(tmp_path / "new" / "folder")
    store.save(3, *solved)
    found = store.load(3)
    assert found is not None
    weights, records = found
    assert records == solved[1]
    assert weights.keys() == solved[0].keys()
    for name, weight in solved[0].items():
        assert weights[name].dtype == weight.dtype
        assert torch.equal(bits(weights[name]), bits(weight))
    assert store.load(2) is None
    assert [path.name for path in store.folder.iterdir()] == ["block-0003.safetensors"]


def save_blocks(store: BlockStore, count: int, solved: Any, error: BaseException | None) -> None:
    """Give some blocks to be saved, and then fail."""
    with saving(store) as save:
        for index in range(count):
            save(index, *solved)
        if error is not None:
            raise error


def test_a_block_is_saved_though_what_follows_fails(tmp_path: Path, solved: Any) -> None:
    store = BlockStore(tmp_path / "blocks")
    with pytest.raises(KeyboardInterrupt):
        save_blocks(store, 1, solved, KeyboardInterrupt())
    assert store.load(0) is not None


@pytest.mark.parametrize("count", [1, 2])
def test_a_block_that_cannot_be_saved_is_told(tmp_path: Path, solved: Any, count: int) -> None:
    def changed() -> None:
        raise ModelDirError("the model was written meanwhile")

    store = BlockStore(tmp_path / "blocks", changed)
    with pytest.raises(ModelDirError, match="meanwhile"):
        save_blocks(store, count, solved, None)
    assert store.load(0) is None


def test_a_block_in_which_nothing_was_pruned_comes_back(tmp_path: Path) -> None:
    record = LayerRecord(
        name="layers.0.odd",
        shape=(4, 6),
        status="skipped",
        reason="odd",
        method="",
        relative_error=None,
        held_out_error=None,
        iterations=0,
        seconds=0.0,
    )
    store = BlockStore(tmp_path)
    store.save(0, {}, (record,))
    assert store.load(0) == ({}, (record,))


def test_a_store_without_a_folder_holds_nothing(tmp_path: Path) -> None:
    assert BlockStore(tmp_path / "nowhere").load(0) is None
    assert not (tmp_path / "nowhere").exists()


def test_a_block_cut_anywhere_is_not_there(
    tmp_path: Path, solved: tuple[dict[str, Tensor], tuple[LayerRecord, ...]]
) -> None:
    store = BlockStore(tmp_path)
    store.save(0, *solved)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for kept in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(whole) - 1):
        file.write_bytes(whole[:kept])
        assert store.load(0) is None, kept
    file.write_bytes(whole)
    assert store.load(0) is not None


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"format": "pt"},
        {"records": "["},
        {"records": "{}"},
        {"records": '[{"name": "q"}]'},
    ],
)
def test_a_block_without_its_records_is_not_there(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"q_proj": torch.zeros(4, 4)}, tmp_path / "block-0000.safetensors", metadata)
    assert BlockStore(tmp_path).load(0) is None


def test_the_same_tensors_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0), "a": torch.arange(3)}
    metadata = {f"key {i}": f'"größe"\n\\ \u2028 {i}' for i in range(20)}
    written = set()
    for i in range(8):
        # The library keeps metadata in a map whose order is random.
        turned = {f"key {(i + j) % 20}": metadata[f"key {(i + j) % 20}"] for j in range(20)}
        write_tensors(tmp_path / "a.safetensors", dict(tensors), turned)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
    assert metadata_of(tmp_path / "a.safetensors") == metadata
    back = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_header_that_would_not_fit_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terse(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        # Valid JSON that Python writes longer than this.
        header = b'{"__metadata__":{},"a":1E9}'
        path.write_bytes(len(header).to_bytes(8, "little") + header)

    monkeypatch.setattr(checkpoint, "save_file", terse)
    with pytest.raises(RuntimeError, match="header grew from 27 to"):
        write_tensors(tmp_path / "a.safetensors", {}, {})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("message", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: Disk quota exceeded (os error 122) at path", errno.EDQUOT),
        ("something without a number", errno.EIO),
        ("os error unknown", errno.EIO),
    ],
)
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, number: int
) -> None:
    target = tmp_path / "a.safetensors"
    write_tensors(target, {"a": torch.ones(4)}, {"state": "old"})
    before = target.read_bytes()

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(before[:10])
        raise SafetensorError(f"Error while serializing: {message}")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="Error while serializing") as caught:
        write_tensors(target, {"a": torch.zeros(4)}, {"state": "new"})
    assert caught.value.errno == number
    assert caught.value.filename == str(target)
    assert files_in(tmp_path) == {"a.safetensors": before}


LIMITED_WRITE = """
import pathlib, resource, sys, torch
from prox24_deploy.model.checkpoint import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write_tensors(pathlib.Path(sys.argv[1]), {"a": torch.zeros(10_000)}, {})
except OSError as error:
    print(error.errno)
"""


def test_the_number_of_a_real_write_error_is_kept(tmp_path: Path) -> None:
    """In a process of its own: the limit would hold for this one's log as well."""
    command = [sys.executable, "-c", LIMITED_WRITE, str(tmp_path / "a.safetensors")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "nowhere" / "a.safetensors", {"a": torch.zeros(4)}, {})


@pytest.mark.parametrize(
    ("tensors", "parameter", "expected"),
    [
        (("encoder.x.weight", "other.encoder.x.weight"), "encoder.x.weight", "encoder.x.weight"),
        (("bert.encoder.x.weight", "cls.y"), "encoder.x.weight", "bert.encoder.x.weight"),
        (("layers.0.q.weight", "norm.weight"), "model.layers.0.q.weight", "layers.0.q.weight"),
    ],
)
def test_a_parameter_is_found_with_a_prefix_more_or_less(
    tensors: tuple[str, ...], parameter: str, expected: str
) -> None:
    assert checkpoint_name(directory_of(*tensors), parameter) == expected


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        (("left.encoder.x.weight", "right.encoder.x.weight"), 2),
        (("bert.encoder.x.weight", "x.weight"), 2),
        (("decoder.x.weight", "sencoder.x.weight", "coder.x.weight"), 0),
        ((), 0),
    ],
)
def test_a_parameter_that_cannot_be_placed_is_refused(tensors: tuple[str, ...], count: int) -> None:
    with pytest.raises(RecipeError, match=rf"Weight encoder\.x\.weight .* matches {count} tensors"):
        checkpoint_name(directory_of(*tensors), "encoder.x.weight")


def test_the_dtype_is_that_of_the_checkpoint(tiny_llama: Path, tiny_bert: Path) -> None:
    decoder, encoder = open_model_dir(tiny_llama), open_model_dir(tiny_bert)
    assert stored_dtype(decoder, NAMES[0]) == torch.float16
    assert stored_dtype(encoder, "encoder.layer.0.output.dense.weight") == torch.float32
    with pytest.raises(RecipeError, match="matches 0 tensors"):
        stored_dtype(encoder, "decoder.weight")


@dataclass(frozen=True)
class Written:
    """A dense directory, what was to replace its weights, and where it was written."""

    dense: ModelDir
    weights: dict[str, Tensor]
    out: Path
    digest: str


@pytest.fixture(scope="module")
def written(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    path = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("checkpoint") / "dense"))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("modeling.py", "pytorch_model.bin", ".hidden.json", "recipe.toml", "README.md"):
        (path / name).write_text("not to be copied", encoding="utf-8")
    dense = open_model_dir(path)
    weights = projected(dense, NAMES)
    out = path.parent / "new" / "pruned"
    return Written(dense, weights, out, write_pruned(dense, weights, out))


def test_the_new_weights_are_in_their_places_and_2_to_4(written: Written) -> None:
    for name, weight in written.weights.items():
        shard = written.out / written.dense.tensors[name].shard.name
        assert torch.equal(bits(load_file(shard)[name]), bits(weight)), name
        assert is_24(load_file(shard)[name])
        assert not is_24(load_file(written.dense.tensors[name].shard)[name])


def test_every_other_tensor_keeps_its_bytes_and_its_shard(written: Written) -> None:
    kept = 0
    for shard in written.dense.shards:
        before, after = load_file(shard), load_file(written.out / shard.name)
        assert before.keys() == after.keys()
        for name in before.keys() - written.weights.keys():
            assert before[name].dtype == after[name].dtype
            assert before[name].shape == after[name].shape
            assert torch.equal(bits(before[name]), bits(after[name])), name
            kept += 1
    assert kept == len(written.dense.tensors) - len(NAMES) > 0
    assert "model.embed_tokens.weight" not in written.weights


def test_other_files_are_copied_but_never_code_or_pickles(written: Written) -> None:
    before, after = files_in(written.dense.path), files_in(written.out)
    left_out = {"modeling.py", "pytorch_model.bin", ".hidden.json", "recipe.toml", "README.md"}
    assert after.keys() == before.keys() - left_out
    for name in after:
        if not name.endswith(".safetensors"):
            assert after[name] == before[name], name


def test_each_weight_file_lists_its_own_sparse_weights_with_their_axis(written: Written) -> None:
    listed: list[str] = []
    for shard in written.dense.shards:
        metadata = metadata_of(written.out / shard.name)
        assert metadata["format"] == "pt"
        declared = json.loads(metadata.get(SPARSE_KEY, "{}"))
        assert set(declared) == load_file(shard).keys() & set(NAMES)
        assert set(declared.values()) <= {1}
        listed += declared
    assert sorted(listed) == sorted(NAMES)


def test_the_written_directory_is_sound_and_opens_as_the_pruned_model(written: Written) -> None:
    directory = open_model_dir(written.out)
    assert directory.tensors.keys() == written.dense.tensors.keys()
    parameters = dict(load(written.out, LLAMA).named_parameters())
    dense = dict(load_model(written.dense, LLAMA, CPU).named_parameters())
    for name, parameter in parameters.items():
        expected = written.weights[name].float() if name in written.weights else dense[name]
        assert torch.equal(parameter, expected), name


def test_writing_again_gives_the_same_bytes_and_the_same_hash(
    written: Written, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert write_pruned(written.dense, written.weights, again) == written.digest
    assert files_in(again) == files_in(written.out)


def test_the_hash_tells_weights_apart_in_every_shard(written: Written, tmp_path: Path) -> None:
    digests = {written.digest}
    shards = {written.dense.tensors[name].shard: name for name in NAMES}
    for i, name in enumerate(shards.values()):
        changed = written.weights | {name: torch.zeros_like(written.weights[name])}
        digests.add(write_pruned(written.dense, changed, tmp_path / str(i)))
    assert len(digests) == 1 + len(shards) > 2


def test_weights_may_be_views(written: Written, tmp_path: Path) -> None:
    turned = {name: w.T.contiguous().T for name, w in written.weights.items()}
    assert not any(weight.is_contiguous() for weight in turned.values())
    write_pruned(written.dense, turned, tmp_path / "views")
    assert files_in(tmp_path / "views") == files_in(written.out)


def test_a_shard_without_pruned_weights_is_not_declared_sparse(
    written: Written, tmp_path: Path
) -> None:
    name = NAMES[0]
    write_pruned(written.dense, {name: written.weights[name]}, tmp_path / "out")
    for shard in written.dense.shards:
        metadata = metadata_of(tmp_path / "out" / shard.name)
        assert (SPARSE_KEY in metadata) == (shard == written.dense.tensors[name].shard)


def test_metadata_of_the_checkpoint_is_kept_and_made_where_there_is_none(
    tiny_bert: Path, tmp_path: Path
) -> None:
    for i, metadata in enumerate(({"format": "pt", "trained": "1999"}, None)):
        path = Path(shutil.copytree(tiny_bert, tmp_path / f"dense-{i}"))
        save_file(load_file(path / "model.safetensors"), path / "model.safetensors", metadata)
        write_pruned(open_model_dir(path), {}, tmp_path / f"out-{i}")
        found = metadata_of(tmp_path / f"out-{i}" / "model.safetensors")
        assert found == (metadata or {"format": "pt"})
        assert not (tmp_path / f"out-{i}" / INDEX).exists()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_is_not_2_to_4_on_disk_is_an_error(
    written: Written, tmp_path: Path, axis: int
) -> None:
    name = NAMES[3]
    broken = written.weights[name].clone()
    broken[5, 8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    if axis == 0:
        # 2:4 along the rows is not what a matrix product needs.
        broken = project_24(torch.ones_like(broken), 0)
    message = rf"Weight {name} in .* not 2:4 along axis 1: the group at \({[0, 5][axis]}, "
    with pytest.raises(SparsityLostError, match=message):
        write_pruned(written.dense, written.weights | {name: broken}, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:, :-4], r"the pruned one torch\.float16 \(32, 28\)"),
        (lambda w: w.float(), r"the pruned one torch\.float32 \(32, 32\)"),
    ],
    ids=["shape", "dtype"],
)
def test_a_weight_of_another_shape_or_dtype_is_refused(
    written: Written, tmp_path: Path, change: "type[Tensor]", message: str
) -> None:
    name = NAMES[0]
    changed = written.weights | {name: change(written.weights[name])}
    with pytest.raises(ModelDirError, match=message) as caught:
        write_pruned(written.dense, changed, tmp_path / "out")
    assert f"Tensor {name} of" in str(caught.value)


def test_a_weight_that_has_no_place_is_refused_before_anything_is_written(
    written: Written, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"Weight model\.layers\.7\.mlp\.weight of the built"):
        write_pruned(
            written.dense, {"model.layers.7.mlp.weight": torch.zeros(4, 4)}, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_written_into(written: Written, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_pruned(written.dense, written.weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_a_directory_is_written_is_an_os_error(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_pruned(written.dense, written.weights, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left") as caught:
        BlockStore(tmp_path / "solved").save(0, written.weights, ())
    assert caught.value.errno == errno.ENOSPC


def test_an_index_that_is_left_beside_a_single_file_is_not_taken_along(
    tiny_bert: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_bert, tmp_path / "dense"))
    sound = open_model_dir(path).sha256
    (path / INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}', encoding="utf-8")
    directory = open_model_dir(path)
    assert directory.sha256 == sound
    write_pruned(directory, {}, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    assert open_model_dir(tmp_path / "out").tensors.keys() == directory.tensors.keys()


@pytest.mark.parametrize("fault", ["", "unlisted", "size"])
def test_the_index_names_every_tensor_and_its_bytes(
    tiny_llama: Path, tmp_path: Path, fault: str
) -> None:
    """An index that is right is copied as it is, and any other is made anew."""
    path = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    index = json.loads((path / INDEX).read_bytes())
    sound = json.loads((path / INDEX).read_bytes())
    if fault == "unlisted":
        del index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    elif fault == "size":
        index["metadata"]["total_size"] = 1
    if fault:
        (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    directory = open_model_dir(path)
    write_pruned(directory, {}, tmp_path / "out")
    found = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert found["weight_map"] == sound["weight_map"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = [tensor for file in files for tensor in load_file(file).values()]
    assert len(stored) == len(found["weight_map"])
    assert found["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored)
    if not fault:
        assert (tmp_path / "out" / INDEX).read_bytes() == (path / INDEX).read_bytes()


def test_a_checkpoint_of_a_larger_model_keeps_its_prefix_and_its_head(
    tiny_bert: Path, tmp_path: Path
) -> None:
    path = tmp_path / "masked-lm"
    BertForMaskedLM(BertConfig.from_pretrained(tiny_bert)).save_pretrained(path)
    dense = open_model_dir(path)
    short = "encoder.layer.0.intermediate.dense.weight"
    full = f"bert.{short}"
    assert full in dense.tensors
    model = load_model(dense, BERT, CPU)
    weight = project_24(model.get_parameter(short).detach())
    write_pruned(dense, {short: weight}, tmp_path / "out")
    before = load_file(path / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert [n for n in before if not torch.equal(bits(before[n]), bits(after[n]))] == [full]
    assert json.loads(metadata_of(tmp_path / "out" / "model.safetensors")[SPARSE_KEY]) == {full: 1}
    opened = BertForMaskedLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert torch.equal(opened.get_parameter(full), weight)
    assert torch.equal(load(tmp_path / "out", BERT).get_parameter(short), weight)


def test_a_checkpoint_of_the_bare_trunk_is_written_without_the_prefix(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trunk"
    LlamaModel(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(path)
    dense = open_model_dir(path)
    long, short = "model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"
    assert short in dense.tensors
    weight = project_24(load_model(dense, LLAMA, CPU).get_parameter(long).detach())
    assert stored_dtype(dense, long) == weight.dtype
    write_pruned(dense, {long: weight}, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[short], weight)
    assert torch.equal(load(tmp_path / "out", LLAMA).get_parameter(long), weight)
