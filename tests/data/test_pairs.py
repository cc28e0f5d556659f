"""Texts and targets become batches that force the decoder along the target."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CPU
from tiny_models import write_tiny_bart

from prox24_deploy.config.recipe import Recipe, read_recipe
from prox24_deploy.core.errors import CalibrationError, ModelDirError
from prox24_deploy.data.pairs import make_pairs, start_token
from prox24_deploy.data.text import Texts, read_texts
from prox24_deploy.evaluation.language import evaluate_text_generation, next_logits, window_nll
from prox24_deploy.model.batch import IGNORED
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer

BART = read_recipe(Path(__file__).parents[2] / "export" / "bart.toml")
START = 3


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bart(tmp_path_factory.mktemp("bart") / "model")


def pairs(bart: Path, documents: list[str], targets: tuple[object, ...] = ()) -> Any:
    tokenizer = load_tokenizer(open_model_dir(bart))
    texts = Texts(kind="file", paths=("memory",), documents=tuple(documents), targets=targets)
    return make_pairs(texts, tokenizer, BART, tokens=10**6, max_length=64, start=START)


LONG = [f"{'word ' * (3 + i % 9)}number {i}." for i in range(40)]


def test_the_decoder_is_fed_its_target_shifted_behind_the_start_token(bart: Path) -> None:
    samples = pairs(bart, LONG, tuple(text.upper() for text in LONG))
    assert samples.source.targets == samples.source.samples == 40
    tokens = 0
    for batch in samples.batches:
        fed, targets = batch.inputs["decoder_input_ids"], batch.targets
        known = targets != IGNORED
        assert fed.shape == targets.shape
        assert bool((fed[:, 0] == START).all())
        assert fed[:, 1:][known[:, 1:]].equal(targets[:, :-1][known[:, 1:]])
        assert len(batch.real) * max(batch.real.shape[1], fed.shape[1]) <= 2048
        assert batch.inputs["attention_mask"].equal(batch.real.long())
        tokens += int(batch.real.sum()) + int(known.sum())
    assert tokens == samples.source.tokens


def test_text_without_a_target_is_its_own(bart: Path) -> None:
    plain = pairs(bart, LONG)
    repeated = pairs(bart, LONG, tuple(LONG))
    some = pairs(bart, LONG, ("SHORT", *[None] * 39))
    assert (plain.source.targets, repeated.source.targets, some.source.targets) == (0, 40, 1)
    for batch, same in zip(plain.batches, repeated.batches, strict=True):
        assert batch.targets.equal(same.targets)
        assert all(value.equal(same.inputs[name]) for name, value in batch.inputs.items())
    assert plain.source.sha256 == repeated.source.sha256 != some.source.sha256


def test_the_loss_is_that_of_transformers(bart: Path) -> None:
    model = load_model(open_model_dir(bart), BART, CPU)
    batch = pairs(bart, LONG, tuple(text[::-1] for text in LONG)).batches[0]
    inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = window_nll(next_logits(model, batch), batch)
        for row in range(len(batch.real)):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            theirs = model(**one, labels=batch.targets[row : row + 1]).loss
            assert float(found[row]) == pytest.approx(float(theirs), rel=1e-5)


def test_a_model_agrees_with_itself(bart: Path) -> None:
    model = load_model(open_model_dir(bart), BART, CPU)
    batches = pairs(bart, LONG).batches
    metrics = evaluate_text_generation(model, model, batches, lambda *_: None)
    assert [metric.name for metric in metrics] == [
        "perplexity", "log-perplexity", "top-1 agreement", "KL divergence",
    ]  # fmt: skip
    assert metrics[1].difference is not None
    assert metrics[1].difference.value == 0
    assert metrics[2].agreement is not None
    assert metrics[2].agreement.value == 1
    assert metrics[0].samples == 40


def test_targets_of_a_file_stay_with_their_texts(tmp_path: Path) -> None:
    records = [{"text": f"text {i}", "target": f"target {i}"} for i in range(10)]
    del records[3]["target"]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    texts, held_out = read_texts([file], [], 0)
    assert (len(texts.documents), len(held_out.documents)) == (8, 2)
    for part in (texts, held_out):
        expected = [
            None if name == "text 3" else name.replace("text", "target") for name in part.documents
        ]
        assert list(part.all_targets) == expected


@pytest.mark.parametrize("target", [7, "", " ", ["a"]])
def test_a_target_that_is_no_text_is_refused(target: object, bart: Path) -> None:
    with pytest.raises(CalibrationError, match=r"memory: the target of sample 2 is .*, expected t"):
        pairs(bart, LONG, (None, target, *[None] * 38))


def test_too_little_text_is_refused(bart: Path) -> None:
    with pytest.raises(CalibrationError, match="gives 22 usable tokens, expected at least 1024"):
        pairs(bart, ["too short"])


def test_the_start_token_is_found_or_missed_by_name(bart: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_bart(folder)
    directory = open_model_dir(folder)
    assert start_token(directory) == START
    del directory.config["decoder_start_token_id"]
    assert start_token(directory) == START
    generation = folder / "generation_config.json"
    generation.write_text("{}", encoding="utf-8")
    with pytest.raises(ModelDirError, match=r"names no decoder_start_token_id \(None\), from"):
        start_token(directory)
    for number in (-1, -(10**300), 2**31):
        generation.write_text(json.dumps({"decoder_start_token_id": number}), encoding="utf-8")
        with pytest.raises(ModelDirError, match=rf"decoder_start_token_id \({number}\), from"):
            start_token(directory)
    generation.write_text("{", encoding="utf-8")
    with pytest.raises(ModelDirError, match=r"generation_config.json is not readable JSON"):
        start_token(directory)


def test_the_recipe_of_a_half_has_what_that_half_reads() -> None:
    encoder, decoder = BART.parts
    assert [part.graph for part in (encoder, decoder)] == ["encoder", "decoder"]
    assert isinstance(encoder, Recipe)
    assert (encoder.cache, decoder.cache) == (False, True)
