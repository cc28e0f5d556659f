"""Read text and JSON records that users wrote, by what a file holds and not by its name alone."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prox24_deploy.core.documents import (
    after_space,
    decode,
    decode_json,
    decode_json_at,
    open_regular,
    read_at_most,
)
from prox24_deploy.core.errors import CalibrationError

# What the names of files with a JSON value per line end in.
JSON_LINES = frozenset({".jsonl", ".ndjson"})
MOST_TEXT_BYTES = 2**30
_TABLES = frozenset({".csv", ".tsv"})
_UNPACK, _COLUMN, _SAVE = "unpack it", "write its texts as JSONL", "save it as plain text"
# How files begin that are no text, with what they are and what to do about it.
_FORMATS = {
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ\x00": ("compressed with xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", _UNPACK),
    b"\x04\x22\x4d\x18": ("compressed with LZ4", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"PK\x03\x04": ("a ZIP archive or an Office document", "unpack it, or save it as plain text"),
    b"PAR1": ("a Parquet table", _COLUMN),
    b"ARROW1": ("an Arrow table", _COLUMN),
    b"ORC": ("an ORC table", _COLUMN),
    b"Obj\x01": ("an Avro table", _COLUMN),
    b"SQLite format 3": ("an SQLite database", _COLUMN),
    b"\x89HDF": ("an HDF5 file", _COLUMN),
    b"%PDF": ("a PDF document", _SAVE),
    b"{\\rtf": ("an RTF document", _SAVE),
    b"\xd0\xcf\x11\xe0": ("an Office document", _SAVE),
}
# How JSON begins, and what people write does not: {"key, [{ or ["text.
_JSON = re.compile(r'\s*(?:\{\s*"|\[\s*[{"])')
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON value of a file: in which line it stands, or which item of its list it is."""

    unit: Literal["line", "item"]
    number: int
    value: Any


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file without its byte order mark, its lines ended as those of Unix.

    Raises:
        CalibrationError: it cannot be read, is too large, or is no UTF-8 text; says what it is.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = read_at_most(file, MOST_TEXT_BYTES + 1) if size <= MOST_TEXT_BYTES else b""
    except OSError as error:
        raise CalibrationError(f"Text {path} cannot be read ({error.strerror}).") from error
    if max(size, len(data)) > MOST_TEXT_BYTES:
        raise CalibrationError(
            f"Text {path} has more than the {MOST_TEXT_BYTES:,} bytes that are read; pass a part "
            "of it, 10 bytes for each token asked for are plenty."
        )
    _require_plain(path, data)
    try:
        text = decode(data)
    except ValueError as error:
        raise CalibrationError(f"Text {path} is {error}; convert it.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: Path, text: str) -> Iterator[Record] | None:
    """The records of a file that holds JSON, None where it holds text.

    It holds JSON where its name says so or its text begins as JSON does. Then it is one list, one
    object, or one value per line. Half surrogate pairs are left in strings; see `mended`.

    Raises:
        CalibrationError: as the records are taken, where one is not JSON.
    """
    suffix = path.suffix.lower()
    if suffix not in JSON_LINES | {".json"} and not _JSON.match(text):
        return None
    start = after_space(text, 0)
    if text.startswith("[", start):
        return _items(path, text, start + 1)
    if suffix in JSON_LINES:
        return _lines(path, text)
    try:
        whole = decode_json(text)
    except ValueError:
        return _lines(path, text)
    return iter([Record("item", 1, whole)])


def json_lines(path: Path) -> Iterator[Record]:
    """The records of a file with one JSON value per line.

    Raises:
        CalibrationError: the file cannot be read, or a line is not JSON.
    """
    return _lines(path, read_text(path))


def mended(text: str) -> str:
    """Text with U+FFFD in place of each half of a surrogate pair, which no tokenizer takes."""
    return _HALF_PAIR.sub("\ufffd", text)


def _require_plain(path: Path, data: bytes) -> None:
    if path.suffix.lower() in _TABLES:
        raise CalibrationError(f"Text {path} is a table, expected text or JSON; {_COLUMN}.")
    for mark, (kind, remedy) in _FORMATS.items():
        if data.startswith(mark):
            raise CalibrationError(f"Text {path} is {kind}, expected text or JSON; {remedy}.")
    # UTF-16 with a mark is told by its mark.
    if not data.startswith((b"\xff\xfe", b"\xfe\xff")) and (place := data.find(b"\0")) >= 0:
        raise CalibrationError(
            f"Text {path} is binary or UTF-16, byte {place} is NUL; pass UTF-8 text."
        )


def _lines(path: Path, text: str) -> Iterator[Record]:
    # Only "\n" ends a record: a JSON string may hold any other line separator of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield Record("line", number, decode_json(line))
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON ({error}).") from error


def _items(path: Path, text: str, position: int) -> Iterator[Record]:
    """The items of a list, one after the other, for all of a large one would take much memory."""
    position = after_space(text, position)
    number, more = 0, not text.startswith("]", position)
    while more:
        number += 1
        try:
            value, position = decode_json_at(text, position)
        except ValueError as error:
            raise CalibrationError(f"{path} item {number} is not JSON ({error}).") from error
        yield Record("item", number, value)
        position = after_space(text, position)
        more = text.startswith(",", position)
        position = after_space(text, position + more)
    if not text.startswith("]", position) or after_space(text, position + 1) < len(text):
        raise CalibrationError(
            f"{path} is not one list of JSON values, it goes on after item {number}; write one "
            "value per line instead."
        )
