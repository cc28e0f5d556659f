"""A config.json that asks for a far larger model than the checkpoint holds takes no time for it."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_cases import CPU, load
from tiny_models import write_tiny_bart, write_tiny_whisper

from prox24_deploy.config.recipe import read_recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.capacity import count_blocks, require_counts
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.recipe_template import skeleton_recipe

EXPORT = Path(__file__).parents[2] / "export"
SECONDS = 20


def edited(source: Path, out: Path, **changes: Any) -> Path:
    """A copy of a model directory with other values in its config.json."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return out


def write_bart(path: Path, _: pytest.FixtureRequest) -> Path:
    return write_tiny_bart(path)


def write_whisper(path: Path, _: pytest.FixtureRequest) -> Path:
    return write_tiny_whisper(path)


def fixture(name: str) -> Callable[[Path, pytest.FixtureRequest], Path]:
    return lambda path, request: request.getfixturevalue(name)


MODELS: dict[str, Callable[[Path, pytest.FixtureRequest], Path]] = {
    "bert": fixture("tiny_bert"),
    "llama": fixture("tiny_llama"),
    "gpt2": fixture("tiny_gpt2"),
    "qwen3": fixture("tiny_qwen3"),
    "bart": write_bart,
    "whisper": write_whisper,
}
COUNTS = [
    ("bert", "num_hidden_layers"),
    ("gpt2", "n_layer"),
    ("qwen3", "num_hidden_layers"),
    ("bart", "encoder_layers"),
    ("whisper", "decoder_layers"),
    ("bert", "num_labels"),
]


@pytest.mark.parametrize(("family", "key"), COUNTS)
@pytest.mark.parametrize("value", [100_000_000, 10**18])
def test_a_count_that_no_checkpoint_has_is_refused_before_anything_is_built(
    family: str, key: str, value: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = MODELS[family](tmp_path / "sound", request)
    path = edited(source, tmp_path / "model", **{key: value})
    began = time.process_time()
    with pytest.raises(ModelDirError, match=rf"asks for {key} {value}, expected at most") as caught:
        open_model_dir(path)
    assert time.process_time() - began < SECONDS
    assert str(path / "config.json") in str(caught.value)


SIZES: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"num_hidden_layers": 900}, "num_hidden_layers is 900, but the checkpoint holds 2 b"),
    ("bert", {"vocab_size": 10**12}, "describes a far larger model; restore"),
    ("bert", {"max_position_embeddings": 10**12}, "describes a far larger model; restore"),
    ("llama", {"hidden_size": 2**20}, "describes a far larger model; restore"),
    ("llama", {"intermediate_size": 10**10}, "describes a far larger model; restore"),
    ("gpt2", {"n_layer": 700}, "n_layer is 700, but the checkpoint holds 2 blocks"),
    ("bart", {"decoder_layers": 900}, "decoder_layers is 900, but the checkpoint holds 2 blocks"),
    ("whisper", {"max_source_positions": 10**12}, "describes a far larger model"),
    # A model of random weights is not even begun with such a dtype; one with weights is.
    ("llama", {"dtype": -1, "vocab_size": 2**31 - 1}, "describes a far larger model; restore"),
]


@pytest.mark.parametrize(("family", "changes", "message"), SIZES)
def test_sizes_of_a_larger_model_are_refused_without_its_memory(
    family: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source = MODELS[family](tmp_path / "sound", request)
    path = edited(source, tmp_path / "model", **changes)
    recipe = read_recipe(EXPORT / f"{family}.toml")
    directory = open_model_dir(path)
    recipe = recipe.for_architecture(directory.architecture)
    began = time.process_time()
    with pytest.raises(ModelDirError, match=message):
        load_model(directory, recipe, CPU)
    assert time.process_time() - began < SECONDS


def test_a_recipe_is_not_drawn_of_a_far_larger_model(tmp_path: Path, tiny_llama: Path) -> None:
    assert skeleton_recipe(open_model_dir(tiny_llama))
    path = edited(tiny_llama, tmp_path / "model", num_hidden_layers=1000)
    assert skeleton_recipe(open_model_dir(path)) == ""


def test_counts_inside_other_tables_and_lists_are_met(tmp_path: Path) -> None:
    names = ["blocks.0.w", "blocks.1.w"]
    for config in (
        {"vision_config": {"num_hidden_layers": 10**6}},
        {"depths": [2, 2, 10**6, 2]},
        {"num_local_experts": 10**6},
        {"layers": 10**6},
    ):
        with pytest.raises(ModelDirError, match=r" 1000000, expected at most 1032 for a checkpoi"):
            require_counts(tmp_path, config, names)
    sound = {
        "num_hidden_layers": 24, "num_experts_per_tok": 8, "vocab_size": 10**7, "torchscript": True,
        "rope_theta": 10**7, "max_position_embeddings": 10**8, "layer_types": ["full"] * 24,
    }  # fmt: skip
    require_counts(tmp_path, sound, names)


def test_blocks_are_counted_in_the_longest_list() -> None:
    assert count_blocks([]) == 0
    assert count_blocks(["embeddings.weight", "pooler.weight"]) == 0
    names = [f"model.layers.{i}.experts.{j}.w" for i in range(3) for j in range(5)]
    assert count_blocks(names) == 5
    assert count_blocks([*names, *(f"encoder.{i}.w" for i in range(7))]) == 7


@pytest.mark.parametrize("family", MODELS)
def test_a_sound_model_is_as_large_as_its_checkpoint(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the room that small models are given.
    for name in ("_SPARE", "_SPARE_WEIGHTS"):
        monkeypatch.setattr(f"prox24_deploy.model.capacity.{name}", 0)
    recipe = read_recipe(EXPORT / f"{family}.toml")
    path = MODELS[family](tmp_path / "sound", request)
    assert load(path, recipe.for_architecture(open_model_dir(path).architecture)) is not None
