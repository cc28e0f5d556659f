"""What a stage of a build is: work on frozen inputs, which are all that it can see.

The key of a stage is the digest of its inputs, so that nothing it can see is outside of the key;
and whatever it reads from disk is checked again after its last use, before its result counts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import JsonValue

from prox24_deploy import __version__
from prox24_deploy.bundle.layout import LATE_FILES, lies_below
from prox24_deploy.bundle.manifest import Manifest, canonical_json, list_files
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.snapshot import Snapshot, take_snapshot
from prox24_deploy.core.types import Progress

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where a stage may write.

    Attributes:
        root: OUT; paths in records are relative to it.
        partial: empty once begun; an output made here, under its own name, is published when the
            stage ends.
        kept: for what the same stage with the same inputs goes on from after a kill.
        shared: for what a stage may take again with other inputs, under the hash of what it was
            made of; it is there until the bundle is finished.
        begin: removes what earlier runs left, but for `kept` and `shared`.
    """

    root: Path
    partial: Path
    kept: Path
    shared: Path
    begin: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[Inputs, Result]):
    """One step of a build.

    Attributes:
        name: its result becomes `stages/NAME.json`.
        result: frozen dataclass that `run` returns.
        run: does the work on inputs, a frozen dataclass, and leaves `outputs` behind.
        outputs: files or folders under OUT.
        refuses: `run` may refuse its inputs, and calls `begin` of its workspace when it has not, so
            that a refusal loses nothing; of any other stage it is called before `run`.
    """

    name: str
    result: type[Result]
    run: Callable[[Inputs, Workspace, Progress], Result]
    outputs: tuple[str, ...] = ()
    refuses: bool = False


@runtime_checkable
class Checked(Protocol):
    """A part of the inputs that lies on disk."""

    def require_unchanged(self) -> None:
        """Refuse what is on disk if it is not what was read, by an error that names the file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An output of an earlier stage, as the manifest lists it."""

    name: str
    made_by: str
    snapshot: Snapshot

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.snapshot.root / self.name

    def fingerprint(self) -> dict[str, JsonValue]:
        """Hash of each of its files."""
        return {name: state.sha256 for name, state in self.snapshot.files.items()}

    def require_unchanged(self) -> None:
        """Refuse files that were written since.

        Raises:
            BundleError: names the first of them.
        """
        self._require(self.snapshot.changed())

    def require_listed(self, manifest: Manifest) -> None:
        """Refuse files that are not those which the manifest lists.

        Raises:
            BundleError: names the first of them.
        """
        listed = {
            name: entry.sha256 for name, entry in manifest.files.items() if _early(self.name, name)
        }
        found = self.fingerprint()
        names = sorted(listed.keys() | found.keys())
        self._require(next((n for n in names if listed.get(n) != found.get(n)), None))

    def _require(self, name: str | None) -> None:
        if name is not None:
            raise BundleError(
                f"{self.snapshot.root / name} is not what the stage {self.made_by!r} left there; "
                "nothing made of it is kept. Run that stage again."
            )


def open_artifact(root: Path, name: str, manifest: Manifest) -> Artifact:
    """Hash an output that a stage of a bundle left.

    Raises:
        BundleError: no stage left it, or its files are not those that the manifest lists.
    """
    makers = [stage for stage, entry in manifest.stages.items() if name in entry.outputs]
    if not makers:
        raise BundleError(f"Bundle {root} holds no {name}/; run the stage that makes it first.")
    snapshot = take_snapshot(root, partial(_files_of, name=name))
    artifact = Artifact(name=name, made_by=makers[0], snapshot=snapshot)
    artifact.require_listed(manifest)
    return artifact


def checked_parts(value: object) -> Iterator[Checked]:
    """Every part of some inputs that lies on disk."""
    if isinstance(value, Checked):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from checked_parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from checked_parts(part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            yield from checked_parts(part)


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """sha256 over the stage's name, the fingerprint of its inputs and the version of this tool."""
    value = {"stage": name, "tool": __version__, "inputs": inputs}
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _files_of(root: Path, name: str) -> list[Path]:
    return [root / file for file in list_files(root, name) if _early(name, file)]


def _early(output: str, file: str) -> bool:
    return lies_below(file, output) and file not in LATE_FILES
