"""Errors in words and characters against their definition, and error rates against sums."""

import itertools
import math
from types import SimpleNamespace

import pytest

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.records import Metric
from prox24_deploy.evaluation.speech import error_rates
from prox24_deploy.evaluation.words import Speller, spellers_of

LISTS = [words for length in range(4) for words in itertools.product("abc", repeat=length)]
PLAIN, JAPANESE = Speller(language="de"), Speller(language="ja")


def distance(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The least over all three ways to begin, tried without any table."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    ways = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(distance(*way) for way in ways)


def test_errors_are_the_fewest_changes_that_make_one_text_the_other() -> None:
    for one, other in itertools.product(LISTS[::2], LISTS):
        expected = (distance(one, other), len(one))
        assert PLAIN.errors(" ".join(one), " ".join(other)) == expected
        assert JAPANESE.errors("".join(one), "".join(other)) == expected


def test_long_texts_differ_by_what_was_done_to_them() -> None:
    said = [f"w{i}" for i in range(200)]
    written = [*said[:50], "x", "y", *said[51:120], *said[122:]]
    assert PLAIN.errors(" ".join(said), " ".join(written)) == (4, 200)


def test_case_and_punctuation_are_no_words() -> None:
    assert PLAIN.words("Er RIEF, laut: 'nein' -- Straße 7! [Lachen] (leise)") == [
        "er", "rief", "laut", "nein", "straße", "7",
    ]  # fmt: skip
    assert PLAIN.words(" ... ") == []


def test_english_is_spelt_and_counted_as_whisper_is_judged() -> None:
    english = Speller(spellings={"colour": "color"})
    assert english.words("Um, he won't see twenty-one colours of Mr. Colour") == [
        "he", "will", "not", "see", "21", "colours", "of", "mister", "color",
    ]  # fmt: skip


def test_languages_without_spaces_are_counted_in_characters() -> None:
    assert JAPANESE.words("今日は、雨。") == ["今", "日", "は", "雨"]
    assert [Speller(language=code).counts_characters for code in ("zh", "th", "ko", "en")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_language_is_that_which_the_decoder_starts_from() -> None:
    names = ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>", "ja", "<|de|>"]
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=lambda ids: [names[i] for i in ids],
        english_spelling_normalizer={"colour": "color"},
    )
    found = spellers_of([[0, 1, 2], [0, 4, 2], [0, 2, 3]], tokenizer)
    assert [one.language for one in found] == ["ja", "de", "en"]
    assert found[0].spellings == {"colour": "color"}
    tokenizer.english_spelling_normalizer = None
    assert spellers_of([[0]], tokenizer) == [Speller()]


def word_error_rates(
    dense: list[str], sparse: list[str], transcripts: list[str | None]
) -> tuple[Metric, ...]:
    return error_rates(dense, sparse, transcripts, [PLAIN] * len(dense))


def test_recordings_of_both_kinds_have_rates_of_their_own() -> None:
    dense, sparse = ["ein Wort", "雨が", "zwei"], ["ein Ort", "雨か", "zwei"]
    rates = error_rates(dense, sparse, [None, "雨が降る", None], [PLAIN, JAPANESE, PLAIN])
    assert [(rate.name, rate.samples) for rate in rates] == [
        ("word error rate to dense", 2),
        ("character error rate", 1),
        ("character error rate to dense", 1),
    ]
    means = [math.fsum(rate.values) / rate.samples for rate in rates]
    assert means == pytest.approx([1 / 3, 3 / 4, 1 / 2])


def test_a_rate_is_errors_over_words_of_all_recordings() -> None:
    transcripts = ["a b c d", None, "e"]
    dense, sparse = ["a b c d", "q q", "x"], ["a c d", "q r", "x y"]
    known, change = word_error_rates(dense, sparse, transcripts)
    assert (known.name, known.samples, known.higher_is_better) == ("word error rate", 2, False)
    assert known.dense is not None
    assert known.sparse is not None
    assert known.difference is not None
    assert known.dense.value == pytest.approx(1 / 5)
    # One word left out, "e" taken for "x", and "y" put in.
    assert known.sparse.value == pytest.approx(3 / 5)
    assert known.difference.value == pytest.approx(2 / 5)
    assert (change.name, change.samples) == ("word error rate to dense", 3)
    assert change.agreement is not None
    assert change.agreement.value == pytest.approx((1 + 1 + 1) / (4 + 2 + 1))
    assert math.fsum(change.values) / 3 == pytest.approx(change.agreement.value)
    assert change.agreement.standard_error > 0


def test_recordings_of_one_length_have_the_standard_error_of_their_mean() -> None:
    (rate,) = word_error_rates(["a b", "c d", "e f"], ["a b", "c x", "e f"], [None] * 3)
    assert rate.agreement is not None
    assert rate.values == pytest.approx((0, 0.5, 0))
    assert rate.agreement.standard_error == pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))


def test_no_words_have_no_rate() -> None:
    with pytest.raises(CalibrationError, match=r"of 2 evaluation recordings hold no word, so no"):
        word_error_rates(["", "..."], ["a", "b"], [None, None])
