"""Put free channels of a model into the order in which 2:4 keeps most, and prove that it is free.

A forward pass of the dense model gives how large each input of a layer is; `permute_search` finds
the order. A layer gains by it, and the model computes what it did: the outputs of every layer that
reads moved channels, and of the model, are compared before and after on calibration samples, and
what differs by more than rounding is moved back.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.records import ChannelOrder
from prox24_deploy.core.types import Progress
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.checkpoint import write_tensors
from prox24_deploy.model.layers import Layer, layer_at
from prox24_deploy.pruning.channels import (
    FreeChannels,
    Move,
    apply_moves,
    column_scores,
    free_channels,
    moves,
    tensors_of,
)
from prox24_deploy.pruning.permute_search import search_order
from prox24_deploy.pruning.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

_RECORDS = TypeAdapter(tuple[ChannelOrder, ...])
# Sums in float32 in another order differ by far less of the largest value, and channels that do
# not belong together by far more.
_ROUNDING = 1e-3
# Values of each output that are compared, evenly spaced.
_COMPARED = 65536


@dataclass(slots=True)
class Permuted:
    """What was moved in a model.

    Attributes:
        orders: a record of each layer whose channels are free, moved or not.
        moved: everything that moved, by the layer that gains.
    """

    orders: tuple[ChannelOrder, ...] = ()
    moved: Mapping[str, list[Move]] | None = None

    def without(self, model: nn.Module, dense: Mapping[str, str]) -> "Permuted":
        """Move back what layers read that stay dense after all, in place."""
        known = self.moved or {}
        for path in (path for path in known if path in dense):
            apply_moves(model, known[path], back=True)
        orders = tuple(order for order in self.orders if order.layer not in dense)
        return Permuted(orders, {path: m for path, m in known.items() if path not in dense})

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Every tensor that was moved, as it now is."""
        values = tensors_of(model)
        names = {move.name for moved in (self.moved or {}).values() for move in moved}
        return {name: values[name] for name in sorted(names)}


@dataclass(frozen=True, slots=True)
class OrderStore:
    """The orders that were found, in a folder, so that a run that goes on has the same.

    Blocks that were solved in another order than these are of no use.
    """

    folder: Path
    guard: Callable[[], None]

    def load(self) -> tuple[dict[str, Tensor], tuple[ChannelOrder, ...]] | None:
        """Orders by layer and records of all, or None if nothing readable was saved."""
        try:
            with safe_open(self._path, framework="pt") as handle:
                orders = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return orders, _RECORDS.validate_json(handle.metadata()["records"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, orders: Mapping[str, Tensor], records: tuple[ChannelOrder, ...]) -> None:
        """Write them atomically, and remove what was solved before."""
        self.guard()
        make_folder(self.folder)
        for solved in (*self.folder.glob("block-*.safetensors"), *self.folder.glob("sens*.json")):
            solved.unlink()
        metadata = {"records": _RECORDS.dump_json(records).decode()}
        write_tensors(self._path, dict(orders), metadata)

    @property
    def _path(self) -> Path:
        return self.folder / "order.safetensors"


@torch.no_grad()
def permute_channels(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    dense: Mapping[str, str],
    *,
    has_tensor: Callable[[str], bool],
    store: OrderStore,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Permuted:
    """Put the free channels that pruned layers read into a better order, in place.

    Args:
        model: dense, float32, evaluation mode.
        recipe: declares which channels are free.
        batches: samples that tell how large the inputs of each layer are.
        dense: targets that stay dense.
        has_tensor: whether one tensor of the checkpoint is meant by a name of the model.
        store: orders of an interrupted run.
        progress: called with ("permute", done, total).
        ranks: the processes that share the run, each with the model; the first finds the orders.
    """
    found, against = free_channels(model, recipe, dense)
    if not found and not against:
        return Permuted()
    known = store.load() if ranks.writes else None
    searches = known is None and ranks.writes
    if searches:
        known = _searched(model, recipe, batches, found, against, has_tensor, progress)
        store.save(*known)
    told = ranks.told(known)
    assert told is not None, "process 0 has found them"
    orders, records = told
    if not searches:
        for free in (free for free in found if free.reader in orders):
            apply_moves(model, moves(model, free, orders[free.reader]))
    by_reader = {free.reader: free for free in found}
    moved = {name: moves(model, by_reader[name], order) for name, order in orders.items()}
    return Permuted(records, moved)


def _searched(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    found: Sequence[FreeChannels],
    against: Mapping[str, str],
    has_tensor: Callable[[str], bool],
    progress: Progress,
) -> tuple[dict[str, Tensor], tuple[ChannelOrder, ...]]:
    """Find an order for each, move what it moves and keep what the model computes alike with."""
    seen = _Seen(model, recipe, [free.reader for free in found])
    for number, batch in enumerate(batches):
        progress("permute", number, len(batches) + len(found))
        seen.run(batch)
    records = {path: _order(path, reason=reason) for path, reason in against.items()}
    orders: dict[str, Tensor] = {}
    for number, free in enumerate(found):
        progress("permute", len(batches) + number, len(batches) + len(found))
        reason = _unusable(model, free, seen, has_tensor)
        if reason:
            records[free.reader] = _order(free.reader, reason=reason)
            continue
        layer = layer_at(model, free.reader)
        order = search_order(column_scores(layer, seen.squares[free.reader], free))
        orders[free.reader] = order.order
        moved = moves(model, free, order.order)
        records[free.reader] = _order(
            free.reader,
            tensors=tuple(sorted({move.name for move in moved})),
            before=order.before,
            after=order.after,
            digest=hashlib.sha256(json.dumps(order.order.tolist()).encode()).hexdigest(),
        )
    for path, reason in _prove(model, recipe, batches[0], found, orders).items():
        log.warning("%s: its channels stay as they are, because %s", path, reason)
        records[path] = _order(path, reason=reason)
        del orders[path]
    progress("permute", len(batches) + len(found), len(batches) + len(found))
    # Another process has no use for a tensor on the GPU of this one.
    orders = {name: order.cpu() for name, order in orders.items()}
    return orders, tuple(records[path] for path in sorted(records))


def _order(
    layer: str,
    *,
    tensors: tuple[str, ...] = (),
    before: float | None = None,
    after: float | None = None,
    digest: str = "",
    reason: str = "",
) -> ChannelOrder:
    return ChannelOrder(
        layer=layer,
        tensors=tensors,
        kept_before=before,
        kept_after=after,
        order_sha256=digest,
        reason=reason,
    )


def _unusable(
    model: nn.Module, free: FreeChannels, seen: "_Seen", has_tensor: Callable[[str], bool]
) -> str:
    """Why channels stay as they are before any is moved, "" if they need not."""
    if free.reader not in seen.squares:
        return "no forward pass on calibration samples reaches it"
    rows = torch.arange(free.width).expand(free.heads, -1)
    names = [move.name for move in moves(model, free, rows)]
    strange = next((name for name in names if not has_tensor(name)), None)
    return f"the checkpoint has no tensor of its own for {strange}" if strange else ""


def _prove(
    model: nn.Module,
    recipe: Recipe,
    batch: Batch,
    found: Sequence[FreeChannels],
    orders: Mapping[str, Tensor],
) -> dict[str, str]:
    """Move all; move back what changes the model, by rule of the recipe, and say why.

    The model is permuted by what remains when this returns.
    """
    free = [each for each in found if each.reader in orders]
    before = _outputs(model, recipe, batch, [each.reader for each in free])
    moved = {each.reader: moves(model, each, orders[each.reader]) for each in free}
    for moving in moved.values():
        apply_moves(model, moving)
    refused: dict[str, str] = {}
    while True:
        left = [move for path, moving in moved.items() if path not in refused for move in moving]
        culprit = _first_change(model, recipe, batch, before, refused, left)
        if culprit is None:
            return refused
        path, difference = culprit
        rules = [each.rule for each in free if each.reader == path]
        alike = [each.reader for each in free if not rules or each.rule in rules]
        gone = [reader for reader in alike if reader not in refused]
        for reader in gone:
            apply_moves(model, moved[reader], back=True)
            refused[reader] = (
                f"with them moved, the output of {path} differs by {difference:.1g} of its largest "
                "value, which is more than rounding"
            )
        if not gone:
            raise RuntimeError(f"{path} gives {difference:.1g} other values with nothing moved")


def _first_change(
    model: nn.Module,
    recipe: Recipe,
    batch: Batch,
    before: Mapping[str, Tensor],
    refused: Mapping[str, str],
    moved: Sequence[Move],
) -> tuple[str, float] | None:
    """The first output, in the order of a forward pass, that is not what it was, and by how much.

    A layer that another rule has disturbed is not looked at again once its own was moved back.
    """
    # What a layer gives may be what another reads, and then comes in that other's order.
    rows = {move.name.removesuffix(".weight"): move.index for move in moved if move.written}
    after = _outputs(model, recipe, batch, [path for path in before if path != _MODEL], rows)
    for path, was in before.items():
        scale = float(was.abs().max()) if was.numel() else 0.0
        difference = float((after[path] - was).abs().max()) / scale if scale else 0.0
        if not difference <= _ROUNDING and path not in refused:
            return path, difference
    return None


_MODEL = "the model"


def _outputs(
    model: nn.Module,
    recipe: Recipe,
    batch: Batch,
    paths: Sequence[str],
    rows: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Some values of what layers and the model give, in the order of a forward pass.

    `rows` says how the channels that some layers give were moved, and they are moved back.
    """
    found: dict[str, Tensor] = {}

    def note(path: str, output: Tensor) -> None:
        if path in rows:
            channels = 1 if isinstance(layer_at(model, path), nn.Conv2d) else -1
            output = output.index_select(channels, rows[path].argsort())
        values = output.detach().float().flatten()
        found.setdefault(path, values[:: -(-len(values) // _COMPARED)].cpu())

    handles = [
        layer_at(model, path).register_forward_hook(lambda _, __, out, p=path: note(p, out))
        for path in paths
    ]
    try:
        result = run_model(model, batch, recipe.task)
    finally:
        for handle in handles:
            handle.remove()
    tensors = [value for value in dict(result).values() if isinstance(value, Tensor)]
    note(_MODEL, torch.cat([tensor.float().flatten() for tensor in tensors]))
    return found


class _Seen:
    """Sums of squares of what layers read, over the samples that were run."""

    def __init__(self, model: nn.Module, recipe: Recipe, paths: Sequence[str]) -> None:
        self._model, self._recipe = model, recipe
        self._layers = {path: layer_at(model, path) for path in paths}
        self.squares: dict[str, Tensor] = {}

    def run(self, batch: Batch) -> None:
        """Run one batch and add what is seen on its real positions."""
        with self._hooked(batch):
            run_model(self._model, batch, self._recipe.task)

    @contextmanager
    def _hooked(self, batch: Batch) -> Iterator[None]:
        def note(path: str, layer: Layer, read: Tensor) -> None:
            squares = _squares(layer, read, batch)
            self.squares[path] = self.squares[path] + squares if path in self.squares else squares

        handles = [
            layer.register_forward_pre_hook(lambda m, args, p=path: note(p, m, args[0]))
            for path, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _squares(layer: Layer, read: Tensor, batch: Batch) -> Tensor:
    """Sum of squares of each channel of an input over all positions that are not padding."""
    if isinstance(layer, nn.Conv2d):
        return read.float().square().sum((0, 2, 3))
    targets = None if batch.targets is None else batch.targets >= 0
    for real in (batch.real, targets):
        if real is not None and real.ndim == 2 and read.shape[:-1] == real.shape:
            return read[real.to(read.device)].float().square().sum(0)
    return read.float().flatten(0, -2).square().sum(0)
