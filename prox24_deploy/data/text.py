"""Calibration and evaluation text: read it, split it, turn it into token batches."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.records import TextSource
from prox24_deploy.data.fields import Fields
from prox24_deploy.data.tables import read_table
from prox24_deploy.data.text_files import Record, mended, read_records
from prox24_deploy.data.tokens import enough_of, truncated
from prox24_deploy.model.batch import Batch, Samples, pad_rows, padding_id
from prox24_deploy.model.tokenizing import ids_of

log = logging.getLogger(__name__)

MIN_TOKENS = 1024
_HELD_OUT_SHARE = 0.2
# Tokens per forward pass, padding included, and per step of block reconstruction.
BATCH_TOKENS = 2048
_SHORTEST_BUILTIN = 60
# Of all files together, in characters: what is read at least, and for each token that is asked for.
_LEAST_READ, _READ_PER_TOKEN = 2**25, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Documents before tokenisation.

    `targets` has what the user's file says that a decoder should make of each document, None where
    it says nothing; it is empty where there is no such file.
    """

    kind: Literal["file", "builtin", "split"]
    paths: tuple[str, ...]
    documents: tuple[str, ...]
    targets: tuple[object, ...] = ()

    @property
    def all_targets(self) -> tuple[object, ...]:
        """One for each document."""
        return self.targets or (None,) * len(self.documents)

    def behind(self, prompt: str) -> "Texts":
        """The same with a prompt in front of every document."""
        return replace(self, documents=tuple(prompt + document for document in self.documents))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How files of text are read: where texts stand in records, and how many characters."""

    fields: Fields = field(default_factory=Fields)
    most: int = _LEAST_READ


def characters_for(tokens: int) -> int:
    """More characters than so many tokens are made of, so that a large file is not read whole."""
    return max(_LEAST_READ, _READ_PER_TOKEN * tokens)


def read_texts(
    calibration: Sequence[Path],
    evaluation: Sequence[Path],
    seed: int,
    reading: Reading = Reading(),
) -> tuple[Texts, Texts]:
    """Return calibration and held-out documents.

    Of files with more than `reading.most` characters the first are read, of each file its share.

    Without `evaluation` the last fifth of the calibration documents is held out. Without
    `calibration` the English text of CPython's `pydoc_data.topics` is used, topics in seeded order,
    and the last fifth of the topics is held out, less what the others say too.

    Raises:
        CalibrationError: a file is missing, empty, not UTF-8 or not of the expected form.
        BackendMissingError: it is a Parquet table, and pyarrow is not installed.
    """
    if calibration:
        texts = _from_files(calibration, reading)
    else:
        texts, rest = _builtin_texts(seed)
        return texts, _from_files(evaluation, reading) if evaluation else rest
    if evaluation:
        return texts, _from_files(evaluation, reading)
    cut = len(texts.documents) - max(1, round(len(texts.documents) * _HELD_OUT_SHARE))
    if cut < 1:
        raise CalibrationError(
            f"Calibration text {', '.join(texts.paths)} has {len(texts.documents)} paragraph or "
            "JSON record (paragraphs end at blank lines), expected at least 2 so that some can be "
            "held out; add text, put blank lines between paragraphs, or give build --evaluation."
        )
    kept = Texts(
        kind=texts.kind,
        paths=texts.paths,
        documents=texts.documents[:cut],
        targets=texts.targets[:cut],
    )
    return kept, Texts(
        kind="split",
        paths=texts.paths,
        documents=texts.documents[cut:],
        targets=texts.targets[cut:],
    )


def make_samples(
    texts: Texts, tokenizer: Any, recipe: Recipe, *, tokens: int, max_length: int
) -> Samples:
    """Tokenise documents in order until `tokens` real tokens are reached.

    A causal language model gets documents concatenated, each with its start token, and cut into
    windows of `max_length`; any other model gets one sample per document, truncated, batched with
    others of similar length.

    Raises:
        CalibrationError: the text gives fewer than 1024 tokens or not one whole window.
    """
    if recipe.kind.decoder_alone:
        rows = _windows(texts.documents, tokenizer, tokens, max_length)
    else:
        rows = _documents(texts.documents, tokenizer, tokens, max_length)
    total = sum(len(row) for row in rows)
    require_tokens(texts, total)
    names = [spec.name for spec in recipe.inputs]
    batches = tuple(_batches(rows, names, padding_id(tokenizer)))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Samples(
        batches=batches,
        source=TextSource(
            kind=texts.kind, paths=texts.paths, sha256=digest, samples=len(rows), tokens=total
        ),
    )


def require_tokens(texts: Texts, total: int) -> None:
    """Refuse text that gives too few tokens to calibrate on.

    Raises:
        CalibrationError: there are fewer than 1024.
    """
    if total < MIN_TOKENS:
        where = " in the fifth of it that is held out" if texts.kind == "split" else ""
        raise CalibrationError(
            f"Text {', '.join(texts.paths)} gives {total} usable tokens{where}, expected at least "
            f"{MIN_TOKENS}{_one_paragraph(texts)}; pass more text."
        )


def _one_paragraph(texts: Texts) -> str:
    """Why a file of many lines may give few tokens, or nothing."""
    if len(texts.documents) != 1 or "\n" not in texts.documents[0]:
        return ""
    return ", and it is 1 paragraph or JSON record (paragraphs end at blank lines)"


def thin(samples: Samples, tokens: int) -> tuple[Batch, ...]:
    """About `tokens` real tokens, taken as evenly spaced batches so that all lengths are met."""
    step = max(1, round(samples.source.tokens / max(tokens, 1)))
    return samples.batches[::step]


def _from_files(paths: Sequence[Path], reading: Reading) -> Texts:
    share = replace(reading, most=-(-reading.most // len(paths)))
    pairs = [pair for path in paths for pair in _documents_of(path, share)]
    documents, targets = zip(*pairs, strict=True)
    return Texts(
        kind="file", paths=tuple(str(path) for path in paths), documents=documents, targets=targets
    )


def _documents_of(path: Path, reading: Reading) -> list[tuple[str, object]]:
    """Documents of a file, each with its target or None."""
    wanted = partial(reading.fields.wanted, str(path))
    records = read_table(path, wanted) or read_records(path, reading.most)
    documents = _documents_in(path, records, reading)
    if not documents:
        raise CalibrationError(f"Text {path} is empty; pass a file with paragraphs of text.")
    return documents


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _documents_in(
    path: Path, records: Iterable[Record], reading: Reading
) -> list[tuple[str, object]]:
    """Documents and targets of records, with a word about what had to be mended in them."""
    documents: list[tuple[str, object]] = []
    damaged: list[str] = []
    left = reading.most
    for record in records:
        document, target = reading.fields.read(path, record)
        whole = mended(document), mended(target) if isinstance(target, str) else target
        if whole != (document, target):
            damaged.append(record.where)
        if document.strip():
            documents.append((whole[0].strip(), whole[1]))
        left -= len(document) + (len(target) if isinstance(target, str) else 0)
        if left <= 0:
            log.info("of %s the first %d documents are read, which are enough", path, record.number)
            break
    if damaged:
        log.warning(
            "%s holds half of a surrogate pair in %d records, first in %s; each half was replaced "
            "by U+FFFD.", path, len(damaged), damaged[0],
        )  # fmt: skip
    return documents


def _builtin_texts(seed: int) -> tuple[Texts, Texts]:
    """Paragraphs of four fifths of the topics, and those of the others that are not among them."""
    from pydoc_data.topics import topics

    order = sorted(topics)
    random.Random(seed).shuffle(order)
    cut = len(order) - round(len(order) * _HELD_OUT_SHARE)
    # Topics repeat each other's paragraphs; a dict keeps each once, in order.
    calibration, held_out = (
        dict.fromkeys(part for name in names for part in _squeezed_paragraphs(topics[name]))
        for names in (order[:cut], order[cut:])
    )
    source = ("pydoc_data.topics",)
    others = tuple(part for part in held_out if part not in calibration)
    return Texts(kind="builtin", paths=source, documents=tuple(calibration)), Texts(
        kind="split", paths=source, documents=others
    )


def _squeezed_paragraphs(text: str) -> list[str]:
    squeezed = (re.sub(r"\s+", " ", part) for part in _paragraphs(text))
    return [part for part in squeezed if len(part) >= _SHORTEST_BUILTIN]


def _windows(documents: Sequence[str], tokenizer: Any, tokens: int, length: int) -> list[list[int]]:
    start = tokenizer.bos_token_id
    stream: list[int] = []
    for document in documents:
        if len(stream) >= max(tokens, length):
            break
        part = enough_of(document, tokenizer, max(tokens, length) - len(stream))
        encoded = ids_of(part, tokenizer)
        if start is not None and (not encoded or encoded[0] != start):
            encoded.insert(0, start)
        stream.extend(encoded)
    usable = min(len(stream), max(tokens, length)) // length
    return [stream[i * length : (i + 1) * length] for i in range(usable)]


def _documents(
    documents: Sequence[str], tokenizer: Any, tokens: int, length: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    total = 0
    for document in documents:
        if total >= tokens:
            break
        rows.append(truncated(document, tokenizer, length))
        total += len(rows[-1])
    return rows


def _batches(rows: list[list[int]], names: Sequence[str], padding: int) -> Iterator[Batch]:
    """Batches of at most `BATCH_TOKENS` padded tokens, rows in order of length."""
    ordered = sorted(rows, key=len)
    group: list[list[int]] = []
    for row in ordered:
        if group and (len(group) + 1) * len(row) > BATCH_TOKENS:
            yield pad_rows(group, names, padding)
            group = []
        group.append(row)
    if group:
        yield pad_rows(group, names, padding)
