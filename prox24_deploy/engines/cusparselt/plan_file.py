"""Read files that `plan` wrote, of which there are kinds, each with a schema version."""

from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from prox24_deploy.core.documents import Document, first_problem, parse_json, read_document
from prox24_deploy.core.errors import UsageError


class Versioned(Protocol):
    """A record that says by which schema it was written."""

    @property
    def schema_version(self) -> int:
        """Number of the schema."""


class Readable(Protocol):
    """A file on disk or inside the package."""

    def read_bytes(self) -> bytes:
        """Its whole content."""


Record = TypeVar("Record", bound=Versioned)


def read_record(
    adapter: TypeAdapter[Record],
    file: Readable,
    title: str,
    version: int,
    *,
    missing: str,
    again: str,
) -> Record:
    """Read and validate one record.

    Args:
        adapter: of the record's type.
        file: where it lies.
        title: what the file is and where, as it stands in an error: "Plan plan.json".
        version: of the schema that is read.
        missing: what to do where there is no such file.
        again: the command that writes it.

    Raises:
        UsageError: the file cannot be read, or is no record of this version.
    """
    # One inside the package is as it was shipped.
    data = (
        read_document(file, Document(title, UsageError, missing))
        if isinstance(file, Path)
        else file.read_bytes()
    )
    raw = parse_json(data, Document(title, UsageError, f"write it again with {again}"))
    try:
        record = adapter.validate_python(raw)
    except ValidationError as error:
        where, what = first_problem(error)
        raise UsageError(
            f"{title} is damaged at {where or 'its start'}: {what}; write it again with {again}."
        ) from error
    if record.schema_version != version:
        raise UsageError(
            f"{title} has schema version {record.schema_version}, expected {version}; write it "
            f"again with {again}."
        )
    return record
