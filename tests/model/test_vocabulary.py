"""Tokens without a row in the embedding are refused by name, not met as an index out of range."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_cli
from tiny_models import VOCABULARY, configure, write_tiny_bart
from transformers import AutoTokenizer

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.batch import IGNORED, Batch
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.model.vocabulary import require_embedded, require_special_tokens


@pytest.fixture
def decoder(tmp_path: Path, tiny_qwen3: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))


def extend(path: Path, *words: str, special: bool = False) -> None:
    """Add tokens to the tokenizer and none to the model, as users do."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(words), special_tokens=special)
    if special:
        tokenizer.pad_token = words[0]
    tokenizer.save_pretrained(path)


def refusal(path: Path) -> str:
    directory = open_model_dir(path)
    with pytest.raises(ModelDirError) as caught:
        require_special_tokens(directory, load_tokenizer(directory))
    return str(caught.value)


def test_a_word_without_a_row_is_named_before_any_work(
    decoder: Path, prose: Path, tmp_path: Path
) -> None:
    extend(decoder, "kernel")
    done = run_cli("build", decoder, "-o", tmp_path / "out", "--calibration", prose)
    assert done.code == 2
    expected = f"token 'kernel' the id {VOCABULARY}, which lies outside the embedding of vocab_size"
    assert f"{expected} {VOCABULARY}" in done.err
    assert not (tmp_path / "out").exists()


def test_a_word_that_no_sample_has_is_no_obstacle(
    decoder: Path, prose: Path, tmp_path: Path
) -> None:
    extend(decoder, "quaternion")
    done = run_cli(
        "prune", decoder, "-o", tmp_path / "out", "--calibration", prose, "--method", "magnitude",
        "--calibration-tokens", "2048", "--evaluation-tokens", "1024",
    )  # fmt: skip
    assert done.code == 0, done.err


def test_a_special_token_without_a_row_is_named(decoder: Path) -> None:
    extend(decoder, "<new pad>", special=True)
    assert f"token '<new pad>' the id {VOCABULARY}, which lies outside" in refusal(decoder)


def test_a_special_token_that_no_vocabulary_holds_is_refused(decoder: Path) -> None:
    file = decoder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"pad_token": ""}))
    assert "names a special token that its vocabulary does not hold; correct" in refusal(decoder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pad_token_id": VOCABULARY}, f"names pad_token_id {VOCABULARY}, which"),
        ({"bos_token_id": 999}, "names bos_token_id 999, which"),
        ({"eos_token_id": [0, 777]}, "names eos_token_id 777, which"),
        ({"decoder_start_token_id": 400}, "names decoder_start_token_id 400, which"),
    ],
)
def test_an_id_of_the_configuration_without_a_row_is_named(
    decoder: Path, changes: dict[str, Any], told: str
) -> None:
    configure(decoder, **changes)
    found = refusal(decoder)
    assert told in found
    assert f"vocab_size {VOCABULARY}" in found


def test_a_token_that_is_its_own_substitute_is_refused(decoder: Path) -> None:
    """transformers looks for it without an end."""
    file = decoder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token": ""}))
    directory = open_model_dir(decoder)
    with pytest.raises(ModelDirError, match=r"The special tokens of .* cannot be looked up"):
        require_special_tokens(directory, load_tokenizer(directory))


@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"eos_token_id": None}])
def test_an_id_that_stands_for_none_is_no_obstacle(decoder: Path, changes: dict[str, Any]) -> None:
    configure(decoder, **changes)
    directory = open_model_dir(decoder)
    require_special_tokens(directory, load_tokenizer(directory))


def test_the_size_may_be_that_of_a_text_part_or_unknown(decoder: Path) -> None:
    extend(decoder, "<new pad>", special=True)
    tokenizer = load_tokenizer(open_model_dir(decoder))
    configure(decoder, vocab_size=None, text_config={"vocab_size": 7})
    with pytest.raises(ModelDirError, match="vocab_size 7;"):
        require_special_tokens(open_model_dir(decoder), tokenizer)
    configure(decoder, text_config=None)
    require_special_tokens(open_model_dir(decoder), tokenizer)


@pytest.mark.parametrize("where", ["input_ids", "decoder_input_ids", "targets"])
def test_every_place_of_a_sample_is_looked_at(where: str, tmp_path: Path) -> None:
    directory = open_model_dir(write_tiny_bart(tmp_path / "bart"))
    tokenizer = load_tokenizer(directory)

    def batch(last: int) -> Batch:
        ids = torch.tensor([[0, last]])
        real = torch.ones_like(ids, dtype=torch.bool)
        if where == "targets":
            return Batch({}, real, torch.tensor([[IGNORED, last]]))
        return Batch({where: ids}, real)

    require_embedded(directory, tokenizer, [batch(VOCABULARY - 1)])
    with pytest.raises(ModelDirError, match=f"the id {VOCABULARY}, which lies outside"):
        require_embedded(directory, tokenizer, [batch(VOCABULARY - 1), batch(VOCABULARY)])
