"""A disk without room for what a run writes is refused before any work."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run_cli

from prox24_deploy.config.options import BuildOptions, PruneOptions, RecoverOptions, TextOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.pipeline.context import RunContext, read_context
from prox24_deploy.pipeline.room import require_room

HALF = BuildOptions(dtype="float16")
DENSE = BuildOptions(dtype="float16", prune=PruneOptions(method="none"))
RECOVERED = BuildOptions(dtype="float16", recover=RecoverOptions(steps=8))
EXPORTED = {"exports": True}
Disk = Callable[..., None]


@pytest.fixture(scope="module")
def context(tiny_llama: Path, prose: Path) -> RunContext:
    return read_context(tiny_llama, None, BuildOptions(text=TextOptions(calibration=(prose,))))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Sets how much is free."""

    def set_free(free: int, total: int = 2**40) -> None:
        usage = SimpleNamespace(free=free, total=total)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    return set_free


@pytest.fixture
def size(context: RunContext) -> int:
    """Bytes of the checkpoint, which is in float16."""
    return sum(2 * tensor.numel for tensor in context.source.tensors.values())


def test_solved_blocks_lie_beside_the_pruned_model(
    context: RunContext, disk: Disk, size: int, tmp_path: Path
) -> None:
    linear = "*.layers.*.*_proj.weight"
    solved = sum(
        2 * tensor.numel
        for name, tensor in context.source.tensors.items()
        if fnmatch(f".{name}", linear)
    )
    assert 0 < solved < size
    disk(size + solved)
    require_room(tmp_path, context, BuildOptions())
    disk(size + solved - 1)
    with pytest.raises(UsageError, match="its solved blocks"):
        require_room(tmp_path, context, BuildOptions())
    # How many are pruned is not known before.
    require_room(tmp_path, context, BuildOptions(prune=PruneOptions(max_layers=1)))


@pytest.mark.parametrize(
    ("options", "also", "models"),
    [(DENSE, {}, 1), (RECOVERED, {}, 2), (HALF, EXPORTED, 3), (RECOVERED, EXPORTED, 4)],
)
def test_the_models_that_are_written_must_fit(
    context: RunContext, disk: Disk, size: int, tmp_path: Path,
    options: BuildOptions, also: dict[str, bool], models: int,
) -> None:  # fmt: skip
    out = tmp_path / "not" / "there"
    disk(models * size)
    require_room(out, context, options, **also)
    disk(models * size - 1)
    with pytest.raises(UsageError, match=r"there takes .* GiB of room; pass -o on a larger disk"):
        require_room(out, context, options, **also)


def test_what_lies_in_out_is_room(
    context: RunContext, disk: Disk, size: int, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(bytes(size // 2))
    disk(size - size // 2)
    require_room(tmp_path, context, DENSE)


def test_a_disk_of_unknown_size_is_not_refused(
    context: RunContext, disk: Disk, tmp_path: Path
) -> None:
    disk(0, total=0)
    require_room(tmp_path, context, HALF)


def test_a_build_without_room_makes_nothing(
    tiny_llama: Path, prose: Path, disk: Disk, tmp_path: Path
) -> None:
    disk(1000)
    run = run_cli("build", tiny_llama, "-o", tmp_path / "out", "--calibration", prose)
    assert run.code == 2
    assert "pass -o on a larger disk" in run.err
    assert not (tmp_path / "out").exists()
