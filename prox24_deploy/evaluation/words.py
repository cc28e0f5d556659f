"""The words of a text, and how many of them another text gets wrong."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:'\w+)*")


def words_of(text: str) -> list[str]:
    """The words of a text without case and punctuation; an apostrophe stays inside its word.

    A language that writes no spaces gives one word per run of characters, of which an error rate
    says little.
    """
    return _WORD.findall(text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def word_errors(reference: Sequence[str], written: Sequence[str]) -> int:
    """Least number of words to replace, delete or insert, which make one list of the other.

    The distance of Levenshtein, row by row: `row[j]` is that of the words so far from the first j
    words written.
    """
    row = list(range(len(written) + 1))
    for i, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(written, start=1):
            replaced = diagonal + (expected != found)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]
