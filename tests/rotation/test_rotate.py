"""A rotated model computes what it did, whatever reads its residual stream, and 2:4 drops less."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_cli
from family_batches import batch, recipe_of
from safetensors.torch import load_file
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.core.types import silent
from prox24_deploy.model.blocks import run_model
from prox24_deploy.rotation import rotate as rotation
from prox24_deploy.rotation.learning import learned, score_of, sides_of
from prox24_deploy.rotation.stream import find_stream, fold_norms, rotate_stream

DECLARED = [name for name, text in shipped_recipes().items() if "[stream]" in text]


def orthonormal(size: int) -> Tensor:
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn: Tensor = torch.linalg.qr(draw)[0]
    return turn


def drawn(row: str, **options: bool) -> nn.Module:
    """A tiny model whose norms and biases are as after training, not all one and zero."""
    model = tiny_model(row, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in (each for each in model.parameters() if each.ndim == 1):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.3 * noise
    return model


_BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("row", "options"),
    [*((row, {}) for row in FAMILIES if row in DECLARED), ("llama", _BIASED)],
)
@torch.no_grad()
def test_every_declared_stream_is_free(row: str, options: dict[str, bool]) -> None:
    model = drawn(row, **options)
    recipe = recipe_of(model)
    before: Tensor = run_model(model, batch(recipe), recipe.task).logits
    stream = find_stream(model, recipe)
    gained = fold_norms(stream)
    assert bool(gained) == bool(getattr(model.config, "tie_word_embeddings", False))
    was = stream.tables[0].weight.clone()
    rotate_stream(stream, orthonormal(stream.width))
    after: Tensor = run_model(model, batch(recipe), recipe.task).logits
    assert float((after - before).abs().max()) <= 1e-4 * float(before.abs().max())
    assert float((stream.tables[0].weight - was).abs().max()) > 0.01


def test_the_declared_families_are_those_of_the_tests() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3"} <= set(DECLARED) <= set(FAMILIES)


@pytest.mark.parametrize("row", ["llama, sentences", "gpt2"])
def test_a_model_whose_stream_is_not_declared_is_refused(row: str) -> None:
    model = tiny_model(row)
    with pytest.raises(RecipeError, match="does not declare a residual stream"):
        find_stream(model, recipe_of(model))


def test_the_search_drops_less_and_stays_orthonormal() -> None:
    model = drawn("llama", **_BIASED)
    recipe = recipe_of(model)
    stream = find_stream(model, recipe)
    fold_norms(stream)
    sides = sides_of(model, stream, (batch(recipe),), recipe.task)
    blocks = len(model.get_submodule(recipe.blocks)._modules)
    assert [len(side.weights) for side in sides] == [3, 2] * blocks + [1, 1] * blocks
    turn = learned(sides, stream.width, 40, silent)
    eye = torch.eye(stream.width, dtype=torch.float64)
    assert float((turn.T @ turn - eye).abs().max()) < 1e-12
    before, after = (score_of(sides, each.float()) for each in (eye, turn))
    assert after < 0.95 * before


def rotate(model: Path, out: Path, prose: Path, *more: str | Path) -> Any:
    return run_cli(
        "rotate", model, "-o", out, "--calibration", prose, "--device", "cpu", "--steps", "20",
        *more,
    )  # fmt: skip


@torch.no_grad()
def logits(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(4, 68)[None] % model.config.vocab_size
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def test_a_rotated_directory_computes_the_same_and_is_pruned_like_any_other(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "turned"
    run = rotate(tiny_llama, out, prose, "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found == json.loads((out / "prox24_rotation.json").read_text())
    assert found["dropped_after"] < found["dropped_before"]
    assert found["difference"] < 1e-4
    before, after = logits(tiny_llama), logits(out)
    # In float16.
    assert float((after - before).abs().max()) < 0.02 * float(before.abs().max())
    assert found["gained"] > 0
    config = json.loads((out / "config.json").read_text())
    given = json.loads((tiny_llama / "config.json").read_text())
    assert config == given | {"tie_word_embeddings": False}
    assert {t.dtype for f in out.glob("*.safetensors") for t in load_file(f).values()} == {
        torch.float16
    }
    assert all(f.stat().st_mode & stat.S_IROTH for f in out.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["turned"]
    pruned = run_cli(
        "prune", out, "-o", tmp_path / "bundle", "--calibration", prose, "--device", "cpu",
        "--method", "wanda", "--refinement", "none", "--permute", "none",
    )  # fmt: skip
    assert pruned.code == 0, pruned.err
    assert "Note: The dense model is a rotated one" in pruned.out
    (out / "prox24_rotation.json").write_text('{"channels": 32}')
    spoiled = run_cli("prune", out, "-o", tmp_path / "other", "--calibration", prose)
    assert spoiled.code == 2
    assert "prox24_rotation.json is no record of a rotation" in spoiled.err


def test_what_cannot_be_rotated_is_refused_and_nothing_is_written(
    tiny_llama: Path, tiny_gpt2: Path, prose: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    partly = tmp_path / "partly.toml"
    text = shipped_recipes()["llama"].replace('"self_attn.[qkv]_proj"', '"self_attn.[qk]_proj"')
    assert parse_recipe(text, "llama").stream is not None
    partly.write_text(text)
    for model, out, more, said in (
        (tiny_llama, there, (), "exists already"),
        (tiny_gpt2, tmp_path / "a", (), "does not declare a residual stream"),
        (tiny_llama, tiny_llama / "b", (), "lies in the model directory"),
        (tiny_llama, tmp_path / "c", ("--recipe", partly), "does not name"),
    ):
        run = rotate(model, out, prose, *more)
        assert run.code == 2, run.err
        assert said in run.err
        assert "rotate 0/" not in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partly.toml", "there"]


def test_too_little_memory_is_told_before_work(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [load_file(file) for file in tiny_llama.glob("*.safetensors")]
    whole = 4 * sum(tensor.numel() for file in files for tensor in file.values())
    for free, code in ((whole, 2), (100 * whole, 0)):
        monkeypatch.setattr(f"{rotation.__name__}.free_on", lambda *_, free=free: free)
        run = rotate(tiny_llama, tmp_path / "out", prose)
        assert run.code == code, run.err
        assert ("takes the whole model in memory" in run.err) == bool(code)


@pytest.mark.parametrize("fault", ["interrupted", "read back"])
def test_what_goes_wrong_at_the_end_leaves_nothing(
    fault: str, tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if fault == "interrupted":
        monkeypatch.setattr(rotation, "write_pruned", interrupted)
    else:
        # Float16 rounds more than that.
        monkeypatch.setattr(rotation, "_STORED", 1e-7)
    run = rotate(tiny_llama, tmp_path / "out", prose)
    assert run.code == {"interrupted": 130, "read back": 2}[fault]
    assert fault == "interrupted" or "read back from disk" in run.err
    assert not list(tmp_path.iterdir())


def test_shards_precision_and_other_tensors_stay(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    shutil.copytree(tiny_llama, given)
    config = json.loads((given / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(given, dtype=torch.bfloat16)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    for parameter in (each for each in model.parameters() if each.ndim == 1):
        parameter.data = parameter.data.float()
    model.save_pretrained(given, max_shard_size="20KB")
    assert config["tie_word_embeddings"]
    assert rotate(given, tmp_path / "out", prose).code == 0
    assert json.loads((tmp_path / "out" / "prox24_rotation.json").read_text())["gained"] == 0
    before, after = (
        {f.name: load_file(f) for f in sorted(path.glob("*.safetensors"))}
        for path in (given, tmp_path / "out")
    )
    assert len(before) > 2
    assert [*before] == [*after]
    for name, tensors in before.items():
        kinds = {each: tensor.dtype for each, tensor in tensors.items()}
        assert {each: tensor.dtype for each, tensor in after[name].items()} == kinds
    difference = (logits(given) - logits(tmp_path / "out")).abs().max()
    assert float(difference) < 0.1 * float(logits(given).abs().max())


def test_a_table_must_be_an_embedding(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    partly = tmp_path / "partly.toml"
    text = shipped_recipes()["llama"]
    partly.write_text(text.replace('tables = ["model.embed_tokens"]', 'tables = ["model"]'))
    run = rotate(tiny_llama, tmp_path / "out", prose, "--recipe", partly)
    assert run.code == 2
    assert "expected an embedding" in run.err
