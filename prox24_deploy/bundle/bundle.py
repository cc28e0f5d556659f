"""A bundle under construction: stages that are run once, resumed after a kill, and sealed.

A stage writes its outputs under `OUT/.partial/`, from where finished ones are renamed into place;
its result is stored as `stages/NAME.json`, and only then is it entered in the manifest. What a kill
leaves behind is what the manifest says was pending; it is removed or redone by the next run.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from prox24_deploy import __version__
from prox24_deploy.bundle.layout import (
    LATE_FILES,
    MANIFEST_FILE,
    PARTIAL,
    STAGES,
    lies_below,
    record_of,
)
from prox24_deploy.bundle.manifest import (
    Manifest,
    StageEntry,
    canonical_json,
    faults,
    hash_file,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)
from prox24_deploy.bundle.stage import (
    Artifact,
    Stage,
    Workspace,
    checked_parts,
    open_artifact,
    stage_key,
)
from prox24_deploy.core.atomic import (
    is_temporary,
    make_folder,
    make_readable,
    sync_tree,
    write_atomic,
    writing,
)
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.fingerprint import fields_of
from prox24_deploy.core.records import Engine, OnnxModel
from prox24_deploy.core.types import STEP, Progress

log = logging.getLogger(__name__)

I = TypeVar("I")  # noqa: E741 - inputs of a stage
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

    def run(self, stage: Stage[I, T], inputs: I, progress: Progress, *, anew: bool = False) -> T:
        """Return the stored result of a stage, or run it; `anew` runs it in any case.

        What the inputs have on disk is hashed again when the stage has ended: a result of files
        that were written meanwhile is not kept.

        Args:
            stage: what to do.
            inputs: frozen dataclass; its fingerprint is the key of the stage.
            progress: called with (label, done, total).
            anew: do not look for a stored result.

        Raises:
            Prox24Error: what the stage raises, or that one of its inputs changed while it ran.
        """
        said = fields_of(inputs)
        key = stage_key(stage.name, said)
        adapter: TypeAdapter[T] = TypeAdapter(stage.result)
        stored = None if anew else self._stored(stage.name, key, adapter)
        if stored is not None:
            self.reused.append(stage.name)
            log.log(STEP, "stage %s: unchanged, not run again", stage.name)
            return stored
        parts = list(checked_parts(inputs))
        began = time.perf_counter()
        workspace = self._workspace(stage.name, key, stage.outputs)
        if not stage.refuses:
            workspace.begin()
        result = stage.run(inputs, workspace, progress)
        seconds = round(time.perf_counter() - began, 3)
        for part in parts:
            part.require_unchanged()
        text = canonical_json(adapter.dump_python(result, mode="json"))
        self._publish(stage.outputs)
        write_atomic(self.root / record_of(stage.name), text)
        self._enter(
            stage.name,
            StageEntry(
                key=key,
                inputs=said,
                reads=[part.name for part in parts if isinstance(part, Artifact)],
                outputs=[record_of(stage.name), *stage.outputs],
                seconds=seconds,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        # As large as the model several times over, and of no use to a stage that has ended.
        remove(workspace.kept)
        # What a later run will read, so that both go on from the same values in the same order.
        return adapter.validate_json(text)

    def load(self, stage: Stage[I, T]) -> T:
        """Result of a stage that an earlier command finished.

        Raises:
            BundleError: that stage has not been run here by this version of the tool, or its files
                were changed.
        """
        entry = self.manifest.stages.get(stage.name)
        key = stage_key(stage.name, entry.inputs) if entry else ""
        stored = self._stored(stage.name, key, TypeAdapter(stage.result)) if entry else None
        if stored is None:
            raise BundleError(
                f"Bundle {self.root} holds no finished stage {stage.name!r}; run it first."
            )
        return stored

    def artifact(self, name: str) -> Artifact:
        """An output of a finished stage, hashed anew.

        Raises:
            BundleError: no stage left it, or it was changed since.
        """
        return open_artifact(self.root, name, self.manifest)

    def write_late(self, name: str, data: bytes) -> None:
        """Write one of `LATE_FILES`, unless it says the same already, and enter it."""
        path = self.root / name
        if not path.is_file() or path.read_bytes() != data:
            self.manifest.files.pop(name, None)
            self.save()
            write_atomic(path, data)
        self.manifest.files[name] = hash_file(path)
        self.save()

    def drop_late(self, name: str) -> None:
        """Remove one of `LATE_FILES`, if it is there."""
        if self.manifest.files.pop(name, None) is not None:
            self.promise([name])
            remove(self.root / name)
            self.promise([])

    def save(self) -> None:
        """Write the manifest, in the name of this version of the tool."""
        self.manifest.tool_version = __version__
        write_manifest(self.root, self.manifest)

    def seal(self, files: Sequence[str]) -> None:
        """Enter the last files, drop everything temporary and mark the manifest complete.

        Raises:
            BundleError: something in OUT is not what this tool left there; names the first.
        """
        shutil.rmtree(self.partial, ignore_errors=True)
        for name in files:
            make_readable(self.root, name)
        self.manifest.files.update(hash_files(self.root, files))
        self.manifest.pending = []
        self.manifest.complete = True
        if found := next(faults(self.root, self.manifest), None):
            self.manifest.complete = False
            raise BundleError(
                f"Bundle {self.root} is finished but does not verify: {found} Remove what does not "
                "belong there and run the same build again."
            )
        self.save()

    def promise(self, files: Sequence[str]) -> None:
        """Say in the manifest that these files are about to be written."""
        self.manifest.pending = [*files]
        self.save()

    def forget(self, name: str) -> None:
        """Remove a stage with its outputs, and every stage that read them."""
        self._begin(name, ())
        self.promise([])

    def _begin(self, name: str, outputs: Sequence[str]) -> None:
        """Remove a stage's old outputs, first from the manifest, then from disk."""
        stale = {*outputs, record_of(name), *self._drop(name)}
        for output in stale:
            for file in self._files_below(output):
                del self.manifest.files[file]
        self.manifest.complete = False
        self.promise(sorted(stale))
        for output in stale:
            remove(self.root / output)

    def _drop(self, name: str) -> set[str]:
        """Take a stage and all that depends on it from the manifest; returns their outputs."""
        old = self.manifest.stages.pop(name, None)
        if old is None:
            return set()
        stale = set(old.outputs)
        readers = [n for n, e in self.manifest.stages.items() if stale.intersection(e.reads)]
        return stale.union(*(self._drop(reader) for reader in readers))

    def _workspace(self, name: str, key: str, outputs: Sequence[str]) -> Workspace:
        """A place to work in, empty once begun but for what the same stage left, or is shared."""
        kept, shared = (self.partial / folder for folder in (f"{name}-{key[:16]}", "shared"))
        make_folder(self.partial)

        def begin() -> None:
            self._begin(name, outputs)
            for leftover in self.partial.iterdir():
                if leftover not in {kept, shared}:
                    remove(leftover)

        return Workspace(
            root=self.root, partial=self.partial, kept=kept, shared=shared, begin=begin
        )

    def _publish(self, outputs: Sequence[str]) -> None:
        """Rename finished outputs into place, durably, readable by whoever may read OUT."""
        for name in outputs:
            made, target = self.partial / name, self.root / name
            if made.exists():
                sync_tree(made)
                make_folder(target.parent)
                with writing(target):
                    made.replace(target)
            make_readable(self.root, name)
            sync_tree(target)
        sync_tree(self.root, deep=False)

    def _stored(self, name: str, key: str, adapter: TypeAdapter[T]) -> T | None:
        entry = self.manifest.stages.get(name)
        if entry is None or entry.key != key:
            return None
        known = sorted(f for output in entry.outputs for f in self._files_below(output))
        present = sorted(f for output in entry.outputs for f in list_files(self.root, output))
        listed = {f: self.manifest.files[f] for f in _early(known)}
        if _early(known) != _early(present) or hash_files(self.root, listed) != listed:
            log.warning("stage %s: its files were changed, running it again", name)
            return None
        try:
            found = adapter.validate_json((self.root / record_of(name)).read_bytes())
        except (OSError, ValidationError):
            return None
        named = list(_named_files(found))
        # A file named many times over would be compiled or timed as often.
        once = len(set(named)) == len(named)
        return found if once and all(map(self._files_below, named)) else None

    def _files_below(self, output: str) -> list[str]:
        return [f for f in self.manifest.files if lies_below(f, output)]

    def _enter(self, name: str, entry: StageEntry) -> None:
        for output in entry.outputs:
            self.manifest.files.update(hash_files(self.root, list_files(self.root, output)))
        self.manifest.stages[name] = entry
        self.promise([])


def _named_files(record: object) -> Iterator[str]:
    """Files of the bundle that the record of a stage says there are."""
    if isinstance(record, OnnxModel | Engine):
        yield record.path
    elif is_dataclass(record):
        for field in fields(record):
            yield from _named_files(getattr(record, field.name))
    elif isinstance(record, tuple):
        for part in record:
            yield from _named_files(part)


def _early(files: Sequence[str]) -> list[str]:
    return [file for file in files if file not in LATE_FILES]


@contextmanager
def open_bundle(root: Path, *, fresh: bool = False, existing: bool = False) -> Iterator[Bundle]:
    """Create or reopen OUT and hold its lock until the block ends.

    Args:
        root: OUT; created with its parents if it does not exist.
        fresh: forget every finished stage.
        existing: refuse to create a new bundle, and warn where a finished one is left unfinished.

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
        finished = existing and manifest.complete
        try:
            yield bundle
        finally:
            if finished and not bundle.manifest.complete:
                log.warning(
                    "Bundle %s was finished, and its report is of what it was before: run report "
                    "on it, until then it does not verify.", root,
                )  # fmt: skip


def _make_root(root: Path) -> None:
    try:
        make_folder(root)
    except OSError as error:
        if error.errno == errno.EEXIST and root.is_file():
            raise BundleError(f"Output {root} is a file; pass a directory with -o.") from error
        if error.errno not in {errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}:
            raise
        raise BundleError(
            f"Output {root} cannot be created ({error.strerror}); pass another directory with -o."
        ) from error


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _claim(root: Path) -> Manifest:
    """Read the manifest, or start one if the directory holds nothing of anybody else's."""
    if (root / MANIFEST_FILE).is_file():
        manifest = read_manifest(root)
        _tidy(root, manifest)
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


def _tidy(root: Path, manifest: Manifest) -> None:
    """Remove what a kill left; refuse links, which may lead outside, and files of anybody else."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink():
                raise BundleError(f"Bundle {root} holds the link {path}; remove it.")
            if is_temporary(name):
                remove(path)
    for name in list_files(root):
        if name in manifest.files or name == MANIFEST_FILE or name.startswith(f"{PARTIAL}/"):
            continue
        if not any(lies_below(name, output) for output in manifest.pending):
            raise BundleError(
                f"Bundle {root} holds {name!r}, which no stage of it made; move it out of there."
            )
        remove(root / name)


def _is_ours(path: Path) -> bool:
    """Whether a kill during the very first write can have left this behind."""
    return path.name.startswith(f".{MANIFEST_FILE}.") and path.suffix == ".tmp"


def _clear(root: Path) -> None:
    """Remove what earlier builds of this tool put here; the manifest tells what that was."""
    manifest = read_manifest(root)
    for name in {STAGES, PARTIAL, *(file.split("/", 1)[0] for file in manifest.files)}:
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
