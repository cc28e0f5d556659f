"""Open model directories: refuse what is damaged or unsafe, each in one sentence."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prox24_deploy.config.recipe import Recipe, select_recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.directory import companion_files, load_model, model_info, open_model_dir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.model.shards import sound_tensors

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path, tiny_bert: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def recipe_of(path: Path) -> Recipe:
    return select_recipe(path, open_model_dir(path).model_type, None)[0]


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")


def edit_index(path: Path, **changes: str) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index), encoding="utf-8")


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelDirError, match=match) as caught:
        open_model_dir(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_sound_directory_is_described(sharded: Path) -> None:
    directory = open_model_dir(sharded)
    assert directory.model_type == "llama"
    assert len(directory.shards) == 3
    assert "model.layers.1.mlp.down_proj.weight" in directory.tensors
    info = model_info(directory, recipe_of(sharded))
    assert info.source_dtype == "float16"
    weights = [tensor for shard in directory.shards for tensor in load_file(shard).values()]
    assert info.parameters == sum(tensor.numel() for tensor in weights)
    assert (info.family, info.task) == ("llama", "text-generation")


def test_what_is_not_a_model_directory_is_refused(model: Path) -> None:
    refused(model / "nowhere", "does not exist")
    refused(model / "config.json", "is a file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "config.json is not readable JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
    ],
)
def test_a_config_that_tells_no_family_is_refused(model: Path, content: str, match: str) -> None:
    (model / "config.json").write_text(content, encoding="utf-8")
    refused(model, match)


def test_a_directory_without_weights_is_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(model / "other.safetensors")
    refused(model, r"holds other.safetensors but neither model.safetensors nor")
    (model / "other.safetensors").unlink()
    refused(model, "has no model.safetensors")


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_opened(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(mark)))
    load_model(open_model_dir(model), recipe_of(model), CPU)
    (model / "model.safetensors").unlink()
    refused(model, "only pickled weights")
    assert not mark.exists()


def test_code_in_the_directory_is_never_run_nor_copied(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    (model / "modeling.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    edit_config(model, auto_map={"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"})
    load_model(open_model_dir(model), recipe_of(model), CPU)
    load_tokenizer(open_model_dir(model))
    assert not mark.exists()
    assert "modeling.py" not in {file.name for file in companion_files(model)}


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 5000, -1])
def test_truncated_weights_are_refused(model: Path, kept: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(model, r"model.safetensors is damaged .*download it again")


def test_an_index_that_does_not_match_its_shards_is_refused(sharded: Path) -> None:
    first = open_model_dir(sharded).shards[0].name
    name = next(iter(load_file(sharded / first)))
    edit_index(sharded, **{name: "model-00003-of-00003.safetensors"})
    refused(sharded, f"places {name} in model-00003-of-00003.safetensors, which does not hold")
    edit_index(sharded, **{name: first, "ghost.weight": first})
    refused(sharded, "places ghost.weight")
    edit_index(sharded, **{"ghost.weight": "model-00004-of-00003.safetensors"})
    refused(sharded, "names shard model-00004-of-00003.safetensors, which is missing")
    edit_index(sharded, **{"ghost.weight": "../elsewhere.safetensors"})
    refused(sharded, "expected a plain file name")
    (sharded / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused(sharded, "no readable weight_map")


def test_an_index_without_metadata_is_refused(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    del index["metadata"]
    file.write_text(json.dumps(index), encoding="utf-8")
    refused(sharded, 'has no metadata; add "metadata": {} to it')


@pytest.mark.parametrize("place", [0, -1])
def test_a_weight_in_two_shards_is_refused(sharded: Path, place: int) -> None:
    shards = open_model_dir(sharded).shards
    name = next(iter(load_file(shards[1])))
    stale = load_file(shards[place])
    save_file({**stale, name: torch.zeros(2)}, shards[place], metadata={"format": "pt"})
    refused(sharded, f"Weight {name} lies in .* and in .*; remove it from the one that the index")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(model: Path, value: float) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][1, :3] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    refused(model, r"embeddings.word_embeddings.weight .* holds 3 NaN or infinite values of 8320")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_found_in_every_dtype(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    file = tmp_path / "model.safetensors"
    weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
    others = {"empty": torch.zeros(0, 4, dtype=dtype), "flags": torch.ones(3, dtype=torch.bool)}
    save_file({"weight": weight.to(dtype), **others}, file)
    assert sound_tensors(file)["weight"].dtype == dtype
    weight[63, 63] = value
    save_file({"weight": weight.to(dtype), **others}, file)
    with pytest.raises(ModelDirError, match=r"Weight weight in .* holds 1 NaN or infinite values"):
        sound_tensors(file)


def test_missing_and_misshapen_weights_are_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    removed = weights.pop("encoder.layer.0.output.dense.bias")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelDirError, match=r"lacks weight encoder.layer.0.output.dense.bias,"):
        load_model(open_model_dir(model), recipe_of(model), CPU)
    weights["encoder.layer.0.output.dense.bias"] = removed.repeat(2)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelDirError, match=r"dense.bias in shape \(64,\), .* asks for \(32,\)"):
        load_model(open_model_dir(model), recipe_of(model), CPU)


def test_a_pooler_that_a_checkpoint_lacks_is_no_fault(model: Path) -> None:
    names = set(load_file(model / "model.safetensors"))
    assert not any(name.startswith("pooler") for name in names)
    assert load_model(open_model_dir(model), recipe_of(model), CPU).training is False


def test_a_config_that_transformers_refuses_is_one_sentence(model: Path) -> None:
    edit_config(model, num_attention_heads=5)
    with pytest.raises(ModelDirError, match="does not open as feature-extraction") as caught:
        load_model(open_model_dir(model), recipe_of(model), CPU)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelDirError, match="has no tokenizer"):
        load_tokenizer(open_model_dir(model))


def test_a_broken_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": 1', encoding="utf-8")
    with pytest.raises(ModelDirError, match="no tokenizer that opens"):
        load_tokenizer(open_model_dir(model))


def test_the_hash_covers_content_and_not_place(model: Path, tiny_bert: Path) -> None:
    sound = open_model_dir(model).sha256
    assert sound == open_model_dir(tiny_bert).sha256
    (model / ".hidden.json").write_text("{}", encoding="utf-8")
    (model / "notes.log").write_text("irrelevant", encoding="utf-8")
    assert open_model_dir(model).sha256 == sound
    for name in ("tokenizer.json", "config.json"):
        before = (model / name).read_bytes()
        (model / name).write_bytes(before + b" ")
        assert open_model_dir(model).sha256 != sound
        (model / name).write_bytes(before)
    weights = load_file(model / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert open_model_dir(model).sha256 != sound
