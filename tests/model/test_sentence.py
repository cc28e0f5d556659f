"""What is read of a sentence-transformers directory, and what of it is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import BERT, CPU
from safetensors.torch import load_file, save_file
from sentence_models import write_tiny_embedder
from tiny_models import write_tiny_bert
from tiny_sentences import (
    DROPOUT,
    HIDDEN,
    NORMALIZE,
    Module,
    dense,
    layer_norm,
    pooling,
    write_json,
    write_modules,
)

from prox24_deploy.config.recipe import (
    EMBEDDING,
    Embedding,
    Recipe,
    TensorSpec,
    parse_recipe,
    shipped_recipes,
)
from prox24_deploy.core.errors import ModelDirError, RecipeError
from prox24_deploy.model.directory import companion_files, load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.model.sentence import (
    SentencePipeline,
    fitted_to_sentences,
    read_pipeline,
    settled,
)

MEAN = pooling("mean")
POOLED = TensorSpec(name=EMBEDDING, dtype="float", axes=["batch", "hidden"])


def with_embedding(**options: Any) -> Recipe:
    outputs = [*BERT.outputs, POOLED]
    update = {"outputs": outputs, "embedding": Embedding.model_validate(options)}
    return BERT.model_copy(update=update)


def described(path: Path) -> SentencePipeline:
    found = read_pipeline(path)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the list of modules alone."""
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    write_json(file, json.loads(file.read_bytes()) | changes)


@pytest.mark.parametrize("length", ["40", 0, -1, 1.5, True, [40], {"a": 1}])
def test_a_length_that_is_no_number_of_tokens_is_refused(length: object, folder: Path) -> None:
    write_modules(folder, MEAN, max_seq_length=40)
    edit(folder / "sentence_bert_config.json", max_seq_length=length)
    with pytest.raises(
        ModelDirError, match=r"config\.json has max_seq_length .*, expected a whole"
    ):
        read_pipeline(folder)


@pytest.mark.parametrize("name", [["query"], {}, 7, "other"])
def test_a_default_prompt_that_names_none_is_refused(name: object, folder: Path) -> None:
    write_modules(folder, MEAN)
    library = {"prompts": {"query": "q: "}, "default_prompt_name": name}
    write_json(folder / "config_sentence_transformers.json", library)
    with pytest.raises(ModelDirError, match=r"has the default_prompt_name .*, expected a text; co"):
        read_pipeline(folder)


def test_a_directory_of_another_library_has_no_pipeline(tiny_bert: Path) -> None:
    assert read_pipeline(tiny_bert) is None
    assert settled(tiny_bert, BERT) is None
    assert fitted_to_sentences(BERT, "BertModel", tiny_bert) == BERT


def test_the_modules_are_read_in_their_order(folder: Path) -> None:
    modules = [pooling("max", "mean"), dense(64, 8), layer_norm(8), DROPOUT, NORMALIZE]
    found = described(write_modules(folder, *modules, max_seq_length=40, do_lower_case=True))
    assert found.poolings == ("max", "mean")
    kinds = [(step.kind, step.folder) for step in found.steps]
    assert kinds == [
        ("Dense", "2_Dense"), ("LayerNorm", "3_LayerNorm"), ("Dropout", "4_Dropout"),
        ("Normalize", "5_Normalize"),
    ]  # fmt: skip
    assert (found.max_length, found.lower_case, found.prompt) == (40, True, "")
    assert found.weight_files == ("2_Dense/model.safetensors", "3_LayerNorm/model.safetensors")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["lasttoken", "cls"]}, ("lasttoken", "cls")),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        # Both at once are joined, in an order that does not hang on that of the flags.
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}, ("mean",)),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ("max",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len_tokens",)),
        ({"pooling_mode_weightedmean_tokens": True}, ("weightedmean",)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, ("lasttoken",)),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_both_spellings_of_a_pooling_are_known(
    folder: Path, options: dict[str, Any], expected: tuple[str, ...], *, listed: bool
) -> None:
    write_modules(folder, ("Pooling", options, {}))
    if not listed:
        (folder / "modules.json").unlink()
    found = described(folder)
    assert (found.poolings, found.listed) == (expected, listed)


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ([("Pooling", {"pooling_mode": "median"}, {})], "asks for pooling 'median', expected one"),
        ([("Pooling", {"pooling_mode": 3}, {})], "asks for pooling 3, expected one or more of"),
        ([("Pooling", {"pooling_mode": []}, {})], "asks for pooling [], expected one or more of"),
        (
            [("Pooling", {"pooling_mode": "mean", "include_prompt": False}, {})],
            "has the option include_prompt False, expected True",
        ),
        (
            [("Pooling", {"pooling_mode": "mean", "layers": 3}, {})],
            "has the option layers 3, which is not known here",
        ),
        (
            [NORMALIZE, MEAN],
            "lists Normalize, Pooling behind the Transformer, expected one Pooling",
        ),
        ([MEAN, MEAN], "lists Pooling, Pooling behind the Transformer, expected one Pooling"),
        (
            [MEAN, ("Normalize", {"module_input_name": "token_embeddings"}, {})],
            "has the option module_input_name 'token_embeddings', expected 'sentence_embedding'",
        ),
        ([MEAN, ("Dense", {"in_features": 32}, {})], "has no 2_Dense/model.safetensors; add it"),
        (
            [MEAN, dense(HIDDEN, 8, activation="Softmax")],
            "activation_function 'torch.nn.modules.activation.Softmax', expected one of torch.nn",
        ),
    ],
)
def test_what_has_no_equal_is_refused(folder: Path, modules: list[Module], told: str) -> None:
    with pytest.raises(ModelDirError) as caught:
        read_pipeline(write_modules(folder, *modules))
    assert told in str(caught.value)


@pytest.mark.parametrize("activation", ["my.package.Tanh", "torch.nn.functional.tanh", "Tanh", 3])
def test_an_activation_of_another_make_is_refused(folder: Path, activation: object) -> None:
    """The library falls back to Tanh for some of them, with a warning at most."""
    write_modules(folder, MEAN, dense(HIDDEN, 8))
    edit(folder / "2_Dense" / "config.json", activation_function=activation)
    with pytest.raises(ModelDirError, match="has the activation_function"):
        read_pipeline(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.CNN",
        "sentence_transformers.models.LSTM",
        "sentence_transformers.models.WeightedLayerPooling",
        "sentence_transformers.models.Asym",
        "sentence_transformers.base.modules.router.Router",
        "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
        "sentence_transformers.multi_vector_encoder.modules.token_pooling.TokenPooling",
        "pylate.models.Dense.Dense",
        "custom_st.Transformer",
        "Dense",
    ],
)
def test_a_module_of_another_kind_is_refused_by_name(folder: Path, kind: str) -> None:
    write_modules(folder, MEAN, NORMALIZE)
    listed = json.loads((folder / "modules.json").read_bytes())
    listed[2]["type"] = kind
    write_json(folder / "modules.json", listed)
    ours = kind.startswith("sentence_transformers.")
    name = kind.rpartition(".")[2] if ours else kind
    expected = "Pooling, Dense, " if ours else "those of sentence-transformers alone"
    with pytest.raises(ModelDirError, match=f"lists the module {name}, expected {expected}"):
        read_pipeline(folder)


@pytest.mark.parametrize(
    "first",
    [
        "sentence_transformers.models.StaticEmbedding",
        "sentence_transformers.models.WordEmbeddings",
        "sentence_transformers.models.CLIPModel",
    ],
)
def test_a_directory_without_a_transformer_first_is_refused(folder: Path, first: str) -> None:
    write_modules(folder, MEAN)
    listed = json.loads((folder / "modules.json").read_bytes())
    listed[0]["type"] = first
    write_json(folder / "modules.json", listed)
    name = first.removeprefix("sentence_transformers.models.")
    with pytest.raises(ModelDirError, match=f"has {name} in place 0, expected one Transformer"):
        read_pipeline(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100000, "is not readable JSON"),
        ("{}", "is no list of modules"),
        ("[]", "is no list of modules"),
        ("[3]", "does not name the type of module 0"),
        ('[{"type": 3}]', "does not name the type of module 0"),
    ],
)
def test_a_damaged_list_is_refused(folder: Path, text: str, told: str) -> None:
    (folder / "modules.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelDirError, match=f"modules.json {told}"):
        read_pipeline(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '"cls"'])
@pytest.mark.parametrize(
    "name",
    ["1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"],
)
def test_a_damaged_configuration_is_refused_and_named(folder: Path, name: str, text: str) -> None:
    write_modules(folder, MEAN)
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelDirError, match=name):
        read_pipeline(folder)


@pytest.mark.parametrize("place", ["../elsewhere", "/tmp/x", ""])
def test_a_module_outside_of_the_directory_is_refused(folder: Path, place: str) -> None:
    write_modules(folder, MEAN)
    listed = json.loads((folder / "modules.json").read_bytes())
    listed[1]["path"] = place
    write_json(folder / "modules.json", listed)
    with pytest.raises(ModelDirError, match=f"keeps a Pooling in '{place}', expected a folder"):
        read_pipeline(folder)


def test_an_old_directory_with_its_transformer_in_a_folder_is_told_how_to_be_saved_again(
    folder: Path,
) -> None:
    write_modules(folder, MEAN)
    listed = json.loads((folder / "modules.json").read_bytes())
    listed[0]["path"] = "0_Transformer"
    write_json(folder / "modules.json", listed)
    # config.json lies in that folder too.
    with pytest.raises(ModelDirError, match=r"keeps the Transformer in '0_Transformer', expected"):
        open_model_dir(folder)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"transformer_task": "fill-mask"}, "option transformer_task 'fill-mask'"),
        ({"model_args": {"add_pooling_layer": False}}, "option model_args"),
        ({"tokenizer_args": {"padding_side": "left"}}, "option tokenizer_args"),
        ({"processing_kwargs": {"text": {"max_length": 3}}}, "option processing_kwargs"),
        ({"query_expansion": {"length": 32}}, "option query_expansion"),
        ({"later": True}, "option later True, which is not known here"),
        ({"modality_config": {"image": {}}}, "takes None of the model for text"),
        (
            {"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}},
            "expected its last_hidden_state",
        ),
    ],
)
def test_a_transformer_that_does_more_is_refused(
    folder: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelDirError, match=r"sentence_bert_config\.json") as caught:
        read_pipeline(write_modules(folder, MEAN, **options))
    assert told in str(caught.value)


def test_the_configuration_of_older_versions_counts_too(folder: Path) -> None:
    write_modules(folder, MEAN)
    (folder / "sentence_bert_config.json").unlink()
    write_json(folder / "sentence_roberta_config.json", {"max_seq_length": 12})
    write_json(folder / "sentence_xlnet_config.json", {"max_seq_length": 99})
    assert described(folder).max_length == 12


@pytest.mark.parametrize(
    ("library", "prompt"),
    [
        ({}, ""),
        ({"prompts": {"query": "q: "}}, ""),
        ({"prompts": {"query": "q: "}, "default_prompt_name": None}, ""),
        ({"prompts": {"query": "q: ", "d": ""}, "default_prompt_name": "query"}, "q: "),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "other"}, None),
        ({"default_prompt_name": "query"}, None),
    ],
)
def test_the_default_prompt_is_read(
    folder: Path, library: dict[str, Any], prompt: str | None
) -> None:
    write_modules(folder, MEAN)
    write_json(folder / "config_sentence_transformers.json", library)
    if prompt is not None:
        assert described(folder).prompt == prompt
        return
    with pytest.raises(ModelDirError, match="has the default_prompt_name"):
        read_pipeline(folder)


@pytest.mark.parametrize(
    ("model_type", "modules", "told"),
    [
        ("CrossEncoder", [], None),
        ("CrossEncoder", [MEAN], "is of a CrossEncoder with 1 modules behind its Transformer"),
        ("SparseEncoder", [MEAN], "is of a SparseEncoder with"),
        ("MultiVectorEncoder", [], "is of a MultiVectorEncoder with"),
    ],
)
def test_only_a_cross_encoder_of_a_transformer_alone_is_no_embedder(
    folder: Path, model_type: str, modules: list[Module], told: str | None
) -> None:
    write_modules(folder, *modules, transformer_task="sequence-classification")
    write_json(folder / "config_sentence_transformers.json", {"model_type": model_type})
    if told is None:
        assert read_pipeline(folder) is None
        return
    with pytest.raises(ModelDirError, match=told):
        read_pipeline(folder)


def test_the_recipe_gets_the_output_and_the_length_of_the_directory(folder: Path) -> None:
    write_modules(folder, MEAN, max_seq_length=40)
    fitted = fitted_to_sentences(BERT, "BertForMaskedLM", folder)
    assert [spec.name for spec in fitted.outputs] == ["last_hidden_state", EMBEDDING]
    assert fitted.sequence_length == 40
    # As the library, it takes no notice of the head that a class of this name has.
    classes = fitted_to_sentences(BERT, "BertForSequenceClassification", folder)
    assert (classes.task, classes.blocks) == ("feature-extraction", BERT.blocks)
    assert fitted_to_sentences(fitted, "BertModel", folder) == fitted
    edit(folder / "sentence_bert_config.json", max_seq_length=4000)
    assert fitted_to_sentences(BERT, "BertModel", folder).sequence_length == BERT.sequence_length


def test_a_pooling_without_a_list_changes_no_task(folder: Path) -> None:
    write_modules(folder, MEAN)
    (folder / "modules.json").unlink()
    classes = fitted_to_sentences(BERT, "BertForSequenceClassification", folder)
    assert (classes.task, classes.outputs[0].name) == ("text-classification", "logits")
    embeds = fitted_to_sentences(BERT, "BertModel", folder)
    assert [spec.name for spec in embeds.outputs] == ["last_hidden_state", EMBEDDING]


def test_a_recipe_that_cannot_embed_is_refused(folder: Path) -> None:
    write_modules(folder, MEAN)
    with pytest.raises(RecipeError, match="Recipe gpt2 is for text-generation, but the model embe"):
        fitted_to_sentences(parse_recipe(shipped_recipes()["gpt2"], "gpt2"), "GPT2Model", folder)
    blind = BERT.model_copy(update={"inputs": BERT.inputs[:1]})
    with pytest.raises(RecipeError, match="Recipe bert has no input 'attention_mask'"):
        fitted_to_sentences(blind, "BertModel", folder)


@pytest.mark.parametrize(
    ("modules", "asked", "told"),
    [
        ([MEAN], {"pooling": "mean", "normalize": False}, None),
        ([MEAN, DROPOUT, NORMALIZE], {"pooling": "mean", "normalize": True}, None),
        ([MEAN], {"pooling": "mean", "normalize": True}, "embeds by mean, Normalize, but .* mean;"),
        ([MEAN], {"pooling": "cls", "normalize": False}, "embeds by cls, but .* declares mean;"),
        (
            [MEAN, dense(HIDDEN, 8)],
            {"pooling": "mean", "normalize": False},
            "embeds by mean, but .* declares mean, Dense; correct",
        ),
    ],
)
def test_the_recipe_and_the_directory_must_embed_alike(
    folder: Path, modules: list[Module], asked: dict[str, Any], told: str | None
) -> None:
    write_modules(folder, *modules)
    if told is None:
        assert settled(folder, with_embedding(**asked)) == described(folder)
        return
    with pytest.raises(RecipeError, match=told):
        settled(folder, with_embedding(**asked))


def test_a_recipe_embeds_where_the_directory_does_not_say_how(folder: Path) -> None:
    asked = with_embedding(pooling="max", normalize=True)
    alone = settled(folder, asked)
    write_modules(folder, do_lower_case=True)
    beside = settled(folder, asked)
    for found in (alone, beside):
        assert found is not None
        assert found.poolings == ("max",)
        assert [step.kind for step in found.steps] == ["Normalize"]
        # What is said of the text still holds.
        assert found.lower_case == (found is beside)
    with pytest.raises(RecipeError, match=r"lists no Pooling, so that nothing .* \[embedding\]"):
        settled(folder, BERT)


def test_a_pooling_without_a_list_leaves_the_rest_to_the_recipe(folder: Path) -> None:
    write_modules(folder, pooling("cls"))
    (folder / "modules.json").unlink()
    found = settled(folder, with_embedding(pooling="cls", normalize=True))
    assert found is not None
    assert [step.kind for step in found.steps] == ["Normalize"]
    with pytest.raises(RecipeError, match=r"embeds by mean, but .* declares cls"):
        settled(folder, with_embedding(pooling="mean", normalize=False))


def test_the_weights_of_modules_belong_to_the_model(tmp_path: Path) -> None:
    path = write_tiny_embedder(tmp_path / "model", MEAN, dense(HIDDEN, 8), NORMALIZE)
    (path / "onnx").mkdir()
    shutil.copyfile(path / "model.safetensors", path / "onnx" / "model.safetensors")
    names = {file.relative_to(path).as_posix() for file in companion_files(path)}
    assert "2_Dense/model.safetensors" in names
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"} <= names
    assert "onnx/model.safetensors" not in names
    before = open_model_dir(path)
    file = path / "2_Dense" / "model.safetensors"
    weights = load_file(file)
    weights["linear.bias"][0] += 1
    save_file(weights, file)
    assert open_model_dir(path).sha256 != before.sha256
    weights["linear.bias"][0] = torch.nan
    save_file(weights, file)
    with pytest.raises(ModelDirError, match=r"linear.bias in .*2_Dense.* holds 1 NaN"):
        open_model_dir(path)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (dense(HIDDEN, 8), {"in_features": 64}),
        (dense(HIDDEN, 8), {"out_features": 9}),
        (dense(HIDDEN, 8), {"bias": False}),
        (dense(HIDDEN, 8, bias=False), {"bias": True}),
        (dense(HIDDEN, 8), {"use_residual": True}),
        (dense(64, 8), {}),
        (layer_norm(HIDDEN), {"dimension": 31}),
        (layer_norm(64), {}),
    ],
)
def test_weights_of_another_shape_are_refused(
    tmp_path: Path, module: Module, changes: dict[str, Any]
) -> None:
    path = write_tiny_embedder(tmp_path / "model", MEAN, module)
    edit(path / f"2_{module[0]}" / "config.json", **changes)
    with pytest.raises(ModelDirError, match=f"2_{module[0]}/model.safetensors holds .* expected"):
        load_model(open_model_dir(path), BERT, CPU)


@pytest.mark.parametrize("lower", [True, False])
def test_the_tokenizer_reads_as_the_library_does(tmp_path: Path, *, lower: bool) -> None:
    path = write_modules(write_tiny_bert(tmp_path / "model"), MEAN, do_lower_case=lower)
    tokenizer = load_tokenizer(open_model_dir(path))
    assert tokenizer.model_max_length == 128
    same = tokenizer("HAM")["input_ids"] == tokenizer("ham")["input_ids"]
    assert same == lower
    edit(path / "sentence_bert_config.json", max_seq_length=40)
    assert load_tokenizer(open_model_dir(path)).model_max_length == 40
