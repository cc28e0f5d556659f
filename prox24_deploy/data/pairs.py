"""Text and targets to batches of an encoder-decoder.

The encoder reads a text. The decoder is forced along the target (teacher forcing): it is fed the
target shifted by one behind its start token, and each position should give the next token. Text
without a target is its own target, so that a model can be calibrated on plain text; the layers of
the decoder then see it write what the encoder has read.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.documents import Document, read_object
from prox24_deploy.core.errors import CalibrationError, ModelDirError
from prox24_deploy.core.records import TextSource
from prox24_deploy.data.text import BATCH_TOKENS, Texts, require_tokens
from prox24_deploy.data.tokens import truncated
from prox24_deploy.model.batch import IGNORED, Batch, Samples, pad_rows, padding_id
from prox24_deploy.model.directory import ModelDir

_START = "decoder_start_token_id"
# Beyond every vocabulary, and within what a tensor of tokens holds.
_MOST_ID = 2**31


@dataclass(frozen=True, slots=True)
class _Pair:
    """Tokens of a text and of its target."""

    text: list[int]
    target: list[int]

    @property
    def width(self) -> int:
        """Positions that it takes in the wider of the two."""
        return max(len(self.text), len(self.target))


def start_token(directory: ModelDir) -> int:
    """The token that the decoder of a model starts from.

    Raises:
        ModelDirError: neither config.json nor generation_config.json names it, or as no token.
    """
    file = directory.path / "generation_config.json"
    generation: dict[str, Any] = {}
    if file.is_file():
        document = Document(str(file), ModelDirError, "restore it")
        generation = read_object(file, document, finite=False)
    found = directory.config.get(_START)
    found = generation.get(_START) if found is None else found
    if not isinstance(found, int) or not 0 <= found < _MOST_ID:
        raise ModelDirError(
            f"Model directory {directory.path} names no {_START} ({found!r}), from which its "
            "decoder starts; add it to config.json."
        )
    return found


def make_pairs(
    texts: Texts, tokenizer: Any, recipe: Recipe, *, tokens: int, max_length: int, start: int
) -> Samples:
    """Tokenise texts and targets in order until `tokens` real tokens of both are reached.

    Each text and each target is truncated to `max_length`; batches hold pairs of similar length.

    Raises:
        CalibrationError: there are fewer than 1024 tokens, or a target is not a text.
    """
    pairs: list[_Pair] = []
    total = own = 0
    for document, target in zip(texts.documents, texts.all_targets, strict=True):
        if total >= tokens:
            break
        wanted = document if target is None else _as_text(target, len(pairs), texts)
        text = truncated(document, tokenizer, max_length)
        pairs.append(_Pair(text, truncated(wanted, tokenizer, max_length, as_target=True)))
        total += len(pairs[-1].text) + len(pairs[-1].target)
        own += target is not None
    require_tokens(texts, total)
    names = [spec.name for spec in recipe.inputs]
    batches = tuple(_batches(pairs, names, padding_id(tokenizer), start))
    digest = hashlib.sha256(json.dumps([[p.text, p.target] for p in pairs]).encode()).hexdigest()
    source = TextSource(
        kind=texts.kind,
        paths=texts.paths,
        sha256=digest,
        samples=len(pairs),
        tokens=total,
        targets=own,
    )
    return Samples(batches=batches, source=source)


def _as_text(target: object, number: int, texts: Texts) -> str:
    if not isinstance(target, str) or not target.strip():
        raise CalibrationError(
            f"Text {', '.join(texts.paths)}: the target of sample {number + 1} is {target!r}, "
            'expected text; write {"text": "...", "target": "..."} per line, or no target at all.'
        )
    return target.strip()


def _batches(pairs: list[_Pair], names: list[str], padding: int, start: int) -> Iterator[Batch]:
    """Batches of at most `BATCH_TOKENS` padded tokens on either side, in order of width."""
    group: list[_Pair] = []
    for pair in sorted(pairs, key=lambda each: each.width):
        if group and (len(group) + 1) * pair.width > BATCH_TOKENS:
            yield _batch(group, names, padding, start)
            group = []
        group.append(pair)
    yield _batch(group, names, padding, start)


def _batch(pairs: list[_Pair], names: list[str], padding: int, start: int) -> Batch:
    batch = pad_rows([pair.text for pair in pairs], names, padding)
    fed = [[start, *pair.target[:-1]] for pair in pairs]
    decoder_ids = pad_rows(fed, ["input_ids"], padding).inputs["input_ids"]
    width = decoder_ids.shape[1]
    targets = [pair.target + [IGNORED] * (width - len(pair.target)) for pair in pairs]
    inputs = batch.inputs | {"decoder_input_ids": decoder_ids}
    return replace(batch, inputs=inputs, targets=torch.tensor(targets))
