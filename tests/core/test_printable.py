"""Names of others are shown, and nothing more."""

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_deploy.core.printable import MOST_CHARACTERS, MOST_OF_A_WORD, printable, shortened

TEXT = st.text(st.characters(exclude_categories=[]), max_size=40)


@settings(max_examples=200)
@given(TEXT)
def test_nothing_is_left_that_acts_hides_or_turns(text: str) -> None:
    shown = printable(text)
    shown.encode()
    for character in shown:
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert unicodedata.bidirectional(character) not in {
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
        }  # fmt: skip
    assert len(shown.splitlines()) <= 1


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M", "Zs"])))
def test_text_of_any_script_stays(text: str) -> None:
    assert printable(text) == text


def test_what_is_escaped_can_be_told() -> None:
    assert printable("a\x1b[31mb\x07") == r"a\x1b[31mb\x07"
    assert printable("\x1b]8;;https://e.example\x1b\\x\x9b1m") == (
        r"\x1b]8;;https://e.example\x1b" + "\\x" + r"\x9b1m"
    )
    assert printable("gnp.\u202eexe\u200b\ud800\U000e0041\u2028") == (
        r"gnp.\u202eexe\u200b\ud800\U000e0041\u2028"
    )
    assert printable("a\r\nb\tc") == r"a\r\nb\tc"
    assert printable("a\nb\x1bc", keep="\n") == "a\nb\\x1bc"
    assert printable("می\u200cشود") == "می\u200cشود"


def test_long_words_and_texts_lose_their_middle() -> None:
    word = "x" * 10**6
    assert shortened(f"names {word}; correct it.") == (
        f"names {'x' * (MOST_OF_A_WORD * 2 // 3)}…{'x' * 99}; correct it."
    )
    words = "word " * 10**6
    assert len(shortened(words)) < MOST_CHARACTERS
    assert shortened("word " * 700) == "word " * 700
    assert shortened("y" * MOST_OF_A_WORD) == "y" * MOST_OF_A_WORD
