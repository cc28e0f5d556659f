"""Text in forms that users really have, and batches at their limits."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from model_cases import BERT, LLAMA

from prox24_deploy.config.recipe import TensorSpec
from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.records import TextSource
from prox24_deploy.data.text import Texts, make_samples, read_texts, thin
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.model.processors import load_tokenizer


@dataclass
class Letters:
    """A tokenizer of one token per letter, to see exactly what is made of its tokens."""

    bos_token_id: int | None = None
    pad_token_id: int | None = None
    adds_start: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(
        self, text: str, *, truncation: bool = False, max_length: int = 0
    ) -> dict[str, list[int]]:
        self.seen.append(text)
        start = [self.bos_token_id] if self.adds_start and self.bos_token_id is not None else []
        ids = start + [ord(letter) for letter in text]
        return {"input_ids": ids[:max_length] if truncation else ids}


def texts_of(*documents: str, path: str = "memory.txt") -> Texts:
    return Texts(kind="file", paths=(path,), documents=documents)


def read(path: Path) -> tuple[str, ...]:
    return read_texts([path], [path], 0)[0].documents


def unpadded(samples: Samples) -> list[list[int]]:
    """The rows of all batches without their padding."""
    return [
        ids[real].tolist()
        for batch in samples.batches
        for ids, real in zip(batch.inputs["input_ids"], batch.real, strict=True)
    ]


def windows(tokenizer: Letters, documents: Sequence[str], tokens: int, length: int) -> list[int]:
    samples = make_samples(texts_of(*documents), tokenizer, LLAMA, tokens=tokens, max_length=length)
    rows = unpadded(samples)
    assert all(len(row) == length for row in rows)
    assert all(bool(batch.real.all()) for batch in samples.batches)
    assert samples.source.samples == len(rows)
    assert samples.source.tokens == len(rows) * length
    return [token for row in rows for token in row]


def test_files_are_read_in_order_each_in_its_own_form(tmp_path: Path) -> None:
    plain, lines, more = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.ndjson"))
    plain.write_bytes(b"first\r\nline\r\n\r\nsecond\r\n")
    lines.write_text('{"text": "third", "id": 3}\n\n"fourth"\n', encoding="utf-8")
    more.write_text('"fifth"', encoding="utf-8")
    calibration, held_out = read_texts([plain, lines], [more, plain], 0)
    assert calibration.documents == ("first\nline", "second", "third", "fourth")
    assert calibration.paths == (str(plain), str(lines))
    assert held_out.documents == ("fifth", "first\nline", "second")
    assert (calibration.kind, held_out.kind) == ("file", "file")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_json_string_may_hold_any_line_separator_of_unicode(
    tmp_path: Path, separator: str
) -> None:
    path = tmp_path / "web.jsonl"
    record = json.dumps({"text": f"one{separator}two"}, ensure_ascii=False)
    path.write_text(f'{record}\n"three"\n', encoding="utf-8")
    assert read(path) == (f"one{separator}two", "three")


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "one\n\ntwo"), ("a.jsonl", '"one"\n"two"')]
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    assert read(path) == ("one", "two")


def test_errors_tell_file_line_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    cases = [
        ('"a"\n\n{"text": \n', f"{path} line 3 is not JSON (Expecting value"),
        (
            '"a"\nnull\n',
            f'{path} line 2 has no string "text"; expected {{"text": "..."}} per line, or a chat',
        ),
        ('{"body": 1}', f'{path} line 1 has no string "body"'),
        ("", f"Text {path} is empty; pass a file with paragraphs of text."),
        ('""\n{"text": " "}\n', f"Text {path} is empty"),
    ]
    for content, message in cases:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(CalibrationError, match=re.escape(message)) as caught:
            read(path)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)


def test_unreadable_paths_tell_why(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.txt"
    with pytest.raises(CalibrationError, match=r"nowhere.txt cannot be read \(No such file"):
        read_texts([missing], [], 0)
    with pytest.raises(CalibrationError, match=r"cannot be read \(Is a directory\)"):
        read_texts([tmp_path], [], 0)
    sound = tmp_path / "sound.txt"
    sound.write_text("a\n\nb", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"nowhere.txt cannot be read"):
        read_texts([sound], [missing], 0)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (5, 1), (10, 2), (12, 2), (13, 3)])
def test_a_fifth_is_held_out_and_at_least_one_document(
    tmp_path: Path, count: int, held: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i}" for i in range(count)), encoding="utf-8")
    calibration, held_out = read_texts([path], [], 0)
    assert len(held_out.documents) == held
    assert (*calibration.documents, *held_out.documents) == read(path)
    assert held_out.paths == (str(path),)


def test_evaluation_text_leaves_all_of_the_calibration_text(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a single paragraph", encoding="utf-8")
    calibration, held_out = read_texts([path], [path], 0)
    assert calibration.documents == held_out.documents == ("a single paragraph",)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def test_builtin_text_that_is_held_out_is_not_calibrated_on() -> None:
    for seed in range(3):
        calibration, held_out = read_texts([], [], seed)
        assert (calibration.kind, held_out.kind) == ("builtin", "split")
        assert calibration.paths == held_out.paths == ("pydoc_data.topics",)
        assert len(held_out.documents) > 100
        assert not set(calibration.documents) & set(held_out.documents)


def test_builtin_text_that_is_held_out_comes_from_other_topics() -> None:
    owners: dict[str, set[str]] = {}
    for name, text in topics.items():
        for part in re.split(r"\n\s*\n", text):
            owners.setdefault(squeezed(part), set()).add(name)
    for seed in range(3):
        sides = [
            {
                next(iter(owners[document]))
                for document in part.documents
                if len(owners[document]) == 1
            }
            for part in read_texts([], [], seed)
        ]
        assert all(len(side) > 5 for side in sides)
        assert not sides[0] & sides[1]


def test_builtin_text_may_be_evaluated_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("only for evaluation", encoding="utf-8")
    calibration, held_out = read_texts([], [path], 0)
    assert calibration.kind == "builtin"
    assert len(calibration.documents) > 1000
    assert held_out.documents == ("only for evaluation",)
    assert (held_out.kind, held_out.paths) == ("file", (str(path),))


def test_builtin_paragraphs_are_single_lines_worth_reading() -> None:
    documents = read_texts([], [], 0)[0].documents
    assert all(squeezed(document) == document for document in documents)
    assert min(len(document) for document in documents) >= 60


def test_windows_hold_a_start_token_before_each_document() -> None:
    documents = [chr(ord("a") + i) * (100 + i) for i in range(20)]
    stream = [token for d in documents for token in [7, *map(ord, d)]]
    assert windows(Letters(bos_token_id=7), documents, 2000, 64) == stream[: 2000 // 64 * 64]


def test_a_start_token_of_the_tokenizer_is_not_doubled() -> None:
    documents = ["a" * 1500, "b" * 1500]
    plain = windows(Letters(bos_token_id=7), documents, 2048, 128)
    assert plain.count(7) == 2
    assert windows(Letters(bos_token_id=7, adds_start=True), documents, 2048, 128) == plain


def test_windows_without_a_start_token_hold_only_text() -> None:
    made = windows(Letters(), ["a" * 600, "b" * 600], 1100, 100)
    assert made == [ord("a")] * 600 + [ord("b")] * 500


def test_what_does_not_fill_a_window_is_left_out() -> None:
    assert len(windows(Letters(), ["a" * 5000], 1199, 100)) == 1100
    assert len(windows(Letters(), ["a" * 1199], 5000, 100)) == 1100


def test_one_window_longer_than_the_tokens_asked_for_is_still_filled() -> None:
    made = windows(Letters(), ["a" * 400] * 20, 1024, 2048)
    assert len(made) == 2048


def test_documents_beyond_the_tokens_asked_for_are_not_tokenised() -> None:
    documents = [f"{i:04d}" * 100 for i in range(50)]
    for recipe in (LLAMA, BERT):
        tokenizer = Letters()
        make_samples(texts_of(*documents), tokenizer, recipe, tokens=1200, max_length=400)
        assert tokenizer.seen == documents[:3]


def test_1024_tokens_are_enough_and_1023_are_not() -> None:
    def count(length: int) -> int:
        made = make_samples(texts_of("a" * length), Letters(), BERT, tokens=2048, max_length=2048)
        return made.source.tokens

    assert count(1024) == 1024
    with pytest.raises(CalibrationError, match=r"Text memory\.txt gives 1023 usable tokens, exp"):
        count(1023)


def test_encoder_documents_are_truncated_padded_and_counted() -> None:
    documents = [chr(97 + i % 26) * (10 + 7 * i) for i in range(60)]
    samples = make_samples(
        texts_of(*documents), Letters(pad_token_id=5), BERT, tokens=100_000, max_length=200
    )
    wanted = [[ord(letter) for letter in document[:200]] for document in documents]
    assert sorted(unpadded(samples)) == sorted(wanted)
    assert samples.source.tokens == sum(map(len, wanted))
    assert samples.source.tokens == sum(int(batch.real.sum()) for batch in samples.batches)
    assert samples.source.samples == 60
    for batch in samples.batches:
        assert torch.equal(batch.inputs["attention_mask"], batch.real.long())
        assert bool((batch.inputs["input_ids"][~batch.real] == 5).all())
        assert not batch.inputs["token_type_ids"].any()
        assert all(tensor.dtype == torch.int64 for tensor in batch.inputs.values())


def test_batches_are_as_large_as_the_bound_allows_and_no_larger() -> None:
    documents = [chr(97 + i % 26) * (1 + (37 * i) % 300) for i in range(300)]
    batches = make_samples(
        texts_of(*documents), Letters(), BERT, tokens=10**6, max_length=512
    ).batches
    widths = [batch.real.shape[1] for batch in batches]
    assert widths == sorted(widths)
    for batch, following in zip(batches, (*batches[1:], None), strict=True):
        assert batch.real.numel() <= 2048
        # One row more would have been one too many.
        shortest = int(following.real.sum(1).min()) if following else 10**6
        assert (len(batch.real) + 1) * shortest > 2048


def test_a_row_longer_than_the_bound_is_a_batch_of_its_own() -> None:
    samples = make_samples(
        texts_of("a" * 5000, "b" * 6000, "c" * 10), Letters(), BERT, tokens=10**6, max_length=8192
    )
    assert [tuple(batch.real.shape) for batch in samples.batches] == [(1, 10), (1, 5000), (1, 6000)]


def test_rows_that_are_all_longer_than_the_bound_are_taken_too() -> None:
    samples = make_samples(texts_of("a" * 5000), Letters(), BERT, tokens=10**6, max_length=8192)
    assert [tuple(batch.real.shape) for batch in samples.batches] == [(1, 5000)]


def test_only_inputs_of_the_recipe_are_made() -> None:
    text = texts_of("a" * 1200)
    decoder = make_samples(text, Letters(), LLAMA, tokens=1024, max_length=512)
    assert list(decoder.batches[0].inputs) == ["input_ids", "attention_mask"]
    other = TensorSpec(name="pixel_values", dtype="float", axes=["batch", 3])
    recipe = LLAMA.model_copy(update={"inputs": [LLAMA.inputs[0], other]})
    made = make_samples(text, Letters(), recipe, tokens=1024, max_length=512)
    assert list(made.batches[0].inputs) == ["input_ids"]


def test_a_tokenizer_without_padding_pads_with_zero_where_nothing_is_real() -> None:
    samples = make_samples(
        texts_of("a" * 600, "b" * 500), Letters(), BERT, tokens=2048, max_length=1024
    )
    (batch,) = samples.batches
    assert batch.inputs["input_ids"][0, 500:].tolist() == [0] * 100
    assert not batch.real[0, 500:].any()


def test_the_hash_is_that_of_the_tokens_wherever_they_come_from() -> None:
    def sha256(*documents: str, path: str = "a.txt", length: int = 600) -> str:
        made = make_samples(
            texts_of(*documents, path=path), Letters(), BERT, tokens=4096, max_length=length
        )
        return made.source.sha256

    known = sha256("a" * 600, "b" * 600)
    assert known == sha256("a" * 600, "b" * 600, path="b.txt")
    others = {
        sha256("a" * 600, "c" * 600),
        sha256("b" * 600, "a" * 600),
        sha256("a" * 600, "b" * 600, length=599),
        sha256("a" * 600, "b" * 600, "b"),
    }
    assert len(others) == 4
    assert known not in others


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (100, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (4, [0, 2, 4, 6, 8]),
        (3, [0, 3, 6]),
        (1, [0]),
        (0, [0]),
    ],
)
def test_thinning_takes_evenly_spaced_batches(tokens: int, kept: list[int]) -> None:
    def batch(number: int) -> Batch:
        return Batch({"input_ids": torch.tensor([[number]])}, torch.ones(1, 1, dtype=torch.bool))

    source = TextSource(kind="file", paths=("memory.txt",), sha256="", samples=9, tokens=9)
    whole = Samples(batches=tuple(batch(i) for i in range(9)), source=source)
    assert [int(part.inputs["input_ids"]) for part in thin(whole, tokens)] == kept


def test_a_real_tokenizer_truncates_with_its_closing_token(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(open_model_dir(tiny_bert))
    samples = make_samples(
        texts_of(*["word " * 30] * 40), tokenizer, BERT, tokens=4096, max_length=32
    )
    for row in unpadded(samples):
        assert len(row) == 32
        assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
