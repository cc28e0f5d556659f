"""Text that a language model writes itself, to be trained or calibrated on.

Each row is sampled from the model's own distribution, token by token from the start token, whatever
its generation_config.json says of temperature and the like: what the model finds likely is what it
was trained on, so that no text of others is needed.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.recovery import WrittenText
from prox24_deploy.core.types import Progress
from prox24_deploy.data.text import BATCH_TOKENS
from prox24_deploy.model.batch import Batch, Samples, pad_rows
from prox24_deploy.model.checkpoint import write_tensors

log = logging.getLogger(__name__)

# A row is dropped if it is shorter, or shorter than the window where that is less, if one token
# makes up more than this share of it, or if less than this share of its sequences of four tokens
# are different ones.
SHORTEST = 16
MOST_OF_ONE = 0.5
LEAST_DIFFERENT = 0.5
# Memory for keys and values while rows are written, on a GPU as a share of all, and rows at once.
_CACHE_BYTES, _CACHE_SHARE = 4 * 2**30, 8
_MOST_ROWS = {"cuda": 2048, "cpu": 32}
_TIMED = 32
# Between seeds; a generator on a CPU looks at the lower 32 bits alone.
_SPREAD, _SEEDS = 1_000_003, 2**32
# First batch of the text to be trained on. What a model is pruned on begins at 0, and some of it is
# withheld to tell what training is worth.
FIRST_TO_LEARN = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """A model that writes.

    Attributes:
        model: a decoder of transformers.
        start: the token that every text begins with.
        ends: tokens that a text ends with; where the start token is one of them, the model goes on
            with its next text, as it does in the windows that it was calibrated on.
        length: tokens of a row at most.
        seed: of what is drawn.
        folder: where batches are kept, so that a killed run does not write them again.
        first: index of the first batch: texts of one seed that begin far apart share nothing.
    """

    model: nn.Module
    start: int
    ends: frozenset[int]
    length: int
    seed: int
    folder: Path
    first: int = 0

    @property
    def rows(self) -> int:
        """How many are written at once."""
        most = _MOST_ROWS.get(self._device.type, _MOST_ROWS["cpu"])
        limit = _CACHE_BYTES
        if self._device.type == "cuda":
            limit = torch.cuda.get_device_properties(self._device).total_memory // _CACHE_SHARE
        fitting = limit // max(1, _cache_bytes(self.model, self._dtype) * self.length)
        return max(1, min(most, fitting))

    def keeping(self, texts: Path, sha256: str) -> "Author":
        """The same, with its batches under the hash of all that they depend on.

        `sha256` is that of the directory of the model.
        """
        known = {
            "model": sha256,
            "start": self.start,
            "length": self.length,
            "seed": self.seed,
            "rows": self.rows,
            "device": self._device.type,
            "dtype": str(self._dtype),
            "torch": str(torch.__version__),
        }
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        return replace(self, folder=texts / f"written-{digest[:16]}")

    def write(self, index: int) -> list[list[int]]:
        """Rows of one batch, (rows,) lists with the start token first; the same every time."""
        path = self.folder / f"written-{index:05d}.safetensors"
        if (known := _load(path)) is not None:
            return self._cut(known)
        with self._writing():
            rows = self._sample(index, self.length).cpu()
        make_folder(self.folder)
        write_tensors(path, {"rows": rows.int()}, {"format": "pt"})
        return self._cut(rows)

    def seconds_per_token(self) -> float:
        """How long a token takes, by the first few of a batch; those of another warm up."""
        length = min(_TIMED, self.length)
        with self._writing():
            self._sample(0, length).cpu()
            began = time.perf_counter()
            for row in self._sample(0, length).tolist():
                is_degenerate(row)
            seconds = time.perf_counter() - began
        return seconds / (length * self.rows)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        """In which it writes: its own, but on a GPU no longer one than training computes in."""
        own = next(self.model.parameters()).dtype
        return torch.bfloat16 if self._device.type == "cuda" and own == torch.float32 else own

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Let the model have weights of `_dtype`."""
        dtype, own = self._dtype, [(each, each.data) for each in self.model.parameters()]
        try:
            for parameter, data in own:
                parameter.data = data.to(dtype)
            yield
        finally:
            for parameter, data in own:
                parameter.data = data

    @torch.no_grad()
    def _sample(self, index: int, length: int) -> Tensor:
        """(rows, length) tokens; what follows an end means nothing."""
        generator = torch.Generator(self._device).manual_seed(
            (_SPREAD * self.seed + index) % _SEEDS
        )
        token = torch.full((self.rows, 1), self.start, device=self._device)
        rows, cache = [token], None
        for _ in range(length - 1):
            result: Any = self.model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            chances = result.logits[:, -1].float().softmax(-1)
            token = torch.multinomial(chances, 1, generator=generator)
            rows.append(token)
        return torch.cat(rows, dim=1)

    def _cut(self, rows: Tensor) -> list[list[int]]:
        """Rows up to and with the first end, unless that is where the next text starts."""
        if self.start in self.ends or not self.ends:
            whole: list[list[int]] = rows.tolist()
            return whole
        found = []
        for row in rows.tolist():
            end = next((i for i, token in enumerate(row) if i and token in self.ends), len(row))
            found.append(row[: end + 1])
        return found


def author_of(
    model: nn.Module, tokenizer: Any, *, length: int, seed: int, folder: Path, first: int = 0
) -> Author | None:
    """The model as an author; None where nothing says which token a text starts with."""
    config: Any = model.config
    ends = _ids(tokenizer.eos_token_id) | _ids(config.eos_token_id)
    start = start_token(tokenizer, {"bos_token_id": config.bos_token_id})
    if start is None:
        return None
    return Author(
        model=model,
        start=start,
        ends=frozenset(ends),
        length=length,
        seed=seed,
        folder=folder,
        first=first,
    )


def start_token(tokenizer: Any, config: Mapping[str, Any]) -> int | None:
    """The token that a text starts with, by the tokenizer or config.json; None if neither says."""
    starts = (tokenizer.bos_token_id, config.get("bos_token_id"), tokenizer.eos_token_id)
    return next((int(token) for token in starts if token is not None), None)


def is_degenerate(row: Sequence[int], shortest: int = SHORTEST) -> bool:
    """Whether a row is too short, or repeats itself, too much to learn from."""
    if len(row) < shortest:
        return True
    (_, most), *_ = Counter(row).most_common(1)
    fours = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
    return most > MOST_OF_ONE * len(row) or len(set(fours)) < LEAST_DIFFERENT * len(fours)


def write_text(
    author: Author, tokens: int, names: Sequence[str], padding: int, progress: Progress
) -> tuple[tuple[Batch, ...], WrittenText]:
    """Let a model write until there are `tokens` tokens in whole windows of its length.

    Rows that occur twice or are degenerate are dropped; so that this ends, no more than twice the
    rows that could do are written.

    Args:
        author: who writes.
        tokens: how many.
        names: of the inputs of the model.
        padding: the token on padding.
        progress: told of tokens.

    Returns:
        Batches of a row of windows each, and how much was written and kept.
    """
    kept: dict[tuple[int, ...], None] = {}
    written, size, index = 0, 0, author.first
    while size < tokens and written * author.length < 2 * tokens + author.rows * author.length:
        progress("write text", min(size, tokens), tokens)
        for row in author.write(index):
            written += 1
            if tuple(row) not in kept and not is_degenerate(row, min(SHORTEST, author.length)):
                kept[tuple(row)] = None
                size += len(row)
        index += 1
    progress("write text", tokens, tokens)
    stream = [token for row in kept for token in row][: max(tokens, author.length)]
    length = author.length
    windows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    log.info("the dense model wrote %d rows, of which %d are used", written, len(kept))
    record = WrittenText(
        written=written,
        samples=len(kept),
        tokens=len(windows) * length,
        sha256=hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
    )
    return tuple(pad_rows([window], names, padding) for window in windows), record


def write_calibration(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    *,
    length: int,
    seed: int,
    kept: Path,
    out: Path,
    progress: Progress,
) -> WrittenText:
    """Let a model write `tokens` tokens into the file `out`, as (windows, length) int32.

    Args:
        model: a decoder, whose tokenizer or configuration says how a text starts.
        tokenizer: its own.
        tokens: how many; less where too much of it is dropped, see `write_text`.
        length: of a window.
        seed: of what is drawn.
        kept: folder of batches that an interrupted run has written.
        out: the file; its folder is made.
        progress: told of tokens.

    Raises:
        ValueError: nothing says how a text starts.
    """
    author = author_of(model, tokenizer, length=length, seed=seed, folder=kept)
    if author is None:
        raise ValueError(
            "neither tokenizer nor configuration names a token that a text starts with"
        )
    batches, record = write_text(author, tokens, ["input_ids"], 0, progress)
    rows = [batch.inputs["input_ids"] for batch in batches]
    make_folder(out.parent)
    whole = torch.cat(rows) if rows else torch.zeros(0, length)
    write_tensors(out, {"tokens": whole.int()}, {"format": "pt"})
    return record


def read_written(path: Path, recipe: Recipe, record: WrittenText) -> Samples:
    """Samples of what `write_calibration` wrote into a file, in batches as of any other text."""
    with safe_open(path, framework="pt") as handle:
        windows: Tensor = handle.get_tensor("tokens")
    names = [spec.name for spec in recipe.inputs]
    at_once = max(1, BATCH_TOKENS // windows.shape[1])
    return Samples(
        batches=tuple(pad_rows(rows.tolist(), names, 0) for rows in windows.split(at_once)),
        source=TextSource(
            kind="written", paths=(), sha256=record.sha256, samples=len(windows),
            tokens=windows.numel(),
        ),
    )  # fmt: skip


def _load(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            rows: Tensor = handle.get_tensor("rows")
            return rows
    except SafetensorError:
        # Damaged: writing it again loses only time.
        return None


def _ids(token: Any) -> set[int]:
    if token is None:
        return set()
    return {int(each) for each in token} if isinstance(token, list | tuple) else {int(token)}


def _cache_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token."""
    config: Any = model.config
    size = dtype.itemsize
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * size * int(config.num_hidden_layers) * groups * width
