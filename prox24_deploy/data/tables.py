"""Read tables that users have: CSV and TSV by the standard library, Parquet by pyarrow.

Both are read row by row, and of Parquet only the columns that are asked for.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prox24_deploy.core.documents import open_regular
from prox24_deploy.core.errors import BackendMissingError, CalibrationError
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.foreign import blamed
from prox24_deploy.data.text_files import (
    MOST_RECORD,
    Record,
    begins_with,
    lines_of,
    read_pieces,
    unreadable,
)

# What the names of tables of text end in, and what separates their columns.
TEXT_TABLES = {".csv": ",", ".tsv": "\t"}
_PARQUET = b"PAR1"
_OTHER_SEPARATORS = ";\t|"
_ROWS = 256

# From the names of all columns to those that are wanted.
Wanted = Callable[[Sequence[str]], Sequence[str]]


def read_table(path: Path, wanted: Wanted) -> Iterator[Record] | None:
    """The rows of a table as objects of the wanted columns; None for a file that is no table.

    Of a cell that holds nothing the value is "".

    Raises:
        CalibrationError: it cannot be read, as the rows are taken; or what `wanted` raises.
        BackendMissingError: it is a Parquet table, and pyarrow is not installed.
    """
    if begins_with(path, _PARQUET):
        return _parquet_rows(path, wanted)
    separator = TEXT_TABLES.get(path.suffix.lower())
    return None if separator is None else _text_rows(path, separator, wanted)


def _text_rows(path: Path, separator: str, wanted: Wanted) -> Iterator[Record]:
    lines = (f"{line}\n" for line in lines_of(read_pieces(path), path))
    with _long_fields():
        rows = csv.reader(lines, delimiter=separator, strict=True)
        header = _next_row(path, rows, 0)
        if not header:
            return
        if len(header) == 1 and any(sign in header[0] for sign in _OTHER_SEPARATORS):
            raise CalibrationError(
                f"Table {path} has the one column {header[0]!r}; separate columns by commas, or by "
                "tabs in a file that is named .tsv."
            )
        places = {name: header.index(name) for name in wanted(header)}
        number = 1
        while row := _next_row(path, rows, number):
            if len(row) != len(header):
                raise CalibrationError(
                    f"Table {path} row {number} has {len(row)} columns, its first line names "
                    f"{len(header)}; put quotes around a text that holds the separator."
                )
            yield Record("row", number, {name: row[place] for name, place in places.items()})
            number += 1


def _next_row(path: Path, rows: Iterator[list[str]], number: int) -> list[str]:
    """The next row that is not empty; [] at the end."""
    try:
        return next((row for row in rows if row), [])
    except csv.Error as error:
        raise CalibrationError(
            f"Table {path} row {number} cannot be read ({error}); write it anew with a CSV library."
        ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a cell be as long as any record; the default of the module is 128 KiB."""
    before = csv.field_size_limit(MOST_RECORD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path, wanted: Wanted) -> Iterator[Record]:
    def refused(reason: str) -> CalibrationError:
        return CalibrationError(
            f"Text {path} is no Parquet table that can be read ({reason}); write it anew."
        )

    try:
        # An extra, and needed for such tables alone.
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendMissingError(
            f"Text {path} is a Parquet table, which pyarrow reads, and that is not installed "
            f"({error}); install it with: {install_of('tables')}"
        ) from error
    number = 0
    try:
        with open_regular(path) as file, blamed(refused):
            table = ParquetFile(file)
            names = list(wanted(table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=_ROWS, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield Record("row", number, _filled(row))
    except OSError as error:
        raise unreadable(path, error) from error


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in row.items()}
