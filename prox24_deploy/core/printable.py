"""Text of others as it may be shown: nothing in it acts on a terminal, hides or turns the text.

Names of tensors, modules, files and classes come from files that anybody may have written.
"""

import re
import unicodedata

# Of a sentence, and of a word in it: longer than any that is meant to be read.
MOST_CHARACTERS, MOST_OF_A_WORD = 4000, 400
_LONG_WORD = re.compile(rf"\S{{{MOST_OF_A_WORD + 1},}}")
# Controls, formats such as marks of direction, half surrogate pairs, ends of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Joiners belong to the spelling of words in some scripts.
_JOINERS = "\u200c\u200d"


def printable(text: str, *, keep: str = "") -> str:
    """Text with its escape in Python in place of each character that is not simply shown.

    Args:
        text: of anybody.
        keep: characters to leave as they are, such as the ends of lines of a text of many.
    """
    if text.isprintable():
        return text
    kept = keep + _JOINERS
    return "".join(c if c in kept or not _is_hidden(c) else _escaped(c) for c in text)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text without the middle of words, and of a whole, that nobody would read to the end."""
    text = _LONG_WORD.sub(lambda word: _without_middle(word[0], MOST_OF_A_WORD), text)
    return _without_middle(text, most)


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 4 :]}"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
