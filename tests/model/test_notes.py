"""Heads and experts that are left out of what is made are named where the user looks."""

import json
from pathlib import Path

import pytest
import torch
from command_line import ANY_EMBEDDING, run_cli
from model_cases import BERT, CPU
from tiny_models import VOCABULARY, write_tiny_bert, write_tiny_classifier
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from prox24_deploy.config.recipe import parse_recipe
from prox24_deploy.model.directory import load_with_rest, open_model_dir
from prox24_deploy.model.notes import left_out
from prox24_deploy.model.recipe_template import advise, skeleton_recipe
from prox24_deploy.report.assemble import load_report

SMALL = (
    "--method", "magnitude", "--calibration-tokens", "2048", "--evaluation-tokens", "1024",
)  # fmt: skip


def write(model: PreTrainedModel, path: Path, beside: Path) -> Path:
    """A model directory with the tokenizer of another."""
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(write_tiny_bert(beside)).save_pretrained(path)
    return path


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A BERT with the head that fills in words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return write(BertForMaskedLM(config), tmp_path / "masked", tmp_path / "bert")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=1,
    )  # fmt: skip
    return write(MixtralForCausalLM(config), tmp_path / "mixtral", tmp_path / "bert")


def test_a_head_that_is_not_exported_is_said_on_the_terminal_and_in_the_report(
    masked: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run_cli(
        "build", masked, "-o", out, "--calibration", prose, "--shapes", "batch=1", "sequence=8",
        *SMALL, *ANY_EMBEDDING,
    )  # fmt: skip
    assert done.code == 0, done.err
    told = (
        "The checkpoint is a BertForMaskedLM and was opened for feature-extraction, which has no "
        "place for 5 of its tensors (cls.predictions.bias, "
    )
    assert f"Note: {told}" in done.out
    warnings = load_report(out / "report.json").warnings
    assert [text for text in warnings if text.startswith(told)]


def test_pruning_alone_says_it_too(masked: Path, prose: Path, tmp_path: Path) -> None:
    arguments = ("prune", masked, "-o", tmp_path / "out", "--calibration", prose, *SMALL)
    assert "Note: The checkpoint is a BertForMaskedLM" in run_cli(*arguments).out
    # Also where the stage is not run again.
    (note,) = json.loads(run_cli(*arguments, "--json").out)["notes"]
    assert note.endswith("such as the output of a head, is in no ONNX file.")


def test_a_classifier_opened_without_its_head_is_noted(tmp_path: Path) -> None:
    directory = open_model_dir(write_tiny_classifier(tmp_path / "model"))
    model, unused = load_with_rest(directory, BERT, CPU)
    assert unused == ["classifier.bias", "classifier.weight"]
    (note,) = left_out(directory, model, BERT, unused)
    assert "BertForSequenceClassification and was opened for feature-extraction" in note


def test_a_whole_model_leaves_nothing_out(tiny_bert: Path) -> None:
    directory = open_model_dir(tiny_bert)
    model, unused = load_with_rest(directory, BERT, CPU)
    assert left_out(directory, model, BERT, unused) == ()


def test_a_drawn_recipe_says_that_it_leaves_the_experts_out(mixtral: Path) -> None:
    directory = open_model_dir(mixtral)
    told = (
        "the experts (mlp.experts.gate_up_proj, mlp.experts.down_proj), which hold 85% of the "
        "weights of the blocks, are left out and stay dense"
    )
    assert f"pass it with --recipe; {told}" in advise(directory)
    skeleton = skeleton_recipe(directory)
    assert skeleton.startswith(f"# Note: {told}")
    assert all(target.startswith("self_attn.") for target in parse_recipe(skeleton, "it").targets)


def test_experts_that_stay_dense_are_counted(mixtral: Path, prose: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixtral.toml"
    recipe.write_text(skeleton_recipe(open_model_dir(mixtral)), encoding="utf-8")
    done = run_cli(
        "prune", mixtral, "-o", tmp_path / "out", "--recipe", recipe, "--calibration", prose, *SMALL
    )
    assert done.code == 0, done.err
    weights = 2 * 4 * 3 * 32 * 48
    assert (
        "Note: 4 tensors of several matrices each, as those of fused experts "
        "(model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj, "
        "model.layers.1.mlp.experts.gate_up_proj and 1 more), "
        f"hold {weights:,} weights and are left dense"
    ) in done.out
