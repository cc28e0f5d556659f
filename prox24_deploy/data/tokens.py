"""Give a tokenizer no more of a document than the tokens asked for need."""

from typing import Any

from prox24_deploy.model.tokenizing import ids_of

# More than text of any language has in a token.
_CHARACTERS = 16
# What stands behind a token can change it, but for a word or so.
_MARGIN = 64
# Where text gives few tokens, such as a word of megabytes, this many times as much is tried.
_MOST_TIMES = 4


def enough_of(document: str, tokenizer: Any, tokens: int, *, end: bool = False) -> str:
    """The part of a document that gives its first tokens, all of it where that is not long.

    The first `tokens` tokens are those of the whole document. Of one that has less than a token in
    64 characters there may be fewer.

    Args:
        document: any text.
        tokenizer: of transformers.
        tokens: how many are asked for, those that begin or end a text included.
        end: ask for the last tokens instead.
    """
    size = _CHARACTERS * (tokens + _MARGIN)
    most = _MOST_TIMES * size
    while size < len(document):
        part = document[-size:] if end else document[:size]
        if size >= most or len(ids_of(part, tokenizer)) >= tokens + _MARGIN:
            return part
        size *= 2
    return document


def truncated(document: str, tokenizer: Any, length: int, *, as_target: bool = False) -> list[int]:
    """At most `length` tokens of a document, with those that begin and end a text, or a target."""
    end = getattr(tokenizer, "truncation_side", "right") == "left"
    part = enough_of(document, tokenizer, length, end=end)
    return ids_of(part, tokenizer, most=length, as_target=as_target)
