"""A bundle under construction: stages that are run once, resumed after a kill, and sealed.

A stage writes its outputs under `OUT/.partial/`, from where finished ones are renamed into place;
its result is stored as `stages/NAME.json`, and only then is it entered in the manifest. Whatever is
not in the manifest after a kill is removed or redone by the next run.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from prox24_deploy import __version__
from prox24_deploy.errors import BundleError
from prox24_deploy.files import is_temporary, write_atomic
from prox24_deploy.release.manifest import (
    MANIFEST_FILE,
    Manifest,
    StageEntry,
    canonical_json,
    hash_file,
    list_files,
    read_manifest,
    write_manifest,
)

log = logging.getLogger(__name__)

PARTIAL = ".partial"
STAGES = "stages"
# Written when the bundle is sealed, into the output of a stage: the model card. That it is there,
# or is another than before, says nothing of the stage.
LATE_FILES = ("pruned/README.md",)

T = TypeVar("T")


@dataclass(slots=True)
class Bundle:
    """An output directory that this process holds the lock of.

    Attributes:
        root: OUT.
        manifest: as on disk after every stage.
        reused: names of the stages that were not run again.
    """

    root: Path
    manifest: Manifest
    reused: list[str]

    @property
    def partial(self) -> Path:
        """Where stages work; on the same file system, so that renames are atomic."""
        return self.root / PARTIAL

    def stage(
        self,
        name: str,
        result_type: type[T],
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        run: Callable[[], T],
    ) -> T:
        """Return the stored result of a stage, or run it.

        Args:
            name: of the stage; its result becomes `stages/NAME.json`.
            result_type: frozen dataclass that `run` returns.
            inputs: everything the result depends on, as JSON values; hashes for files.
            outputs: paths under OUT, files or folders, that `run` leaves behind.
            run: does the work; must leave `outputs` in place.
        """
        key = stage_key(name, inputs)
        adapter: TypeAdapter[T] = TypeAdapter(result_type)
        stored = self._stored(name, key, adapter)
        if stored is not None:
            self.reused.append(name)
            log.info("stage %s: unchanged, not run again", name)
            return stored
        self.forget(name, outputs)
        began = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        record = f"{STAGES}/{name}.json"
        text = canonical_json(adapter.dump_python(result, mode="json"))
        write_atomic(self.root / record, text)
        self._enter(
            name,
            StageEntry(
                key=key, inputs=dict(inputs), outputs=[record, *outputs], seconds=round(seconds, 3)
            ),
        )
        # What a later run will read, so that both go on from the same values in the same order.
        return adapter.validate_json(text)

    def load(self, name: str, result_type: type[T]) -> T:
        """Result of a stage that an earlier command finished.

        Raises:
            BundleError: that stage has not been run here, or its files were changed.
        """
        entry = self.manifest.stages.get(name)
        adapter: TypeAdapter[T] = TypeAdapter(result_type)
        stored = self._stored(name, entry.key, adapter) if entry else None
        if stored is None:
            raise BundleError(f"Bundle {self.root} holds no finished stage {name!r}; run it first.")
        return stored

    def publish(self, made: Path, name: str) -> None:
        """Rename a finished file or folder from `partial` to `root / name`."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)

    def clean_partial(self, keep: Path | None = None) -> None:
        """Remove what interrupted stages left behind, except `keep`."""
        self.partial.mkdir(exist_ok=True)
        for leftover in self.partial.iterdir():
            if leftover != keep:
                remove(leftover)

    def seal(self, files: Sequence[str]) -> None:
        """Enter the last files, drop everything temporary and mark the manifest complete."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.manifest.files.update({name: hash_file(self.root / name) for name in files})
        self.manifest.complete = True
        write_manifest(self.root, self.manifest)

    def _stored(self, name: str, key: str, adapter: TypeAdapter[T]) -> T | None:
        entry = self.manifest.stages.get(name)
        if entry is None or entry.key != key:
            return None
        known, present = (
            [f for output in entry.outputs for f in below(output) if f not in LATE_FILES]
            for below in (self._files_below, partial(list_files, self.root))
        )
        if sorted(known) != sorted(present) or any(
            hash_file(self.root / f) != self.manifest.files[f] for f in known
        ):
            log.warning("stage %s: its files were changed, running it again", name)
            return None
        try:
            return adapter.validate_json((self.root / STAGES / f"{name}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def _files_below(self, output: str) -> list[str]:
        return [f for f in self.manifest.files if f == output or f.startswith(f"{output}/")]

    def forget(self, name: str, outputs: Sequence[str]) -> None:
        """Remove a stage's old outputs, first from the manifest, then from disk."""
        old = self.manifest.stages.pop(name, None)
        stale = {*outputs, f"{STAGES}/{name}.json", *(old.outputs if old else ())}
        for output in stale:
            for file in self._files_below(output):
                del self.manifest.files[file]
        self.manifest.complete = False
        write_manifest(self.root, self.manifest)
        for output in stale:
            remove(self.root / output)

    def _enter(self, name: str, entry: StageEntry) -> None:
        for output in entry.outputs:
            for file in list_files(self.root, output):
                self.manifest.files[file] = hash_file(self.root / file)
        self.manifest.stages[name] = entry
        write_manifest(self.root, self.manifest)


@contextmanager
def open_bundle(root: Path, *, fresh: bool = False, existing: bool = False) -> Iterator[Bundle]:
    """Create or reopen OUT and hold its lock until the block ends.

    Args:
        root: OUT; created with its parents if it does not exist.
        fresh: forget every finished stage.
        existing: refuse to create a new bundle.

    Raises:
        BundleError: OUT is a file, holds something that is not a bundle, or is being built.
    """
    if existing and not (root / MANIFEST_FILE).is_file():
        raise BundleError(f"{root} is not a bundle, it has no {MANIFEST_FILE}; run prune first.")
    _make_root(root)
    with _locked(root):
        manifest = _claim(root)
        bundle = Bundle(root, manifest, [])
        if fresh:
            _clear(root)
            bundle.manifest = Manifest()
            write_manifest(root, bundle.manifest)
        yield bundle


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.EEXIST and root.is_file():
            raise BundleError(f"Output {root} is a file; pass a directory with -o.") from error
        if error.errno not in {errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}:
            raise
        raise BundleError(
            f"Output {root} cannot be created ({error.strerror}); pass another directory with -o."
        ) from error


def stage_key(name: str, inputs: Mapping[str, Any]) -> str:
    """sha256 over the stage's name, its inputs and the version of this tool."""
    value = {"stage": name, "tool": __version__, "inputs": inputs}
    return hashlib.sha256(canonical_json(value)).hexdigest()


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _claim(root: Path) -> Manifest:
    """Read the manifest, or start one if the directory holds nothing of anybody else's."""
    if (root / MANIFEST_FILE).is_file():
        manifest = read_manifest(root)
        _tidy(root)
        return manifest
    foreign = sorted(p.name for p in root.iterdir() if not _is_ours(p))
    if foreign:
        raise BundleError(
            f"Output {root} holds {foreign[0]!r} and no {MANIFEST_FILE}, so it is not a bundle; "
            "pass an empty or new directory with -o."
        )
    for leftover in root.iterdir():
        remove(leftover)
    manifest = Manifest()
    write_manifest(root, manifest)
    return manifest


def _tidy(root: Path) -> None:
    """Remove temporary files that a kill left; refuse links, for they may lead outside."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink():
                raise BundleError(f"Bundle {root} holds the link {path}; remove it.")
            if is_temporary(name):
                remove(path)


def _is_ours(path: Path) -> bool:
    """Whether a kill during the very first write can have left this behind."""
    return path.name.startswith(f".{MANIFEST_FILE}.") and path.suffix == ".tmp"


def _clear(root: Path) -> None:
    """Remove what earlier builds of this tool put here; the manifest tells what that was."""
    names = {STAGES, PARTIAL}
    manifest = read_manifest(root)
    names |= {file.split("/", 1)[0] for file in manifest.files}
    for name in names:
        remove(root / name)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold an exclusive lock on the directory itself, so that no lock file is left in it."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(
                f"Output {root} is being written by another build; wait for it."
            ) from error
        yield
    finally:
        os.close(descriptor)
