"""What a model is called: as the user says, else as its own card does, else after its folder.

The `_name_or_path` of a configuration is no name: it says from what a model was made, or where it
once lay.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from prox24_deploy.core.errors import UsageError
from prox24_deploy.packaging.card import CARD_FILE, parse_card

# A name, or an owner's name of it as on the Hub.
_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
# What tells a name in a card from a word such as "Introduction".
_TELLING = re.compile(r"[-_./\d]")
_OPENING = re.compile(r"(model card (for|of):?\s+)", re.IGNORECASE)
# A snapshot in the cache of huggingface_hub: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"models--(.+)")
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# A card is a page of text; what is longer is something else.
_MOST_CHARACTERS = 200_000


def source_name(model_dir: Path, asked: str | None = None) -> str:
    """The name of the model in a directory, such as "sentence-transformers/all-MiniLM-L6-v2".

    Args:
        model_dir: the directory, which may have a card.
        asked: what the user calls it.

    Raises:
        UsageError: `asked` is no name.
    """
    require_name(asked)
    if asked is not None:
        return asked
    return next(_names_in_card(model_dir), None) or folder_name(model_dir)


def require_name(asked: str | None) -> None:
    """Refuse what a user may not call a model.

    Raises:
        UsageError: it is no name.
    """
    if asked is not None and not _NAME.fullmatch(asked):
        raise UsageError(
            f"Name {asked!r} cannot be used, expected letters, digits, '_', '-' and '.', with "
            "one '/' at most, as in owner/model; pass another --name."
        )


def folder_name(model_dir: Path) -> str:
    """The name of a folder; of a snapshot in the cache of the Hub that of its repository."""
    path = model_dir.resolve()
    for part in reversed(path.parts):
        if cached := _CACHED.fullmatch(part):
            return cached[1].replace("--", "/", 1)
    named = (part for part in reversed(path.parts) if not _HASH.fullmatch(part))
    return next(named, path.name)


def default_out(model_dir: Path) -> Path:
    """The bundle of a model where nothing names another, in the working directory."""
    return Path(f"{Path(folder_name(model_dir)).name}-prox24")


def rotated_out(model_dir: Path) -> Path:
    """A model directory that is written from another, likewise."""
    return Path(f"{Path(folder_name(model_dir)).name}-rotated")


def _names_in_card(model_dir: Path) -> Iterator[str]:
    """Names that a card gives its model: in its metadata, then in its first heading."""
    file = model_dir / CARD_FILE
    if not file.is_file():
        return
    written = file.read_text(encoding="utf-8", errors="replace")[:_MOST_CHARACTERS]
    card = parse_card(written)
    for name in (*_indexed(card.metadata.get("model-index")), _heading(card.text)):
        if _NAME.fullmatch(name) and _TELLING.search(name):
            yield name


def _indexed(index: Any) -> Iterator[str]:
    entries = index if isinstance(index, list) else []
    named = (entry.get("name") for entry in entries if isinstance(entry, dict))
    yield from (name for name in named if isinstance(name, str))


def _heading(text: str) -> str:
    """The words of the first heading of the first level, "" where there is none."""
    tokens = MarkdownIt().parse(text)
    for token, inline in pairwise(tokens):
        if (token.type, token.tag) == ("heading_open", "h1"):
            plain = "".join(part.content for part in inline.children or ())
            return _OPENING.sub("", plain.strip(), count=1)
    return ""
