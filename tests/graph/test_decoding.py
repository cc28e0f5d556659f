"""Greedy decoding through ONNX Runtime with the cache, against `generate` of transformers."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from graph_models import Array, shipped_recipe
from tiny_families import VOCABULARY, tiny_model
from transformers import AutoTokenizer, GenerationConfig

from prox24_deploy.config.recipe import Recipe, shape_of
from prox24_deploy.graph.export.export import export_graphs, export_onnx
from prox24_deploy.graph.export.signature import signature_of
from prox24_deploy.model.directory import load_model, open_model_dir

NEW_TOKENS = 64


def decode(path: Path, recipe: Recipe, model: torch.nn.Module, ids: Array, mask: Array) -> Array:
    """The next 64 tokens of every row: prefill from an empty past, then token by token."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    signature = signature_of(recipe, model)
    empty = {"batch": len(ids), "sequence": 0, "past": 0}
    cache = {
        spec.name: np.zeros(shape_of(spec, empty), np.float32)
        for spec in signature.inputs
        if spec.dtype == "float"
    }
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    assert len(cache) == 2 * layers
    names = {spec.name for spec in signature.inputs}
    found = []
    for _ in range(NEW_TOKENS):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: value for name, value in known.items() if name in names}
        logits, *present = session.run(None, feeds | cache)
        cache = dict(zip(cache, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        found.append(ids)
    return np.concatenate(found, axis=1)


def generated(model: torch.nn.Module, ids: Array, mask: Array) -> Array:
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1)
    tokens: torch.Tensor = model.generate(  # type: ignore[operator]  # a transformers model
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), generation_config=greedy
    )
    return tokens[:, ids.shape[1] :].numpy()


# Mistral is Llama with a window.
@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.large), "mistral", "gpt2", "opt"]
)
def test_a_padded_batch_is_decoded_as_transformers_does(family: str, tmp_path: Path) -> None:
    # Mistral's window of 6 is left behind soon; GPT-2 and OPT have absolute positions.
    # A tied head would repeat the last token for ever.
    model, recipe = tiny_model(family, tie_word_embeddings=False), shipped_recipe(family)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    path = export_onnx(model, recipe, tmp_path / "onnx", dtype="float32")
    ids = np.random.default_rng(0).integers(3, VOCABULARY, size=(2, 8))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    expected = generated(model, ids, mask)
    assert expected.shape == (2, NEW_TOKENS)
    assert len(np.unique(expected)) > 4
    assert decode(path, recipe, model, ids, mask).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings")
def test_longrope_is_short_up_to_the_length_of_its_training_and_long_beyond(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    lengths = {"original_max_position_embeddings": 12, "max_position_embeddings": 80}
    model, recipe = tiny_model("phi3", rope_scaling=rope, **lengths), shipped_recipe("phi3")
    path = export_onnx(model, recipe, tmp_path / "onnx", dtype="float32")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, VOCABULARY, size=(1, 20))
    empty = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    for length in (12, 13, 20, 12):
        read = ids[:, :length]
        feeds = {"input_ids": read, "attention_mask": np.ones_like(read), **empty}
        with torch.inference_mode():
            expected = model(torch.from_numpy(read), use_cache=False).logits.numpy()
        np.testing.assert_allclose(session.run(["logits"], feeds)[0], expected, atol=1e-4)
    # That the two sets of frequencies differ is what the comparison rests on.
    with torch.inference_mode():
        short = model(torch.from_numpy(ids[:, :12]), use_cache=False).logits[0, -1]
        long = model(torch.from_numpy(ids[:, :13]), use_cache=False).logits[0, -2]
    assert float((short - long).abs().max()) > 1e-2


def translate(paths: tuple[Path, ...], ids: Array, mask: Array, start: int) -> Array:
    """The 64 tokens after the start token, by the graphs of encoder and decoder."""
    encoder, decoder = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths
    )
    (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    source = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    caches = [spec for spec in decoder.get_inputs() if spec.name.startswith("past_key_values.")]
    cache = {
        spec.name: np.zeros((len(ids), spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in caches
    }
    assert len(cache) == 4
    written = np.full((len(ids), 1), start)
    for _ in range(NEW_TOKENS):
        feeds = {"input_ids": written[:, -1:], **source, **cache}
        logits, *present = decoder.run(None, feeds)
        cache = dict(zip(cache, present, strict=True))
        written = np.concatenate([written, logits[:, -1].argmax(-1)[:, None]], axis=1)
    return written[:, 1:]


# The decoder of Whisper, which is BART's, writes with its cache in test_speech_families.py.
@pytest.mark.parametrize(
    "row", ["t5", *(pytest.param(row, marks=pytest.mark.large) for row in ("bart", "t5, gated"))]
)
def test_a_padded_batch_is_translated_as_transformers_does(row: str, tmp_path: Path) -> None:
    made = tiny_model(row)
    made.save_pretrained(tmp_path / "model")  # type: ignore[operator]  # a transformers model
    recipe = shipped_recipe(made.config.model_type)  # type: ignore[union-attr,arg-type]
    recipe = recipe.for_architecture(type(made).__name__)
    model = load_model(open_model_dir(tmp_path / "model"), recipe, torch.device("cpu"))
    # A table of its own: what is tied to the embedding repeats one token for ever.
    head = model.get_submodule("lm_head")
    torch.manual_seed(1)
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape))  # type: ignore[arg-type]
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None  # type: ignore[union-attr]
    paths = export_graphs(model, recipe, tmp_path / "onnx", dtype="float32")
    assert [path.name for path in paths] == ["encoder.onnx", "decoder.onnx"]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, size=(3, 11))
    mask = np.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 1, 0
    start = int(model.config.decoder_start_token_id)  # type: ignore[union-attr,arg-type]
    greedy = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1, decoder_start_token_id=start
    )
    expected: torch.Tensor = model.generate(  # type: ignore[operator]  # a transformers model
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), generation_config=greedy
    )
    assert expected.shape == (3, 1 + NEW_TOKENS)
    assert len(np.unique(expected)) > 4
    assert len(np.unique(expected, axis=0)) == 3
    assert translate(paths, ids, mask, start).tolist() == expected[:, 1:].tolist()


@pytest.mark.data
def test_the_trained_model_writes_the_same_text(data_folder: Path, tmp_path: Path) -> None:
    directory = open_model_dir(data_folder / "models" / "docs-llama-29m")
    recipe = shipped_recipe("llama")
    model = load_model(directory, recipe, torch.device("cpu"))
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    tokenizer = AutoTokenizer.from_pretrained(directory.path)
    text = (data_folder / "data" / "evaluation.txt").read_text(encoding="utf-8")
    prompt = text.removeprefix("<|endoftext|>").strip()[:200]
    ids = np.array(tokenizer([prompt])["input_ids"])
    mask = np.ones_like(ids)
    path = export_onnx(model, recipe, tmp_path / "onnx", dtype="float32")
    written, expected = decode(path, recipe, model, ids, mask), generated(model, ids, mask)
    assert tokenizer.decode(written[0]) == tokenizer.decode(expected[0])
    assert len(set(written[0].tolist())) > 8
