"""What a tokenizer makes of a text, and what it says of tokens; a failure is one of its files."""

from collections.abc import Sequence
from typing import Any

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.foreign import blamed


def ids_of(
    text: str,
    tokenizer: Any,
    *,
    most: int | None = None,
    special: bool = True,
    as_target: bool = False,
) -> list[int]:
    """The tokens that a tokenizer of transformers makes of a text.

    Args:
        text: any.
        tokenizer: of transformers.
        most: how many tokens are kept; None keeps all.
        special: whether those that begin or end a text are among them.
        as_target: whether the text is what a decoder is to write.

    Raises:
        ModelDirError: the tokenizer fails, as one that has no token for what it does not know.
    """
    asked: dict[str, Any] = {"text_target": text} if as_target else {"text": text}
    options = {} if most is None else {"truncation": True, "max_length": most}
    options |= {} if special else {"add_special_tokens": False}
    with blamed(lambda reason: _unusable(tokenizer, reason)):
        return list(tokenizer(**asked, **options)["input_ids"])


def text_of(ids: Sequence[int], tokenizer: Any) -> str:
    """What tokens say, without the special ones.

    Raises:
        ModelDirError: the tokenizer fails.
    """
    with blamed(lambda reason: _unusable(tokenizer, reason)):
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def _unusable(tokenizer: Any, reason: str) -> ModelDirError:
    return ModelDirError(
        f"The tokenizer of {tokenizer.name_or_path} cannot read or write a text ({reason}); "
        "restore tokenizer.json and tokenizer_config.json."
    )
