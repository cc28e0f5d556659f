"""How much memory pruning a model takes, and where what it needs is kept; decided beforehand.

Weights and hidden states may be kept in several places, the arithmetic is the same in all: where
there is less memory a run reads and writes more, and comes to the same bits.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.host import free_memory, gib, gib_free, gib_needed, room_in
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.experts import place_of
from prox24_deploy.model.layers import matrix_shape
from prox24_deploy.model.offload import float_bytes, free_on, logits_bytes
from prox24_deploy.pruning.hidden_states import Place
from prox24_deploy.pruning.waves import MOST_GRAM, gram_bytes

_FLOAT, _DOUBLE = 4, 8
# Matrices of the size of the weights that the solver holds at most: start, linear term, iterate,
# dual, the best so far, its mask, what steps make on their way, and in float64 for both sets of
# samples what errors need.
_SOLVER_MATRICES = 18
# Second moments in float64 of both sets of samples while a layer is solved; curvature, inverse, its
# factor and what exact products take. While they are summed there are four of the former, and few
# of the latter.
_SQUARE_DOUBLES, _SQUARE_FLOATS = 2, 6
# What PyTorch, its libraries and the allocator take beside the tensors.
_OVERHEAD = 2**29
# What the C library keeps on a CPU of tensors that were freed: those of less than 32 MiB lie on its
# heap, in pieces, as far as so much is worked with. Larger ones go back to the system.
_HEAP = 5 * 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that pruning takes.

    Attributes:
        model: all weights in float32.
        outside: those outside of the blocks.
        block: those of the largest block.
        blocks: of which so many are in memory at once.
        states: hidden states of all samples, dense and pruned.
        working: Gram matrices and the solver, or one batch on its way through a block, or what the
            model as a whole predicts for one.
    """

    model: int
    outside: int
    block: int
    blocks: int
    states: int
    working: int

    def held(self) -> int:
        """With the whole model in memory, hidden states aside."""
        return self.model + (self.blocks - 1) * self.block + self.working + _OVERHEAD

    def streamed(self) -> int:
        """With some blocks in memory at a time, hidden states aside."""
        return self.outside + self.blocks * self.block + self.working + _OVERHEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that a process may take on its device and, if that is another one, on the host.

    `processes` is how many of a run share this machine.
    """

    device: int
    host: int
    is_host: bool
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where weights and hidden states are kept, and the bytes on the device that this takes."""

    streamed: bool
    states: Place
    bytes: int

    def sentence(self, device: torch.device) -> str:
        """What was decided, for people."""
        model = "one block in memory at a time" if self.streamed else "the whole model in memory"
        where = {"device": "in memory", "host": "in the memory of the host", "disk": "on disk"}
        return (
            f"about {gib(self.bytes)} on {device.type}: {model}, hidden states {where[self.states]}"
        )


def needs_of(
    model: nn.Module, recipe: Recipe, samples: Sequence[Batch], options: PruneOptions
) -> Needs:
    """What pruning a model on samples takes.

    Args:
        model: of its structure; no weight is read, so that it may be on the meta device.
        recipe: of its family.
        samples: all batches, those of errors too.
        options: whether blocks are tuned as a whole, which takes the next block too.
    """
    blocks = [block for part in recipe.parts for block in find_blocks(model, part)]
    parts = [part for part in recipe.parts for _ in find_blocks(model, part)]
    sizes = [float_bytes(block) for block in blocks]
    layers = [
        _sized(block, part, _routes(model)) for block, part in zip(blocks, parts, strict=True)
    ]
    # Most layers of a block read as many features as its hidden states have.
    widths = Counter(layer.features for own in layers for layer in own)
    width = max(widths, key=lambda each: widths[each], default=0)
    positions = [batch.positions for batch in samples]
    states = 2 * _FLOAT * width * sum(positions)
    outputs = max(sum(layer.rows * layer.share for layer in own) for own in layers)
    batch = math.ceil(_FLOAT * max(positions) * outputs)
    return Needs(
        model=float_bytes(model),
        outside=float_bytes(model) - sum(sizes),
        block=max(sizes),
        blocks=3 if options.reconstructs else 2,
        states=states,
        working=max(
            batch + max(_grams(own) for own in layers),
            logits_bytes(model, samples),
            max(map(_solver, layers)),
        ),
    )


def room_on(device: torch.device, limit: int | None, processes: int = 1) -> Room:
    """What is free for each of so many processes of this machine, within `limit` on the device.

    Each on a GPU has one of its own; all share the memory of the host, and the limit on that.
    """
    is_host = device.type == "cpu"
    return Room(
        device=free_on(device, limit) // (processes if is_host else 1),
        host=free_memory() // processes,
        is_host=is_host,
        processes=processes,
    )


def place(needs: Needs, room: Room, *, whole: str = "") -> Placement:
    """Keep as much in memory as there is room for: hidden states first, then the whole model.

    Args:
        needs: of the run.
        room: that it has.
        whole: the option that needs the whole model in memory, if there is one.

    Raises:
        UsageError: even with everything on disk that can be there is no room.
    """
    if room.is_host:
        needs = replace(needs, working=needs.working + min(_HEAP, needs.working))
    places: list[tuple[Place, int, bool]] = [
        ("device", needs.states, True),
        ("host", 0, not room.is_host and needs.states <= room.host // 2),
        ("disk", 0, True),
    ]
    for states, beside, possible in places:
        for streamed in (False, True):
            if not possible or (streamed and whole):
                continue
            own = needs.streamed() if streamed else needs.held()
            if own + beside <= room.device:
                return Placement(streamed=streamed, states=states, bytes=own + beside)
    least = needs.held() if whole else needs.streamed()
    advice = ""
    if whole:
        without = gib_needed(needs.streamed())
        advice = f"; {whole} needs the whole model, without it {without} do"
    many = room.is_host and room.processes > 1
    each = f" for each of {room.processes} processes" if many else ""
    raise UsageError(
        f"Pruning takes at least {gib_needed(least)} of memory, and {gib_free(room.device)} are "
        f"free or allowed by --memory-limit{each}; free some, raise the limit"
        f"{', start fewer processes' if many else ''} or take a larger device{advice}."
    )


def require_disk(states: int, folder: Path) -> None:
    """Refuse hidden states for which the disk has no room, before any work.

    Args:
        states: bytes of all of them.
        folder: where they go; what an earlier run left there counts as room.

    Raises:
        UsageError: says what is needed, what is free, and what to do.
    """
    free = room_in(folder)
    if states > free:
        raise UsageError(
            f"Hidden states take {gib_needed(states)} on the disk of {folder}, and "
            f"{gib_free(free)} are free there; free some, raise --memory-limit, or take less "
            "calibration text."
        )


@dataclass(frozen=True, slots=True)
class _Sized:
    """A layer that reads `features` and gives `rows`.

    Attributes:
        features: of its input.
        rows: of its matrix.
        expert: path of the expert that it is of; "" for any other layer.
        share: of the tokens that it reads, where they are spread evenly over the experts.
    """

    features: int
    rows: int
    expert: str
    share: float


def _sized(block: nn.Module, recipe: Recipe, routes: int) -> list[_Sized]:
    """The targets of a block, where each token is routed to so many experts."""
    found = []
    for name, layer in target_layers(block, recipe).items():
        place = place_of(block, name)
        rows, features = matrix_shape(layer)
        expert = name.rpartition(".")[0] if place else ""
        share = min(routes / len(place.experts), 1.0) if place else 1.0
        found.append(_Sized(features, rows, expert, share))
    return found


def _routes(model: nn.Module) -> int:
    """To how many experts each token is routed; more than there are where that is not said."""
    count = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    return count if isinstance(count, int) else sys.maxsize


def _grams(layers: Sequence[_Sized]) -> int:
    """Gram matrices of experts that are collected in one pass; those of one group aside."""
    sizes = [gram_bytes(layer.features) for layer in layers if layer.expert]
    return min(sum(sizes), MOST_GRAM) if sizes else 0


def _solver(layers: Sequence[_Sized]) -> int:
    """The most that a group of layers with one input takes; those as wide count as one group."""
    rows: Counter[tuple[int, str]] = Counter()
    for layer in layers:
        rows[layer.features, layer.expert] += layer.rows
    most = max(
        (
            k * k * (_SQUARE_DOUBLES * _DOUBLE + _SQUARE_FLOATS * _FLOAT)
            + n * k * _SOLVER_MATRICES * _FLOAT
            for (k, _), n in rows.items()
        ),
        default=0,
    )
    return most + _grams(layers)
