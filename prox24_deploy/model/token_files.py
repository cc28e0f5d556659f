"""The files of a tokenizer, before a library reads them that prints what they say.

The tokenizers library ignores an option of an added token that it does not know, and prints its
name, whatever that holds, past Python: between lines of JSON, or as a command to a terminal.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prox24_deploy.core.documents import Document, decode, read_document
from prox24_deploy.core.errors import ModelDirError

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# The largest of published models has 35 MB.
_MOST_BYTES = 2**27
_KIND, _CONTENT = "__type", "content"
_OPTIONS = frozenset(
    {"id", _KIND, _CONTENT, "single_word", "lstrip", "rstrip", "normalized", "special"}
)


def require_known_options(path: Path) -> None:
    """Refuse a tokenizer with added tokens that have options which no library knows.

    A file that is no JSON is left to transformers, which refuses it.

    Args:
        path: the model directory.

    Raises:
        ModelDirError: names the file, the token and the option, or the file is far too large.
    """
    for name in (TOKENIZER_FILE, *_CONFIG_FILES):
        file = path / name
        if not file.is_file():
            continue
        document = Document(str(file), ModelDirError, "restore it")
        for token in _added_tokens(name, _parsed(read_document(file, document, most=_MOST_BYTES))):
            for option in token.keys() - _OPTIONS:
                raise document.refused(
                    f"gives the added token {token.get(_CONTENT)!r} the option {option!r}, "
                    f"expected none but {', '.join(sorted(_OPTIONS - {_KIND}))}"
                )


def _parsed(data: bytes) -> Any:
    """As transformers parses it, which takes the last of several values of a key; None if not."""
    try:
        return json.loads(decode(data))
    except (ValueError, RecursionError):
        return None


def _added_tokens(name: str, value: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(value, dict):
        return
    if name == TOKENIZER_FILE:
        listed = value.get("added_tokens")
        # A normaliser has a content, too.
        yield from filter(_is_object, listed if isinstance(listed, list) else ())
        return
    by_id = value.get("added_tokens_decoder")
    yield from filter(_is_object, by_id.values() if isinstance(by_id, dict) else ())
    waiting: list[Any] = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            # A token says what it is; a schema of answers may have a key of that name.
            if _KIND in found or (_CONTENT in found and isinstance(found[_CONTENT], str)):
                yield found
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
