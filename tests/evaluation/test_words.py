"""Errors in words against their definition, and error rates against sums."""

import itertools
import math

import pytest

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.evaluation.speech import word_error_rates
from prox24_deploy.evaluation.words import word_errors, words_of

LISTS = [words for length in range(4) for words in itertools.product("abc", repeat=length)]


def distance(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The least over all three ways to begin, tried without any table."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    ways = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(distance(*way) for way in ways)


def test_errors_are_the_fewest_changes_that_make_one_text_the_other() -> None:
    for one, other in itertools.product(LISTS, LISTS):
        assert word_errors(one, other) == distance(one, other)


def test_long_texts_differ_by_what_was_done_to_them() -> None:
    said = [str(i) for i in range(200)]
    assert word_errors(said, [*said[:50], "x", "y", *said[51:120], *said[122:]]) == 4


def test_case_and_punctuation_are_no_words() -> None:
    assert words_of("Don\N{RIGHT SINGLE QUOTATION MARK}t SHOUT, he said: 'no' -- Straße 7!") == [
        "don't", "shout", "he", "said", "no", "strasse", "7",
    ]  # fmt: skip
    assert words_of(" ... ") == []


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
