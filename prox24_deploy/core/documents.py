"""Read JSON and TOML that others wrote: bounded, regular files only, every fault in one sentence.

All of the package reads its documents here, so that what is refused is refused everywhere: files
that are no regular files or too large, text that is not UTF-8, nesting that would exhaust the
stack, keys given twice, half surrogate pairs and, but where a caller allows them, numbers that are
not finite, or are larger than any float.
"""

import errno
import json
import math
import os
import re
import stat
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from prox24_deploy.core.errors import Prox24Error

if TYPE_CHECKING:
    from pydantic import ValidationError

# The largest index of a published model has 10 MB, and what is parsed takes up to 30 times as much.
MOST_JSON_BYTES = 2**25
MOST_TOML_BYTES = 2**18
# Of a file, read at once.
_PIECE = 2**20
MOST_DEPTH = 100
# What no float of eight bytes holds, and most readers of JSON take for infinite.
_MOST_NUMBER = int(sys.float_info.max)
_SPACE = re.compile(r"[ \t\r\n]*")
# Of the file systems of Linux, in bytes.
_LONGEST_NAME = 255

_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Only an escape can make half a pair of text that is UTF-8.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_PART = r"""(?:"[^"\n]*+"|'[^'\n]*+'|(?<![\w-])[\w-]++)"""
# What the parser of Python takes quadratic time for.
_DEEP_KEY = re.compile(rf"{_PART}(?:[ \t]*+\.[ \t]*+{_PART}){{{MOST_DEPTH}}}")


@dataclass(frozen=True, slots=True)
class Document:
    """A document as errors about it speak.

    Attributes:
        title: what it is and where, as a sentence begins: "Limits limits.toml".
        error: what to raise.
        remedy: what to do about a document that cannot be used, as a sentence ends.
    """

    title: str
    error: type[Prox24Error]
    remedy: str

    def refused(self, problem: str) -> Prox24Error:
        """The error that says what is wrong with it."""
        return self.error(f"{self.title} {problem}; {self.remedy}.")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; a pipe is not waited for, a device not read.

    Raises:
        OSError: it cannot be opened, or is no regular file; `strerror` says which.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    raise OSError(errno.ENODEV, f"it is {kind}, expected a file", str(path))


def files_below(folder: Path) -> list[Path]:
    """What lies in a folder and in those in it, but for hidden folders; links are not entered.

    Raises:
        OSError: one of them cannot be read, so that files may be missed.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += (Path(place, name) for name in files)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def require_readable(path: Path, document: Document) -> None:
    """Refuse a file that `open_regular` does not open.

    Raises:
        Prox24Error: of the document's kind.
    """
    try:
        open_regular(path).close()
    except OSError as error:
        raise document.refused(f"cannot be read ({error.strerror})") from error


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """The bytes of a file up to a number, in memory for what is there.

    Python reserves as many bytes as it is asked to read.
    """
    pieces = []
    while most and (piece := file.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def read_document(path: Path, document: Document, *, most: int = MOST_JSON_BYTES) -> bytes:
    """All bytes of a file of at most `most` bytes.

    Raises:
        Prox24Error: of the document's kind; the file cannot be read or is larger.
    """
    try:
        with open_regular(path) as file:
            data = read_at_most(file, most + 1)
    except OSError as error:
        raise document.refused(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        # Of a name that no file can have, such as one with a NUL.
        raise document.refused(f"cannot be read ({error})") from error
    if len(data) > most:
        raise document.refused(f"is larger than the {most:,} bytes that are read")
    return data


def read_json(path: Path, document: Document, *, finite: bool = True) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
        Prox24Error: of the document's kind; the file cannot be read or is refused.
    """
    return parse_json(read_document(path, document), document, finite=finite)


def read_object(path: Path, document: Document, *, finite: bool = True) -> dict[str, Any]:
    """The object of a JSON file; see `parse_json`.

    Raises:
        Prox24Error: of the document's kind; the file cannot be read, is refused, or is no object.
    """
    return require_object(read_json(path, document, finite=finite), document)


def require_object(value: Any, document: Document) -> dict[str, Any]:
    """Refuse any other value of JSON than an object.

    Raises:
        Prox24Error: of the document's kind.
    """
    if not isinstance(value, dict):
        raise document.refused("is no JSON object")
    return value


def parse_json(data: bytes | str, document: Document, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: UTF-8, with or without a byte order mark.
        document: names it in errors.
        finite: refuse NaN and infinity, which only some writers of JSON know, and whole numbers
            beyond every float.

    Raises:
        Prox24Error: of the document's kind; it is not JSON, or is refused.
    """
    try:
        text = decode(data) if isinstance(data, bytes) else data
        value = decode_json(text)
        if finite:
            _refuse_infinite(value)
        if _SURROGATE_ESCAPE.search(text):
            _refuse_half_pairs(value)
    except ValueError as error:
        raise document.refused(f"is not readable JSON ({reason_of(error)})") from error
    return value


def decode_json(text: str) -> Any:
    """The value of a JSON text, half surrogate pairs and numbers that are not finite included.

    Raises:
        ValueError: it is not JSON, nests deeper than `MOST_DEPTH`, or gives a key twice.
    """
    value, end = decode_json_at(text, after_space(text, 0))
    if after_space(text, end) < len(text):
        raise ValueError(f"something follows its value, at character {end}")
    return value


def decode_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a character of a text, and the character behind its end.

    Raises:
        ValueError: as for `decode_json`.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        deep = _is_deep(value)
    except RecursionError:
        value, end, deep = None, start, True
    if deep:
        raise ValueError(f"it nests deeper than {MOST_DEPTH} levels")
    return value, end


def after_space(text: str, start: int) -> int:
    """The first character from `start` on that is no white space of JSON."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs; of a key given twice, readers take the first or last as they like."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is given twice")
    return made


def read_toml_text(path: Path, document: Document) -> str:
    """The text of a TOML file, for `parse_toml`.

    Raises:
        Prox24Error: of the document's kind; the file cannot be read, is too large or not UTF-8.
    """
    data = read_document(path, document, most=MOST_TOML_BYTES)
    try:
        # TOML knows no byte order mark, but editors write one.
        return decode(data)
    except ValueError as error:
        raise document.refused(f"cannot be read ({error})") from error


def parse_toml(text: str, document: Document) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        Prox24Error: of the document's kind; it is not TOML, or is refused.
    """
    try:
        if _DEEP_KEY.search(text):
            raise RecursionError  # noqa: TRY301 - what the parser would end in
        table = tomllib.loads(text)
    except RecursionError as error:
        raise document.refused(f"nests deeper than {MOST_DEPTH} levels") from error
    except ValueError as error:
        raise document.refused(f"is not valid TOML: {reason_of(error)}") from error
    if _is_deep(table):
        raise document.refused(f"nests deeper than {MOST_DEPTH} levels")
    return table


def decode(data: bytes) -> str:
    """Text of UTF-8, without its byte order mark.

    Raises:
        ValueError: says in which other encoding the bytes are, or where they are not UTF-8.
    """
    refuse_marked(data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, see byte {error.start}") from error


def refuse_marked(data: bytes) -> None:
    """Refuse bytes that begin with the mark of another encoding than UTF-8.

    Raises:
        ValueError: says which.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"not UTF-8 but {encoding}")


def reason_of(error: BaseException) -> str:
    """What an error of another library says, as one line without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Where a first line ends in a colon, it only says where; what is wrong stands below.
    count = 2 if lines[0].endswith(":") else 1
    return " ".join(lines[:count]).rstrip(".")


def first_problem(error: "ValidationError") -> tuple[str, str]:
    """Where the first fault that pydantic found lies, "" for the whole, and what it says of it."""
    problem = error.errors()[0]
    return ".".join(str(part) for part in problem["loc"]), problem["msg"]


def replace_infinite(value: Any, made: Callable[[float], Any]) -> Any:
    """A value with what `made` gives for each number in it that is not finite: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return made(value)
    if isinstance(value, dict):
        return {key: replace_infinite(part, made) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_infinite(part, made) for part in value]
    return value


def is_file_name(name: str) -> bool:
    """Whether a name from a document can be that of a file, and leads into no other folder."""
    plain = name not in {"", ".", ".."} and not set(name) & {"/", "\0"}
    return plain and len(os.fsencode(name)) <= _LONGEST_NAME


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _is_deep(value: Any) -> bool:
    """Whether lists and objects nest deeper than `MOST_DEPTH`; level by level, without a stack."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
    return bool(level)


def _refuse_infinite(value: Any) -> None:
    level = [value]
    while level:
        if any(isinstance(item, float) and not math.isfinite(item) for item in level):
            raise ValueError("it holds a number that is not finite")
        if any(isinstance(item, int) and abs(item) > _MOST_NUMBER for item in level):
            raise ValueError("it holds a number that is larger than any float")
        level = [child for item in level for child in _children(item)]


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _refuse_half_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"a string holds {half}, half of a surrogate pair") from error
