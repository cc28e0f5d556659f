"""Recipes: the shipped ones are sound, and a wrong one is explained."""

from pathlib import Path

import pytest

from prox24_deploy.errors import RecipeError
from prox24_deploy.recipe import parse_recipe, read_recipe, select_recipe, shipped_recipes

EXPORT = Path(__file__).parents[1] / "export"
MINIMAL = """
family = "mine"
model_types = ["mine"]
task = "feature-extraction"
blocks = "layers"
targets = ["*"]

[[inputs]]
name = "input_ids"
dtype = "int64"
axes = ["batch", "sequence"]

[[outputs]]
name = "last_hidden_state"
dtype = "float"
axes = ["batch", "sequence", 8]
"""


def test_the_installed_recipes_are_those_of_the_repository() -> None:
    on_disk = {path.stem: path.read_text(encoding="utf-8") for path in EXPORT.glob("*.toml")}
    assert shipped_recipes() == on_disk
    assert {"bert", "llama"} <= set(on_disk)


@pytest.mark.parametrize("path", sorted(EXPORT.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_named_after_its_family(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.family == path.stem
    assert path.stem in recipe.model_types


def test_defaults_fill_what_a_recipe_leaves_out() -> None:
    recipe = parse_recipe(MINIMAL, "memory")
    assert (recipe.opset, recipe.sequence_length, recipe.limits.max_slowdown) == (20, 512, 0.02)
    assert recipe.outputs[0].axes == ["batch", "sequence", 8]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('family = "mine"', 'famly = "mine"', "unknown key 'famly'; the keys of a recipe are"),
        ('blocks = "layers"\n', "", "required key 'blocks' is missing"),
        ('dtype = "int64"', 'dtype = "int64"\nkind = 3', r"unknown key 'inputs.0.kind'"),
        ('dtype = "int64"', 'dtype = "int32"', r"key 'inputs.0.dtype': .*got 'int32'"),
        ('targets = ["*"]', "targets = []", "key 'targets'"),
        ('targets = ["*"]', 'targets = "*"', "key 'targets'"),
        ('task = "feature-extraction"', 'task = "chat"', "key 'task'"),
        ('blocks = "layers"', 'blocks = "layers"\nopset = "20"', "key 'opset'"),
        ('blocks = "layers"', 'blocks = "layers"\nopset = 99', "key 'opset'"),
        ('name = "last_hidden_state"', 'name = "input_ids"', "names must differ"),
        ("family", "fam ily", "is not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_with_its_place(old: str, new: str, match: str) -> None:
    assert old in MINIMAL
    with pytest.raises(RecipeError, match=match) as caught:
        parse_recipe(MINIMAL.replace(old, new, 1), "my.toml")
    assert str(caught.value).startswith("Recipe my.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere.toml cannot be read \(No such file"):
        read_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match=r"odd.toml cannot be read \(not UTF-8"):
        read_recipe(tmp_path / "odd.toml")


def test_one_recipe_applies_whole_the_nearest_first(tmp_path: Path) -> None:
    explicit = tmp_path / "explicit.toml"
    explicit.write_text(MINIMAL.replace('"mine"', '"explicit"'), encoding="utf-8")
    assert select_recipe(tmp_path, "bert", None)[0].family == "bert"
    (tmp_path / "recipe.toml").write_text(MINIMAL, encoding="utf-8")
    recipe, text = select_recipe(tmp_path, "bert", None)
    assert (recipe.family, text) == ("mine", MINIMAL)
    assert select_recipe(tmp_path, "bert", explicit)[0].family == "explicit"


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'perceiver' .* bert \(bert\), llama \(llama\)"):
        select_recipe(tmp_path, "perceiver", None)
