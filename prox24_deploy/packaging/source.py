"""What is read of a finished bundle to hand it over, and where nothing may be written."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from prox24_deploy.bundle.layout import record_of
from prox24_deploy.bundle.manifest import FileEntry, Manifest
from prox24_deploy.core.documents import first_problem
from prox24_deploy.core.errors import BundleError, UsageError

T = TypeVar("T")


def require_outside(bundle: Path, out: Path) -> None:
    """Refuse to write into a bundle, which would then no longer verify.

    Raises:
        UsageError: `out` lies in it.
    """
    if out.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"Output {out} lies in the bundle {bundle}; pass another.")


def require_file(bundle: Path, file: Path) -> None:
    """Refuse a folder, and as `require_outside` does.

    Raises:
        UsageError: `file` is a folder, or lies in the bundle.
    """
    require_outside(bundle, file)
    if file.is_dir():
        raise UsageError(f"Output {file} is a folder, expected a file; pass another.")


def read_record(bundle: Path, stage: str, kind: type[T]) -> T:
    """The result of a stage; a bundle that verifies may still be of another version.

    Raises:
        BundleError: it is.
    """
    path = bundle / record_of(stage)
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        where, what = first_problem(error)
        raise BundleError(
            f"Record {path} is damaged or of another version at {where!r}: {what}; build the "
            "bundle again."
        ) from error


def entry_of(bundle: Path, manifest: Manifest, name: str) -> tuple[Path, FileEntry]:
    """A file of a bundle, and what its content must be.

    Raises:
        BundleError: the manifest does not list it.
    """
    if name not in manifest.files:
        raise BundleError(f"Bundle {bundle} has no file {name}; build it again.")
    return bundle / name, manifest.files[name]
