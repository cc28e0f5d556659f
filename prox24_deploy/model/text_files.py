"""Read text and JSON lines that users wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prox24_deploy.errors import CalibrationError

# What the names of files with a JSON value per line end in.
JSON_LINES = frozenset({".jsonl", ".ndjson"})


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file, without its byte order mark.

    Raises:
        CalibrationError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"Text {path} is not UTF-8; convert it.") from error
    except OSError as error:
        raise CalibrationError(f"Text {path} cannot be read ({error.strerror}).") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file with one JSON value per line, each with its line number from 1.

    Raises:
        CalibrationError: the file cannot be read, or a line is not JSON.
    """
    # Only "\n" ends a record: a JSON string may hold any other line separator of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON ({error}).") from error
