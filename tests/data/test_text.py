"""Calibration text: what is read, how it is split, and that padding never counts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from prox24_deploy.config.recipe import Recipe, read_recipe
from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.data.text import Texts, make_samples, read_texts, thin
from prox24_deploy.model.batch import shared_samples

EXPORT = Path(__file__).parents[2] / "export"
BERT, LLAMA = (read_recipe(EXPORT / f"{family}.toml") for family in ("bert", "llama"))


def samples(model: Path, recipe: Recipe, documents: list[str], tokens: int, length: int):  # type: ignore[no-untyped-def]
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = Texts(kind="file", paths=("memory",), documents=tuple(documents))
    return make_samples(texts, tokenizer, recipe, tokens=tokens, max_length=length)


def test_paragraphs_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n one\ntwo \n\n\n \t\nthree\n\n", encoding="utf-8")
    calibration, held_out = read_texts([path], [path], 0)
    assert calibration.documents == ("one\ntwo", "three")
    assert held_out.kind == "file"


def test_jsonl_takes_records_and_bare_strings(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " a\n\nb "}), "", json.dumps("c"), json.dumps({"text": "  "})]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_texts([path], [path], 0)[0].documents == ("a\n\nb", "c")


@pytest.mark.parametrize(("recipe", "length"), [(BERT, 32), (LLAMA, 64)])
def test_samples_in_both_sets_are_counted_whatever_their_padding(
    tiny_bert: Path, recipe: Recipe, length: int
) -> None:
    words = [f"word {i} " * (4 + i % 5) for i in range(80)]
    whole = samples(tiny_bert, recipe, words, 4096, length)
    assert shared_samples(whole, whole) == whole.source.samples
    other = samples(tiny_bert, recipe, [f"end {word}" for word in words], 4096, length)
    assert shared_samples(whole, other) == 0
    if recipe is BERT:
        # In other batches, so that rows are padded otherwise.
        longer = [*words[::2], *(f"{'x ' * 20}{i}" for i in range(40))]
        assert shared_samples(whole, samples(tiny_bert, recipe, longer, 4096, length)) == 40


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'"x"\n{"text": 3}', 'line 2 has no string "text"'),
        ("a.jsonl", b'"x"\n{', "line 2 is not JSON"),
        ("a.ndjson", b"7", "line 1 has no string"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b" \n\n ", "is empty"),
    ],
)
def test_text_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match) as caught:
        read_texts([path], [], 0)
    assert str(path) in str(caught.value)


def test_a_folder_or_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_texts([path], [], 0)


def test_held_out_text_is_the_last_fifth_and_no_more(prose: Path) -> None:
    calibration, held_out = read_texts([prose], [], 0)
    assert len(calibration.documents) == 64
    assert len(held_out.documents) == 16
    assert held_out.kind == "split"
    assert not set(calibration.documents) & set(held_out.documents)


def test_one_paragraph_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("only one", encoding="utf-8")
    with pytest.raises(
        CalibrationError, match=r"has 1 paragraph or JSON record \(paragraphs end at blank lines\)"
    ):
        read_texts([path], [], 0)


def test_the_builtin_text_comes_in_an_order_of_the_seed() -> None:
    first, second, other = (read_texts([], [], seed)[0] for seed in (0, 0, 1))
    assert first.kind == "builtin"
    assert first.documents == second.documents
    assert first.documents != other.documents
    assert sum(map(len, first.documents)) > 200_000
    assert min(map(len, first.documents)) >= 60


def test_a_causal_model_gets_whole_windows_that_start_documents(tiny_llama: Path) -> None:
    documents = [f"document {i} " * (3 + i) for i in range(20)]
    made = samples(tiny_llama, LLAMA, documents, 1500, 64)
    rows = torch.cat([batch.inputs["input_ids"] for batch in made.batches])
    assert rows.shape == (23, 64)
    stream = rows.flatten().tolist()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = [t for d in documents for t in [0, *tokenizer(d)["input_ids"]]]
    assert stream == expected[: len(stream)]
    assert made.source.tokens == 23 * 64
    assert all(bool(batch.real.all()) for batch in made.batches)


def test_an_encoder_gets_a_document_a_sample(tiny_bert: Path) -> None:
    documents = ["short", "a" * 300, *["medium size text"] * 100]
    made = samples(tiny_bert, BERT, documents, 100_000, 64)
    assert made.source.samples == 102
    real = sum(int(batch.real.sum()) for batch in made.batches)
    assert real == made.source.tokens == 7 + 64 + 100 * 18
    for batch in made.batches:
        assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        assert batch.real.numel() <= 4096
        assert torch.equal(batch.inputs["attention_mask"].bool(), batch.real)
        assert bool((batch.inputs["input_ids"][~batch.real] == 1).all())
        assert bool((batch.inputs["input_ids"][:, 0] == 2).all())


def test_it_stops_at_the_tokens_asked_for(tiny_bert: Path) -> None:
    made = samples(tiny_bert, BERT, ["word " * 20] * 500, 2048, 128)
    assert 2048 <= made.source.tokens < 2048 + 128


def test_too_little_text_is_refused(tiny_bert: Path, tiny_llama: Path) -> None:
    with pytest.raises(CalibrationError, match="gives 42 usable tokens, expected at least 1024"):
        samples(tiny_bert, BERT, ["x" * 40], 2048, 128)
    with pytest.raises(CalibrationError, match="gives 0 usable tokens"):
        samples(tiny_llama, LLAMA, ["x" * 40], 2048, 64)


def test_the_hash_tells_texts_apart(tiny_bert: Path) -> None:
    hashes = {
        samples(tiny_bert, BERT, [text * 300], 2048, 1200).source.sha256
        for text in ("abcd", "abce", "abcd")
    }
    assert len(hashes) == 2


def test_thinning_takes_batches_of_every_length(tiny_bert: Path) -> None:
    documents = ["word " * (1 + i % 20) for i in range(2000)]
    made = samples(tiny_bert, BERT, documents, 100_000, 128)
    part = thin(made, made.source.tokens // 4)
    assert len(part) == pytest.approx(len(made.batches) / 4, abs=1)
    assert part[0].real.shape[1] < 20
    assert part[-1].real.shape[1] > 80
    assert thin(made, made.source.tokens) == made.batches
