"""The files of a tokenizer, before a library reads them that prints what they say.

The tokenizers library ignores an option of an added token that it does not know, and prints its
name, whatever that holds, past Python: between lines of JSON, or as a command to a terminal. And it
takes as much memory as a map of characters claims to need; without that, it ends the process.
"""

import base64
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
_KIND, _CONTENT, _MAP = "__type", "content", "precompiled_charsmap"
_OPTIONS = frozenset(
    {"id", _KIND, _CONTENT, "single_word", "lstrip", "rstrip", "normalized", "special"}
)


def require_readable(path: Path) -> None:
    """Refuse a tokenizer with options or a map of characters that its library does not survive.

    A file that is no JSON is left to transformers, which refuses it.

    Args:
        path: the model directory.

    Raises:
        ModelDirError: names the file, and the token and the option, or what its map claims; or the
            file is far too large.
    """
    for name in (TOKENIZER_FILE, *_CONFIG_FILES):
        file = path / name
        if not file.is_file():
            continue
        document = Document(str(file), ModelDirError, "restore it")
        value = _parsed(read_document(file, document, most=_MOST_BYTES))
        if name == TOKENIZER_FILE:
            for text in _maps(value):
                _require_whole(text, document)
        for token in _added_tokens(name, value):
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


def _maps(value: Any) -> Iterator[str]:
    """Every map of characters in a tokenizer, wherever it stands."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            text = found.get(_MAP)
            if isinstance(text, str):
                yield text
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def _require_whole(text: str, document: Document) -> None:
    """Refuse a map that is shorter than its first four bytes say, by the format of SentencePiece.

    What is no base64, or does not say, is left to the library, which refuses it.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return
    claimed, held = int.from_bytes(data[:4], "little"), len(data) - 4
    if 0 <= held < claimed:
        raise document.refused(f"has a {_MAP} of {held:,} bytes that claims to have {claimed:,}")


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
