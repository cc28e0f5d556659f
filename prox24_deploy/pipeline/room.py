"""Whether the disk of OUT has room for what a run is certain to write there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.config.options import BuildOptions, PruneOptions
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.host import GIB, gib_of, room_in
from prox24_deploy.core.types import TWINS
from prox24_deploy.pipeline.context import RunContext

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.model.shards import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Bytes that lie there at once: a rotated, pruned or recovered model, and exported twins.

    Blocks that are `solved` do until the pruned model is whole.
    """

    rotated: int = 0
    pruned: int = 0
    solved: int = 0
    recovered: int = 0
    exported: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.rotated + self.pruned + self.solved + self.recovered + self.exported

    def __str__(self) -> str:
        return gib_of(
            {
                "the rotated model": self.rotated,
                "the pruned model": self.pruned,
                "its solved blocks": self.solved,
                "the recovered model": self.recovered,
                "exported files": self.exported,
            }
        )


def require_room(
    out: Path, context: RunContext, options: BuildOptions, *, exports: bool = False
) -> None:
    """Refuse a run into `out` whose disk has no room for it, before any work.

    What `out` has already counts as room, for it is of an earlier run that goes on or is replaced.
    A file system that does not say how large it is refuses nothing.

    Args:
        out: the bundle, there or not.
        context: the model.
        options: a dtype of None is that of the checkpoint.
        exports: whether the run exports the model, too.

    Raises:
        UsageError: says what is needed, what is free, and what to do.
    """
    room, stored = room_in(out), _stored(context.source)
    _require(out, Written(pruned=stored, solved=_solved(context, options.prune)), room)
    needed = _written(context.source, options, _values(context.source) if exports else 0)
    if exports and needed.total > room:
        # Not every tensor of a checkpoint needs to be one of the model.
        needed = _written(context.source, options, _exported_values(context))
    _require(out, needed, room)


def require_room_for_copy(out: Path, source: "ModelDir") -> None:
    """Refuse to write another model of the size of one, likewise."""
    _require(out, Written(rotated=_stored(source)), room_in(out))


def _require(out: Path, needed: Written, room: float) -> None:
    if needed.total > room:
        raise UsageError(
            f"{out} takes {needed} and its disk has {room / GIB:.3g} GiB of room; pass -o on a "
            "larger disk, or free some."
        )


def _written(source: "ModelDir", options: BuildOptions, exported: int) -> Written:
    import torch

    stored = _stored(source)
    # Without a dtype some tensors have that of the checkpoint, of which none has fewer bytes.
    each = getattr(torch, options.dtype).itemsize if options.dtype else 1
    if options.quantize is not None:
        each = 1
    return Written(
        pruned=stored,
        recovered=stored if options.recover else 0,
        exported=len(TWINS) * each * exported,
    )


def _stored(source: "ModelDir") -> int:
    return _bytes(source.tensors.values())


def _solved(context: RunContext, options: PruneOptions) -> int:
    """Bytes of the blocks that are solved; 0 where more than the recipe says what is pruned."""
    chosen = options.include or options.exclude or options.planned_dense or options.has_budget
    if chosen or options.method == "none":
        return 0
    from prox24_deploy.model.dtypes import target_weights

    return _bytes(target_weights(context.source, context.recipe))


def _bytes(tensors: Iterable["StoredTensor"]) -> int:
    return sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors)


def _values(source: "ModelDir") -> int:
    return sum(tensor.numel for tensor in source.tensors.values())


def _exported_values(context: RunContext) -> int:
    from prox24_deploy.model.directory import structure_of
    from prox24_deploy.model.offload import float_bytes

    return float_bytes(structure_of(context.source, context.recipe)) // 4
