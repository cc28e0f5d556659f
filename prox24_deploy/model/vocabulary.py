"""Token ids that a model has no row in its embedding for, found before it is run on them."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.foreign import blamed
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.directory import ModelDir

# Keys of config.json whose tokens a model pads with, starts from or ends with.
_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def require_special_tokens(directory: ModelDir, tokenizer: Any) -> None:
    """Refuse a model whose tokenizer or configuration names a special token that it cannot embed.

    Raises:
        ModelDirError: names the token, its id and the size of the vocabulary.
    """
    size = _size(directory)
    for key in _KEYS if size else ():
        named = directory.config.get(key)
        for number in named if isinstance(named, list) else [named]:
            # A negative one counts from the end, and stands for none.
            if isinstance(number, int) and number >= size:
                raise ModelDirError(
                    f"{directory.path / 'config.json'} names {key} {number}, which lies outside "
                    f"the embedding of vocab_size {size}; correct it."
                )
    # One that is its own substitute is looked for without an end.
    with blamed(partial(_no_special_ids, directory)):
        special = tokenizer.all_special_ids
    _require(directory, tokenizer, special)


def _no_special_ids(directory: ModelDir, reason: str) -> ModelDirError:
    return ModelDirError(
        f"The special tokens of {directory.path} cannot be looked up ({reason}); correct "
        "tokenizer_config.json."
    )


def require_embedded(directory: ModelDir, tokenizer: Any, batches: Iterable[Batch]) -> None:
    """Refuse samples with a token that the model cannot embed.

    Raises:
        ModelDirError: names the token, its id and the size of the vocabulary.
    """
    _require(directory, tokenizer, _largest_ids(batches))


def _require(directory: ModelDir, tokenizer: Any, ids: Iterable[int | None]) -> None:
    size = _size(directory)
    for number in ids if size else ():
        if number is None:
            raise ModelDirError(
                f"The tokenizer of {directory.path} names a special token that its vocabulary does "
                "not hold; correct tokenizer_config.json."
            )
        if number >= size:
            token = tokenizer.convert_ids_to_tokens(number)
            raise ModelDirError(
                f"The tokenizer of {directory.path} gives token {token!r} the id {number}, which "
                f"lies outside the embedding of vocab_size {size}; pass the tokenizer that the "
                "model was trained with, or add rows to the model with resize_token_embeddings."
            )


def _size(directory: ModelDir) -> int:
    """Rows of the embedding; 0 where the configuration does not say, as for images."""
    part = directory.config.get("text_config")
    found = directory.config.get("vocab_size") or (
        part.get("vocab_size") if isinstance(part, dict) else None
    )
    return found if isinstance(found, int) else 0


def _largest_ids(batches: Iterable[Batch]) -> Iterator[int]:
    for batch in batches:
        read = [ids for name, ids in batch.inputs.items() if name.endswith("input_ids")]
        for ids in [*read, *([] if batch.targets is None else [batch.targets])]:
            yield int(torch.max(ids))
