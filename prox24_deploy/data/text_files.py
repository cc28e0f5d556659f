"""Read text and records that users wrote, by what a file holds and not by its name alone.

Files may be of any size: they are read piece by piece, and no more of them than is asked for.
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from prox24_deploy.core.documents import (
    MOST_JSON_BYTES,
    after_space,
    decode_json,
    decode_json_at,
    open_regular,
    read_at_most,
    refuse_marked,
)
from prox24_deploy.core.errors import CalibrationError

# What the names of files with a JSON value per line end in.
JSON_LINES = frozenset({".jsonl", ".ndjson"})
# Of one record of JSON or one row of a table, in characters.
MOST_RECORD = 2**27
# Bytes that are read and decoded at once.
_PIECE = 2**20
_UNPACK, _COLUMN, _SAVE = "unpack it", "save it as Parquet or JSONL", "save it as plain text"
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
    """A value of a file: which of its lines, items, rows or paragraphs it is, from 1 on."""

    unit: Literal["line", "item", "row", "paragraph"]
    number: int
    value: Any

    @property
    def where(self) -> str:
        """Where it stands, as "line 3"."""
        return f"{self.unit} {self.number}"


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file without its byte order mark, its lines ended as those of Unix.

    Raises:
        CalibrationError: it cannot be read, is longer than a record may be, or is no UTF-8 text;
            says what it is.
    """
    found, size = [], 0
    for piece in read_pieces(path):
        found.append(piece)
        size += len(piece)
        if size > MOST_RECORD:
            raise CalibrationError(
                f"Text {path} has more than the {MOST_RECORD:,} characters that are read; pass a "
                "part of it."
            )
    return "".join(found)


def read_pieces(path: Path) -> Iterator[str]:
    """The same, piece by piece, of a file of any size; no piece is empty.

    Raises:
        CalibrationError: as for `read_text`, when what is wrong is reached.
    """
    try:
        with open_regular(path) as file:
            yield from filter(None, _decoded(path, iter(lambda: file.read(_PIECE), b"")))
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CalibrationError:
    """The error that says why a file cannot be read."""
    return CalibrationError(f"Text {path} cannot be read ({error.strerror}).")


def begins_with(path: Path, mark: bytes) -> bool:
    """Whether a file begins with these bytes.

    Raises:
        CalibrationError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return read_at_most(file, len(mark)) == mark
    except OSError as error:
        raise unreadable(path, error) from error


def read_records(path: Path, most: int = MOST_RECORD) -> Iterator[Record]:
    """The records of a file that holds JSON, the paragraphs of one that holds text.

    It holds JSON where its name says so or its text begins as JSON does. Then it is one list, one
    object, or one value per line. Half surrogate pairs are left in strings; see `mended`.

    Args:
        path: the file.
        most: characters of text that are read, or a little more; of records, who takes them ends.

    Raises:
        CalibrationError: as the records are taken, where one is not JSON or the file is no text.
    """
    pieces = read_pieces(path)
    head = next(pieces, "")
    pieces = chain([head], pieces)
    suffix = path.suffix.lower()
    if suffix not in JSON_LINES | {".json"} and not _JSON.match(head):
        return _paragraphs(lines_of(_first(pieces, most), path))
    if head.startswith("[", after_space(head, 0)):
        return _items(path, pieces)
    return _json_lines(path, pieces) if suffix in JSON_LINES else _objects(path, pieces)


def json_lines(path: Path) -> Iterator[Record]:
    """The records of a file with one JSON value per line.

    Raises:
        CalibrationError: the file cannot be read, or a line is not JSON.
    """
    return _json_lines(path, read_pieces(path))


def lines_of(pieces: Iterable[str], path: Path) -> Iterator[str]:
    """Lines without their ends: only a line feed ends one, for JSON may hold any other.

    Raises:
        CalibrationError: a line is longer than a record may be.
    """
    number, size = 1, 0
    part: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        part.append(first)
        size += len(first)
        for line in others:
            yield "".join(part)
            number, size, part = number + 1, len(line), [line]
        if size > MOST_RECORD:
            raise CalibrationError(
                f"{path} line {number} is longer than the {MOST_RECORD:,} characters of a record "
                "that are read; end each record with a line break."
            )
    yield "".join(part)


def mended(text: str) -> str:
    """Text with U+FFFD in place of each half of a surrogate pair, which no tokenizer takes."""
    return _HALF_PAIR.sub("\ufffd", text)


def _decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Text of bytes that are UTF-8, without byte order mark, and with line feeds alone."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    place = 0
    for number, chunk in enumerate(chain(chunks, [b""])):
        if not number:
            _require_plain(path, chunk)
        if (nul := chunk.find(b"\0")) >= 0:
            raise CalibrationError(
                f"Text {path} is binary or UTF-16, byte {place + nul} is NUL; pass UTF-8 text."
            )
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"Text {path} is not UTF-8, see byte {place - kept + error.start}; convert it."
            ) from error
        place += len(chunk)
        # Translated to "\n" wherever pieces meet.
        text = newlines.decode(text, final=not chunk)
        yield text if number else text.removeprefix("\ufeff")


def _require_plain(path: Path, data: bytes) -> None:
    for mark, (kind, remedy) in _FORMATS.items():
        if data.startswith(mark):
            raise CalibrationError(f"Text {path} is {kind}, expected text or JSON; {remedy}.")
    try:
        refuse_marked(data)
    except ValueError as error:
        raise CalibrationError(f"Text {path} is {error}; convert it.") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[Record]:
    """What stands between empty lines."""
    number = 0
    part: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            part.append(line)
        elif part:
            number += 1
            yield Record("paragraph", number, "\n".join(part))
            part = []


def _first(pieces: Iterable[str], most: int) -> Iterator[str]:
    """Pieces up to a number of characters, with the whole of the last one."""
    for piece in pieces:
        yield piece
        most -= len(piece)
        if most <= 0:
            return


def _json_lines(path: Path, pieces: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines_of(pieces, path), start=1):
        if not line.strip():
            continue
        try:
            yield Record("line", number, decode_json(line))
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON ({error}).") from error


def _objects(path: Path, pieces: Iterator[str]) -> Iterator[Record]:
    """One object over many lines, unless it is one per line; a large file is the latter."""
    start = list(_first(pieces, MOST_JSON_BYTES))
    try:
        whole = decode_json("".join(start))
    except ValueError:
        return _json_lines(path, chain(start, pieces))
    return iter([Record("item", 1, whole)])


class _Window:
    """What is at hand of a JSON text that is read piece by piece."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._position = 0

    def next_sign(self) -> str:
        """The next character that is no white space, "" at the end; it stays."""
        while (position := after_space(self._text, self._position)) == len(self._text):
            self._position = position
            if not self._grow():
                return ""
        self._position = position
        return self._text[position]

    def pass_sign(self) -> None:
        """Leave the character that `next_sign` gave behind."""
        self._position += 1

    def take(self) -> Any:
        """The value that begins here.

        Raises:
            ValueError: there is none.
        """
        while True:
            try:
                value, end = decode_json_at(self._text, self._position)
            except ValueError:
                # It may go on in the next piece.
                if len(self._text) - self._position > MOST_RECORD or not self._grow():
                    raise
                continue
            # A number may go on, too.
            if end < len(self._text) or not self._grow():
                self._position = end
                return value

    def _grow(self) -> bool:
        """Twice as much text from here on; whether there was any."""
        rest = self._text[self._position :]
        added = list(_first(self._pieces, len(rest)))
        if added:
            self._text, self._position = rest + "".join(added), 0
        return bool(added)


def _items(path: Path, pieces: Iterator[str]) -> Iterator[Record]:
    """The items of a list, one after the other, for all of a large one would take much memory."""
    window = _Window(pieces)
    window.next_sign()
    window.pass_sign()
    number, more = 0, window.next_sign() != "]"
    while more:
        number += 1
        try:
            value = window.take()
        except ValueError as error:
            raise CalibrationError(f"{path} item {number} is not JSON ({error}).") from error
        yield Record("item", number, value)
        if more := window.next_sign() == ",":
            window.pass_sign()
            window.next_sign()
    closed = window.next_sign() == "]"
    window.pass_sign()
    if not closed or window.next_sign():
        raise CalibrationError(
            f"{path} is not one list of JSON values, it goes on after item {number}; write one "
            "value per line instead."
        )
