"""What a model reads at once, and all that it is calibrated or judged on."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from prox24_deploy.core.fingerprint import fingerprint
from prox24_deploy.core.records import TextSource

# Marks a position of `Batch.targets` where nothing is expected; torch's own sign for that.
IGNORED = -100
# Of so many batches one is withheld, to choose by.
WITHHELD = 8
# Values of the smallest patches in use: 8 by 8 pixels of three colours.
_PATCH = 192


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: model inputs and which positions are real.

    Attributes:
        inputs: name to tensor: (batch, sequence) int64, or pixels (batch, channels, height, width),
            or features of recordings (batch, mels, frames).
        real: (batch, sequence) bool, False on padding; (batch,) for images and recordings, which
            have none.
        targets: (batch, target) int64, the token that each position of a decoder beside an encoder
            should give, `IGNORED` on padding; None for any other model.
    """

    inputs: dict[str, Tensor]
    real: Tensor
    targets: Tensor | None = None

    @property
    def has_padding(self) -> bool:
        """Whether its samples are rows of tokens; images and recordings are all real."""
        return self.real.ndim == 2

    @property
    def positions(self) -> int:
        """Positions of hidden states, as far as the samples tell; those of an image are few."""
        if self.has_padding:
            return self.real.numel() + (0 if self.targets is None else self.targets.numel())
        values = max((tensor.numel() for tensor in self.inputs.values()), default=0)
        return math.ceil(values / _PATCH)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch."""
    return Batch(
        inputs={name: tensor[rows] for name, tensor in batch.inputs.items()},
        real=batch.real[rows],
        targets=None if batch.targets is None else batch.targets[rows],
    )


def withhold(batches: Sequence[Batch]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Batches to learn from, and every eighth to choose by; of a single one, its last samples."""
    if len(batches) == 1:
        kept = -(-len(batches[0].real) * (WITHHELD - 1) // WITHHELD) - 1
        return (rows_of(batches[0], slice(kept)),), (rows_of(batches[0], slice(kept, None)),)
    return tuple(b for i, b in enumerate(batches) if i % WITHHELD), tuple(batches[::WITHHELD])


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Batches and where their text, images or recordings came from.

    `labels` has the class of each image, (samples,) int64 in the order of the batches, where the
    user's folders tell. `transcripts` has what is said in each recording, None where nobody wrote
    that down.
    """

    batches: tuple[Batch, ...]
    source: TextSource
    labels: Tensor | None = None
    transcripts: tuple[str | None, ...] = ()

    def fingerprint(self) -> JsonValue:
        """All that a stage can see of them: every tensor, label and transcript, and the source."""
        tensors = {
            f"{i} {name}": tensor
            for i, batch in enumerate(self.batches)
            for name, tensor in _tensors_of(batch).items()
        }
        if self.labels is not None:
            tensors["labels"] = self.labels
        return {
            "tensors": _digest(tensors),
            "transcripts": list(self.transcripts),
            "source": fingerprint(self.source),
        }


def shared_samples(calibration: Samples, held_out: Samples) -> int:
    """How many held-out samples are among those to calibrate on, too, whatever their padding."""
    known = {*_contents(calibration)}
    return sum(each in known for each in _contents(held_out))


def _contents(samples: Samples) -> Iterator[bytes]:
    """Hash of what each sample is made of: its real tokens, or all of an image or a recording."""
    for batch in samples.batches:
        for row in range(len(batch.real)):
            digest = hashlib.sha256()
            for name in sorted(batch.inputs):
                tensor = batch.inputs[name]
                if not batch.has_padding:
                    digest.update(tensor[row].contiguous().numpy().tobytes())
                elif tensor.shape == batch.real.shape:
                    digest.update(tensor[row][batch.real[row]].numpy().tobytes())
            yield digest.digest()


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    known = {**batch.inputs, "real": batch.real}
    return known if batch.targets is None else known | {"targets": batch.targets}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def pad_rows(rows: list[list[int]], names: Sequence[str], padding: int) -> Batch:
    """One batch of rows of tokens, padded on the right, with the inputs of these names."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    known = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    return Batch({name: known[name] for name in names if name in known}, real)


def padding_id(tokenizer: Any) -> int:
    """The token that stands on padding."""
    # A tokenizer without padding still needs a number there; masked positions are never read.
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
