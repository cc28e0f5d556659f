"""Recipes: the shipped ones are sound, and a wrong one is explained."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prox24_deploy.config.recipe import (
    Recipe,
    dynamic_names,
    parse_recipe,
    read_recipe,
    select_recipe,
    shape_of,
    shipped_recipes,
)
from prox24_deploy.core.errors import RecipeError

EXPORT = Path(__file__).parents[2] / "export"
HEAD = """
family = "mine"
model_types = ["mine"]
task = "feature-extraction"
blocks = "layers"
targets = ["*"]
"""
INPUTS = """
[[inputs]]
name = "input_ids"
dtype = "int64"
axes = ["batch", "sequence"]
"""
OUTPUTS = """
[[outputs]]
name = "last_hidden_state"
dtype = "float"
axes = ["batch", "sequence", 8]
"""
MINIMAL = HEAD + INPUTS + OUTPUTS


def test_the_installed_recipes_are_those_of_the_repository() -> None:
    on_disk = {path.stem: path.read_text(encoding="utf-8") for path in EXPORT.glob("*.toml")}
    assert shipped_recipes() == on_disk
    assert list(shipped_recipes()) == sorted(on_disk)
    assert {"bert", "llama"} <= set(on_disk)


@pytest.mark.parametrize("path", sorted(EXPORT.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_named_after_its_family(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe == parse_recipe(shipped_recipes()[path.stem], "package")
    assert recipe.family == path.stem
    assert path.stem in recipe.model_types


def test_no_two_shipped_recipes_claim_one_model_type() -> None:
    claimed = [
        name
        for family, text in shipped_recipes().items()
        for name in parse_recipe(text, family).model_types
    ]
    assert len(claimed) == len(set(claimed))


def test_defaults_fill_what_a_recipe_leaves_out() -> None:
    recipe = parse_recipe(MINIMAL, "memory")
    assert (recipe.opset, recipe.sequence_length, recipe.limits.max_slowdown) == (20, 512, 0.02)
    assert (recipe.ignore, recipe.optional_weights) == ([], [])
    assert recipe.outputs[0].axes == ["batch", "sequence", 8]


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = parse_recipe(MINIMAL, "memory")
    with pytest.raises(ValidationError, match="frozen"):
        setattr(recipe, "opset", 99)  # noqa: B010 - mypy knows that it is frozen


BLOCKS = 'blocks = "layers"\n'


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('family = "mine"', 'famly = "mine"', "unknown key 'famly'; the keys of a recipe are fam"),
        (BLOCKS, "", r"required key 'blocks' is missing\."),
        ('name = "input_ids"\n', "", r"required key 'inputs\.0\.name' is missing\."),
        ('dtype = "int64"', 'dtype = "int64"\nkind = 3', r"unknown key 'inputs\.0\.kind'"),
        ('dtype = "int64"', 'dtype = "int32"', r"key 'inputs\.0\.dtype': .*got 'int32'\."),
        ('axes = ["batch", "sequence"]', "axes = [1.5]", r"key 'inputs\.0\.axes\.0.*got 1\.5\."),
        ('targets = ["*"]', "targets = []", r"key 'targets': .* at least 1 item .*got \[\]\."),
        ('targets = ["*"]', 'targets = "*"', r"key 'targets': .* valid list, got '\*'\."),
        ('task = "feature-extraction"', 'task = "chat"', "key 'task': .*'text-generation', .* got"),
        (BLOCKS, BLOCKS + 'opset = "20"\n', "key 'opset': .* valid integer, got '20'"),
        (BLOCKS, BLOCKS + "opset = true\n", "key 'opset': .* valid integer, got True"),
        (BLOCKS, BLOCKS + "opset = 17\n", "key 'opset': .* equal to 18, got 17"),
        (BLOCKS, BLOCKS + "opset = 25\n", "key 'opset': .* equal to 24, got 25"),
        (BLOCKS, BLOCKS + "sequence_length = 7\n", "key 'sequence_length': .* to 8, got 7"),
        (INPUTS, "inputs = []\n", r"key 'inputs': .* at least 1 item .*got \[\]\."),
        (INPUTS + OUTPUTS, "outputs = []\n" + INPUTS, r"key 'outputs': .* 1 item .*got \[\]\."),
        ('name = "last_hidden_state"', 'name = "input_ids"', "names must differ, got .'input_ids"),
        ("family", "fam ily", r"is not valid TOML: .*\(at line 2, column 5\)"),
        (BLOCKS, BLOCKS * 2, "is not valid TOML: Cannot overwrite a value"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_with_its_place(old: str, new: str, match: str) -> None:
    assert old in MINIMAL
    with pytest.raises(RecipeError, match=match) as caught:
        parse_recipe(MINIMAL.replace(old, new, 1), "my.toml")
    assert str(caught.value).startswith("Recipe my.toml")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


HEADED = (
    MINIMAL
    + """
[[heads]]
task = "text-classification"
architectures = ["*ForSequenceClassification"]
blocks = "mine.layers"
outputs = [{ name = "logits", dtype = "float", axes = ["batch", "labels"] }]
"""
)
CACHED = (
    MINIMAL.replace("blocks", "cache = true\nblocks")
    .replace("feature-extraction", "text-generation")
    .replace(
        INPUTS,
        INPUTS + INPUTS.replace("input_ids", "attention_mask").replace('"seq', '"past + seq'),
    )
)
POOLED = MINIMAL.replace("last_hidden_state", "sentence_embedding").replace(
    INPUTS, INPUTS + INPUTS.replace("input_ids", "attention_mask")
)
POOLING = '[embedding]\npooling = "mean"\nnormalize = true\n'


def test_a_head_replaces_task_blocks_and_outputs_for_its_architectures_alone() -> None:
    recipe = parse_recipe(HEADED, "memory")
    head = recipe.for_architecture("MineForSequenceClassification")
    assert (head.task, head.blocks) == ("text-classification", "mine.layers")
    assert [spec.name for spec in head.outputs] == ["logits"]
    assert (head.targets, head.inputs, head.family) == (recipe.targets, recipe.inputs, "mine")
    assert recipe.for_architecture("MineForMaskedLM") == recipe


def test_an_unsupported_architecture_is_refused_with_its_reason() -> None:
    refused = '[[unsupported]]\narchitectures = ["MineFor*"]\nreason = "its head is odd"\n'
    recipe = parse_recipe(MINIMAL + refused, "memory")
    assert recipe.for_architecture("MineModel") == recipe
    message = r"^Recipe mine does not support MineForSums: its head is odd\.$"
    with pytest.raises(RecipeError, match=message):
        recipe.for_architecture("MineForSums")


@pytest.mark.parametrize("path", sorted(EXPORT.glob("*.toml")), ids=lambda path: path.stem)
def test_no_recipe_for_text_opens_a_question_answerer_without_its_head(path: Path) -> None:
    recipe = read_recipe(path)
    if "input_ids" in [spec.name for spec in recipe.inputs]:
        with pytest.raises(RecipeError, match=r"not support T5ForQuestionAnswering: .* be lost\.$"):
            recipe.for_architecture("T5ForQuestionAnswering")


def test_a_cache_and_its_axis_go_together() -> None:
    recipe = parse_recipe(CACHED, "memory")
    assert recipe.cache
    assert dynamic_names(recipe.inputs) == ["batch", "sequence", "past"]
    with pytest.raises(RecipeError, match=r"cache = true needs .* with the axis 'past \+ sequence"):
        parse_recipe(CACHED.replace("past + ", ""), "memory")
    with pytest.raises(RecipeError, match=r"cache = false needs an attention_mask .* 'sequence'"):
        parse_recipe(CACHED.replace("cache = true", "cache = false"), "memory")
    with pytest.raises(RecipeError, match="needs the task 'text-generation', got 'text-encoding'"):
        parse_recipe(CACHED.replace("text-generation", "text-encoding"), "memory")


def test_a_sum_of_axes_has_the_sum_of_their_sizes() -> None:
    spec = parse_recipe(CACHED, "memory").inputs[1]
    assert shape_of(spec, {"batch": 2, "past": 3, "sequence": 4}) == (2, 7)


def test_an_embedding_needs_its_output_and_a_mask() -> None:
    embedding = parse_recipe(POOLED + POOLING, "memory").embedding
    assert embedding is not None
    assert (embedding.pooling, embedding.normalize) == ("mean", True)
    unmasked = MINIMAL.replace("last_hidden_state", "sentence_embedding")
    for text in (POOLED, MINIMAL + POOLING, unmasked + POOLING):
        with pytest.raises(RecipeError, match=r"\[embedding\] goes with the output 'sentence_em"):
            parse_recipe(text, "memory")


@pytest.mark.parametrize(
    ("value", "got"), [("-0.01", "-0.01"), ("10.5", "10.5"), ("nan", "nan"), ('"2 %"', "'2 %'")]
)
def test_a_limit_that_makes_no_sense_is_refused(value: str, got: str) -> None:
    with pytest.raises(RecipeError, match=rf"key 'limits\.max_slowdown': .*, got {got}\."):
        parse_recipe(f"{MINIMAL}\n[limits]\nmax_slowdown = {value}\n", "my.toml")


@pytest.mark.parametrize("value", ["0", "0.0", "10"])
def test_a_limit_at_the_border_is_taken(value: str) -> None:
    recipe = parse_recipe(f"{MINIMAL}\n[limits]\nmax_slowdown = {value}\n", "my.toml")
    assert recipe.limits.max_slowdown == float(value)


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        (OUTPUTS, f"{OUTPUTS}[limits]\nmax_slowdwn = 0.1\n", "max_slowdown"),
        ('name = "input_ids"', 'nam = "input_ids"', "name, dtype, axes"),
        (OUTPUTS, f"{OUTPUTS}[embedding]\npool = 1\n", "keys of embedding are pooling, normalize"),
        (OUTPUTS, f"{OUTPUTS}[[unsupported]]\nx = 1\n", "of unsupported are architectures, reason"),
        (OUTPUTS, f"{OUTPUTS}[[heads]]\nx = 1\n", "keys of heads are task, architectures, blocks"),
    ],
)
def test_an_unknown_key_of_a_table_is_told_with_the_keys_of_that_table(
    old: str, new: str, keys: str
) -> None:
    with pytest.raises(RecipeError, match=keys) as caught:
        parse_recipe(MINIMAL.replace(old, new, 1), "my.toml")
    assert "model_types" not in str(caught.value)


def test_doubled_names_are_told_without_repeating_the_whole_recipe() -> None:
    doubled = MINIMAL.replace("last_hidden_state", "input_ids")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(doubled, "my.toml")
    assert str(caught.value).endswith("names must differ, got ['input_ids', 'input_ids'].")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml cannot be read \(No such file"):
        read_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(RecipeError, match=rf"{tmp_path} cannot be read \(Is a directory\); pass a"):
        read_recipe(tmp_path)
    (tmp_path / "odd.toml").write_bytes(b"\xff")
    with pytest.raises(
        RecipeError, match=r"odd\.toml cannot be read \(not UTF-8, see byte 0\); pass a"
    ):
        read_recipe(tmp_path / "odd.toml")


def test_one_recipe_applies_whole_the_nearest_first(tmp_path: Path) -> None:
    explicit = tmp_path / "explicit.toml"
    other = MINIMAL.replace('"mine"', '"explicit"') + "[limits]\nmax_slowdown = 1\n"
    explicit.write_text(other, encoding="utf-8")
    shipped, text = select_recipe(tmp_path, "llama", None)
    assert (shipped.family, text) == ("llama", shipped_recipes()["llama"])
    # Neither needs to know the model type: whoever passes a recipe vouches for it.
    (tmp_path / "recipe.toml").write_text(MINIMAL, encoding="utf-8")
    recipe, text = select_recipe(tmp_path, "llama", None)
    assert (recipe, text) == (parse_recipe(MINIMAL, ""), MINIMAL)
    assert select_recipe(tmp_path, "llama", explicit) == (parse_recipe(other, ""), other)


def test_a_nearer_recipe_that_is_broken_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("family = ", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.toml is not valid TOML"):
        select_recipe(tmp_path, "bert", None)
    with pytest.raises(RecipeError, match=r"nowhere\.toml cannot be read"):
        select_recipe(tmp_path, "bert", tmp_path / "nowhere.toml")


def test_a_folder_named_like_a_recipe_is_none(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").mkdir()
    assert select_recipe(tmp_path, "bert", None)[0].family == "bert"


def test_advice_on_an_unknown_family_takes_the_place_of_the_general_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\); try this:$") as caught:
        select_recipe(tmp_path, "perceiver", None, lambda: "try this:\n\nfamily = 1")
    assert caught.value.attached == "family = 1"


def test_an_unknown_family_lists_the_known_ones_and_the_remedy(tmp_path: Path) -> None:
    message = (
        rf"No recipe supports model_type 'perceiver' of {tmp_path}; shipped families are "
        r"bart \(bart\), .*, roberta \(roberta, xlm-roberta\), .*t5 \(t5\), vit \(vit, deit\).*; "
        r"copy the nearest one, .* pass it with --recipe\.$"
    )
    with pytest.raises(RecipeError, match=message):
        select_recipe(tmp_path, "perceiver", None)


DECODER = """
[decoder]
blocks = "decoder.layers"
targets = ["*"]
inputs = [
    { name = "input_ids", dtype = "int64", axes = ["batch", "sequence"] },
    { name = "encoder_hidden_states", dtype = "float", axes = ["batch", "source", "hidden"] },
]
outputs = [{ name = "logits", dtype = "float", axes = ["batch", "sequence", "vocabulary"] }]
"""
PAIRED = MINIMAL.replace('"feature-extraction"', '"text-to-text"') + DECODER


def test_an_encoder_decoder_has_two_parts() -> None:
    recipe = parse_recipe(PAIRED, "my.toml")
    encoder, decoder = recipe.parts
    assert (encoder.graph, decoder.graph) == ("encoder", "decoder")
    assert (encoder.blocks, encoder.targets) == (recipe.blocks, recipe.targets)
    assert (encoder.inputs, encoder.outputs) == (recipe.inputs, recipe.outputs)
    assert (decoder.blocks, decoder.cache, decoder.is_decoder) == ("decoder.layers", True, True)
    assert [spec.name for spec in decoder.inputs] == ["input_ids", "encoder_hidden_states"]
    assert decoder.sequence_length == recipe.sequence_length
    assert encoder.parts == (encoder,)
    assert decoder.parts == (decoder,)


@pytest.mark.parametrize("path", sorted(EXPORT.glob("*.toml")), ids=lambda path: path.stem)
def test_what_is_made_of_a_recipe_can_be_sent_to_another_process(path: Path) -> None:
    recipe = read_recipe(path)
    heads = [recipe.for_architecture(head.architectures[0].strip("*")) for head in recipe.heads]
    made = [part for each in (recipe, *heads) for part in (each, *each.parts)]
    assert all(Recipe.model_validate_json(each.model_dump_json()) == each for each in made)


def test_any_other_recipe_is_its_own_part() -> None:
    recipe = parse_recipe(MINIMAL, "my.toml")
    assert recipe.parts == (recipe,)
    assert recipe.graph == "model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + DECODER, "need each other, got task 'feature-extraction' with it"),
        (PAIRED.removesuffix(DECODER), "need each other, got task 'text-to-text' without it"),
        (
            MINIMAL.replace("feature-extraction", "automatic-speech-recognition"),
            "tasks 'text-to-text' and 'automatic-speech-recognition' and the table .* without it",
        ),
        (
            PAIRED.replace("encoder_hidden_states", "states"),
            r"\[decoder\] needs the input 'encoder_hidden_states'",
        ),
        (
            PAIRED.replace('"logits"', '"input_ids"'),
            "input and output names must differ",
        ),
        (
            PAIRED.replace("[decoder]", "[decoder]\ncache = true"),
            r"unknown key 'decoder\.cache'; the keys of decoder are blocks, targets, ignore, ch",
        ),
        (
            PAIRED.replace('name = "logits",', 'name = "logits", shape = 1,'),
            r"unknown key 'decoder\.outputs\.0\.shape'; the keys of outputs are name, dtype, axes",
        ),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "my.toml")


def test_t5_becomes_one_graph_or_two_by_its_class() -> None:
    recipe = parse_recipe(shipped_recipes()["t5"], "t5")
    assert recipe.for_architecture("T5EncoderModel").parts == (recipe,)
    whole = recipe.for_architecture("T5ForConditionalGeneration")
    assert [part.blocks for part in whole.parts] == ["encoder.block", "decoder.block"]
    with pytest.raises(RecipeError, match="Recipe t5 does not support T5Model: only T5EncoderMod"):
        recipe.for_architecture("T5Model")
