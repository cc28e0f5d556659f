"""A model of an unknown family is answered with a recipe that is worth a try."""

import json
import re
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from model_cases import NO_FILES
from tiny_families import FAMILIES, REFUSED, VOCABULARY, tiny_model
from transformers import OlmoConfig, OlmoForCausalLM

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.model.recipe_template import advise, skeleton_recipe

# A skeleton opens what a task's own class opens, and knows no images.
_OWN_CLASS = ("ViT", "DeiT", "Swin", "ResNet", "ConvNext", "CLIP")
# Two graphs are more than it draws.
_TWO_GRAPHS = "ForConditionalGeneration"
TEXT_ROWS = [
    row
    for row, (name, _) in FAMILIES.items()
    if not name.startswith(_OWN_CLASS) and not name.endswith(_TWO_GRAPHS)
]


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that no shipped recipe knows."""
    path = tmp_path_factory.mktemp("models") / "olmo"
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=1,
        eos_token_id=0,
    )
    OlmoForCausalLM(config).save_pretrained(path)
    return path


def test_the_refusal_of_an_unknown_family_holds_a_recipe(olmo: Path, tmp_path: Path) -> None:
    done = run_cli("build", olmo, "-o", tmp_path / "out")
    assert done.code == 2
    assert "No recipe supports model_type 'olmo'" in done.err
    assert "save it, correct it and pass it with --recipe:" in done.err
    assert 'blocks = "model.layers"' in done.err


def test_the_recipe_drawn_from_a_model_exports_it(olmo: Path, tmp_path: Path) -> None:
    directory = open_model_dir(olmo)
    recipe = parse_recipe(skeleton_recipe(directory), "the skeleton")
    assert (recipe.family, recipe.blocks, recipe.cache) == ("olmo", "model.layers", True)
    assert len(recipe.targets) == 7
    model = load_model(directory, recipe, torch.device("cpu"))
    path = export_onnx(model, recipe, tmp_path / "onnx", dtype="float32")
    checks = compare_with_torch(
        model, path, recipe, dtype="float32", twin="dense", vocabulary=VOCABULARY
    )
    assert len(checks) == 5


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"is_encoder_decoder": True}, r"copy bart\.toml with its table \[decoder\], adapt both"),
        (
            {"is_encoder_decoder": True, "num_mel_bins": 80},
            r"^it reads audio, .* copy whisper\.toml, adapt both halves, and pass it with "
            r"--recipe\.$",
        ),
    ],
)
def test_what_cannot_be_drawn_is_answered_by_its_kind(
    config: dict[str, object], remedy: str, tmp_path: Path
) -> None:
    directory = ModelDir(path=tmp_path, config=config, shards=(), tensors={}, snapshot=NO_FILES)
    assert re.search(remedy, advise(directory))


@pytest.mark.parametrize("row", TEXT_ROWS)
def test_the_skeleton_of_a_known_family_finds_what_its_recipe_says(
    row: str, tmp_path: Path
) -> None:
    tiny_model(row).save_pretrained(tmp_path)  # type: ignore[operator]
    directory = open_model_dir(tmp_path)
    found = parse_recipe(skeleton_recipe(directory), "the skeleton")
    (known,) = [
        recipe
        for family, text in shipped_recipes().items()
        if directory.model_type in (recipe := parse_recipe(text, family)).model_types
    ]
    known = known.for_architecture(directory.architecture)
    assert (found.task, found.blocks, found.cache) == (known.task, known.blocks, known.cache)
    for name in found.targets:
        assert any(fnmatch(name, pattern) for pattern in known.targets), name
    # Experts are fused in what it is drawn from.
    apart = known.experts.path if known.experts else "none"
    for pattern in (each for each in known.targets if not each.startswith(apart)):
        assert fnmatch_filter(found.targets, pattern), pattern
    assert found.outputs == known.outputs


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_exported_is_refused_with_the_reason(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    done = run_cli("build", tmp_path / "model", "-o", tmp_path / "out")
    assert done.code == 2
    assert " ".join(done.err.split()).endswith(REFUSED[family][2])


def test_a_model_without_blocks_or_a_class_gives_no_skeleton(olmo: Path, tmp_path: Path) -> None:
    for file in olmo.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert skeleton_recipe(open_model_dir(tmp_path)) == ""
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    assert skeleton_recipe(open_model_dir(tmp_path)) == ""
