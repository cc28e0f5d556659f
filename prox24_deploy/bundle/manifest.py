"""The manifest of a bundle: provenance, hash and size of every file, and their verification."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from prox24_deploy import __version__
from prox24_deploy.bundle.layout import LATE_FILES, MANIFEST_FILE, RECOVERED, REPORT_FILES
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.documents import (
    Document,
    first_problem,
    is_file_name,
    read_json,
    replace_infinite,
)
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.snapshot import hashes_of

SCHEMA_VERSION: Literal[1] = 1


# Commands that each run a stage behind pruning, in order; `report` ends a run of them.
_COMMANDS = ("export", "compile", "bench", "evaluate")
# Of Linux, in bytes, with some left for the folder of the bundle.
_LONGEST_PATH = 3072


def _inside(name: str) -> str:
    """Refuse a path that leaves the bundle: stale outputs are deleted by these names."""
    path = PurePosixPath(name)
    plain = all(is_file_name(part) for part in path.parts) and path.as_posix() == name != "."
    if path.is_absolute() or not plain or len(os.fsencode(name)) > _LONGEST_PATH:
        raise ValueError(f"{name!r} is not a plain path inside the bundle")
    return name


InnerPath = Annotated[str, AfterValidator(_inside)]


class _Part(BaseModel):
    # Text such as "1e999" is taken for a number, and for an infinite one.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class FileEntry(_Part):
    """Content of one file, as written."""

    sha256: str
    size: int


class StageEntry(_Part):
    """A finished stage.

    `key` hashes tool version, `inputs` and nothing else; a stage whose key is unchanged and whose
    outputs still hash the same is not run again. `reads` names the outputs of earlier stages that
    it was made from. `finished` is when it ended, ISO 8601 in UTC.
    """

    key: str
    inputs: dict[str, Any]
    reads: list[InnerPath] = []
    outputs: list[InnerPath]
    seconds: float
    finished: str = ""


class Manifest(_Part):
    """Contents of manifest.json.

    `tool_version` is that of the version that wrote it last. `pending` names what was about to be
    written then, so that after a kill it can be told from files of anybody else. `self_sha256` is
    the hash of this file's own canonical text with that field empty, so that a flipped byte is
    found here as well.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: Literal["prox24-deploy"] = "prox24-deploy"
    tool_version: str = __version__
    complete: bool = False
    verdict: str = ""
    model: ModelInfo | None = None
    recipe: str = ""
    options: dict[str, Any] = {}
    seed: int = 0
    versions: dict[str, str] = {}
    machine: dict[str, str] = {}
    stages: dict[str, StageEntry] = {}
    files: dict[InnerPath, FileEntry] = {}
    pending: list[InnerPath] = []
    self_sha256: str = ""


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value: sorted keys, two spaces, UTF-8, final newline.

    A number that is not finite, which JSON has none of, is its name, "nan", "inf" or "-inf", which
    readers of records take for it.
    """
    value = replace_infinite(value, str)
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def contents_sha256(manifest: Manifest) -> str:
    """Digest of what the stages left: every file but the report and the card, which quote it."""
    late = {*REPORT_FILES, *LATE_FILES}
    files = {name: entry.sha256 for name, entry in manifest.files.items() if name not in late}
    return hashlib.sha256(canonical_json(files)).hexdigest()


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, with its own hash."""
    write_atomic(root / MANIFEST_FILE, _sealed(manifest))


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of a bundle.

    Raises:
        BundleError: there is none, or it is not one that this version wrote.
    """
    path = root / MANIFEST_FILE
    document = Document(
        f"Bundle {root}: {MANIFEST_FILE}", BundleError, "restore it, or pass the OUT of a build"
    )
    raw = read_json(path, document)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        where, what = first_problem(error)
        raise BundleError(
            f"{path} is damaged or of another version ({where or 'the file'}: {what}); "
            "restore it, or pass another -o."
        ) from error


def verify(root: Path) -> list[str]:
    """Re-hash every file of a bundle; return one sentence per fault, none if it is sound.

    Raises:
        BundleError: there is no manifest to verify against.
    """
    if not root.is_dir():
        raise BundleError(f"Bundle {root} is not a directory; pass the OUT of a build.")
    try:
        manifest = read_manifest(root)
    except BundleError as error:
        if not (root / MANIFEST_FILE).is_file():
            raise
        return [str(error)]
    changed = (root / MANIFEST_FILE).read_bytes() != _sealed(manifest)
    own = [f"{MANIFEST_FILE} was changed after it was written."] if changed else []
    return [*own, *faults(root, manifest)]


def hash_file(path: Path) -> FileEntry:
    """sha256 and size of one file."""
    return hash_files(path.parent, [path.name])[path.name]


def hash_files(root: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """sha256 and size of files below a folder, by name."""
    names = list(names)
    contents = hashes_of(root / name for name in names)
    return {
        name: FileEntry(sha256=sha256, size=(root / name).stat().st_size)
        for name, sha256 in zip(names, contents, strict=True)
    }


def checksum_list(root: Path, manifest: Manifest) -> str:
    """Every file of a bundle and the manifest itself, as `sha256sum -c` reads it in the bundle."""
    hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
    hashes[MANIFEST_FILE] = hash_file(root / MANIFEST_FILE).sha256
    return "".join(f"{_checksum_line(name, hashes[name])}\n" for name in sorted(hashes))


def list_files(root: Path, below: str = ".") -> list[str]:
    """Every file and link under `root / below`, as POSIX paths relative to `root`, sorted."""
    start = root / below
    inner = (p for p in start.rglob("*") if p.is_symlink() or not p.is_dir())
    found = [start] if start.is_file() else inner
    return sorted(p.relative_to(root).as_posix() for p in found)


def _checksum_line(name: str, sha256: str) -> str:
    """A leading backslash tells sha256sum that the name is escaped."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{chr(92) if escaped != name else ''}{sha256}  {escaped}"


def _sealed(manifest: Manifest) -> bytes:
    unsealed = manifest.model_copy(update={"self_sha256": ""}).model_dump(mode="json")
    digest = hashlib.sha256(canonical_json(unsealed)).hexdigest()
    return canonical_json(unsealed | {"self_sha256": digest})


def unpruned(manifest: Manifest) -> str:
    """Why nothing can be made of a bundle that was pruned elsewhere, and what to do; else ""."""
    if "prune" in manifest.stages or "recover" not in manifest.stages:
        return ""
    return (
        f"it holds only {RECOVERED}/, which recover made of a model that was pruned elsewhere, so "
        f"use {RECOVERED}/ as a model directory, or run recover on the bundle that prune made"
    )


def _unfinished(manifest: Manifest) -> str:
    """How to finish a bundle, which may have been pruned and recovered by single commands."""
    again = "run the same build again"
    if "recover" in manifest.stages:
        again += ", with its --recover options, for without them the recovered model is removed"
    if "prune" not in manifest.stages:
        return again
    missing = [name for name in _COMMANDS if name not in manifest.stages]
    return f"{again}; or run {', '.join((*missing, 'report'))} on it"


def faults(root: Path, manifest: Manifest) -> Iterator[str]:
    """What in a bundle is not as this manifest says: one sentence for each, every file hashed."""
    if not manifest.complete:
        rest = unpruned(manifest) or _unfinished(manifest)
        yield f"{MANIFEST_FILE} belongs to an unfinished build; {rest}."
    links = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink()}
    yield from (f"{name} is a link, expected the file itself." for name in sorted(links))
    own = sorted(manifest.files.keys() - links)
    there = hash_files(root, [name for name in own if (root / name).is_file()])
    for name in own:
        entry, found = manifest.files[name], there.get(name)
        if found is None:
            yield f"{name} is missing."
        elif found != entry:
            yield (
                f"{name} was changed: {found.size} bytes with sha256 {found.sha256[:16]}…, "
                f"expected {entry.size} bytes with {entry.sha256[:16]}…."
            )
    for name in list_files(root):
        if name not in manifest.files and name != MANIFEST_FILE and name not in links:
            yield f"{name} is not listed in {MANIFEST_FILE}."
