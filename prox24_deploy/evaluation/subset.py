"""Some of the evaluation samples, in shapes that an engine accepts."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prox24_deploy.model.batch import IGNORED, Batch, Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShapes:
    """Most rows of a batch, and the least and the most tokens of a row, that an engine takes."""

    rows: int
    least: int
    longest: int


def take(samples: Samples, tokens: int, shapes: EngineShapes | None) -> tuple[Samples, int]:
    """Evenly spaced samples that add up to about `tokens`, and how many of them were cut.

    Samples are ordered by length, so that all lengths are met. At least two are taken where there
    are as many, for the standard error. With `shapes`, batches have no more rows than that, and
    texts are cut at the end or padded to a length in between.
    """
    source = samples.source
    step = math.ceil(source.tokens * source.modality.tokens / tokens)
    step = max(1, min(step, (source.samples + 1) // 2))
    batches: list[Batch] = []
    picked: list[Tensor] = []
    first = cut = 0
    for batch in samples.batches:
        count = len(batch.real)
        rows = torch.arange(min(-first % step, count), count, step)
        picked.append(rows + first)
        first += count
        if not len(rows):
            continue
        for part in rows.split(shapes.rows if shapes else count):
            chosen = _trimmed(_rows(batch, part))
            if shapes:
                cut += int(_too_long(chosen, shapes.longest).sum())
                chosen = _fitted(chosen, shapes)
            batches.append(chosen)
    labels = None if samples.labels is None else samples.labels[torch.cat(picked)]
    counted = sum(map(_tokens, batches))
    number = sum(len(batch.real) for batch in batches)
    return Samples(
        batches=tuple(batches),
        source=replace(source, samples=number, tokens=counted),
        labels=labels,
    ), cut


def behind_a_past(samples: Samples, steps: int) -> Samples:
    """Texts of which only what follows from their last `steps` tokens is to be predicted.

    All that a decoder beside an encoder writes counts, since its texts are of many lengths.
    """
    batches = tuple(_with_targets(batch, steps) for batch in samples.batches)
    targets = (batch.targets for batch in batches if batch.targets is not None)
    counted = sum(int((one != IGNORED).sum()) for one in targets)
    return replace(samples, batches=batches, source=replace(samples.source, tokens=counted))


def _with_targets(batch: Batch, steps: int) -> Batch:
    if batch.targets is not None:
        return batch
    ids = batch.inputs["input_ids"]
    targets = torch.full_like(ids, IGNORED)
    first = max(0, ids.shape[1] - 1 - steps)
    targets[:, first:-1] = ids[:, first + 1 :]
    return replace(batch, targets=targets)


def _rows(batch: Batch, rows: Tensor) -> Batch:
    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    targets = None if batch.targets is None else batch.targets[rows]
    return Batch(inputs, batch.real[rows], targets)


def _trimmed(batch: Batch) -> Batch:
    """Without the columns that are padding in every row that was kept."""
    targets = None if batch.targets is None else _width(batch.targets != IGNORED)
    return _columns(batch, _width(batch.real) if batch.has_padding else None, targets)


def _fitted(batch: Batch, shapes: EngineShapes) -> Batch:
    """Cut and padded on the right to a length that `shapes` allow."""
    targets = None if batch.targets is None else min(batch.targets.shape[1], shapes.longest)
    if not batch.has_padding:
        return _columns(batch, None, targets)
    cut = _columns(batch, min(batch.real.shape[1], shapes.longest), targets)
    missing = shapes.least - cut.real.shape[1]
    if missing <= 0:
        return cut
    inputs = {
        name: tensor if name.startswith("decoder_") else _padded(tensor, missing)
        for name, tensor in cut.inputs.items()
    }
    return replace(cut, inputs=inputs, real=_padded(cut.real, missing))


def _columns(batch: Batch, width: int | None, target_width: int | None) -> Batch:
    """The first columns of a text and of its target; None is all of them."""
    inputs = {
        name: _first(tensor, target_width if name.startswith("decoder_") else width)
        for name, tensor in batch.inputs.items()
    }
    targets = None if batch.targets is None else _first(batch.targets, target_width)
    return Batch(inputs, _first(batch.real, width), targets)


def _first(tensor: Tensor, width: int | None) -> Tensor:
    return tensor if width is None else tensor[:, :width]


def _padded(tensor: Tensor, missing: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, missing))


def _width(real: Tensor) -> int:
    """Columns up to the last one that is real in any row."""
    return int(real.any(0).nonzero().max()) + 1


def _too_long(batch: Batch, longest: int) -> Tensor:
    lengths = batch.real.sum(1) if batch.has_padding else torch.zeros(len(batch.real))
    if batch.targets is not None:
        lengths = torch.maximum(lengths, (batch.targets != IGNORED).sum(1))
    return lengths > longest


def _tokens(batch: Batch) -> int:
    own = int(batch.real.sum())
    return own if batch.targets is None else own + int((batch.targets != IGNORED).sum())
