"""What a model of speech writes of recordings, and how much of it the pruned model gets wrong."""

from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.foreign import blamed


def start_tokens(model: nn.Module, features: Tensor) -> list[list[int]]:
    """What a model starts from on each recording: start token, and language and task if it has any.

    Args:
        model: of transformers.
        features: (recordings, mels, frames).

    Raises:
        ModelDirError: the generation_config.json of the model does not fit it.
    """
    found: list[list[int]] = _generate(model, features, 1)[:, :-1].tolist()
    return found


def write_down(model: nn.Module, features: Tensor) -> list[list[int]]:
    """Tokens that a model writes greedily of each recording, up to and with its end token.

    Other arguments and errors are those of `start_tokens`. As many tokens are written as the model
    has positions; a recording of which more would be written has no end token.
    """
    settings: Any = model.config
    start = len(start_tokens(model, features)[0])
    with blamed(lambda reason: _silent(model, reason)):
        room = int(settings.max_target_positions) - start
        ends = torch.as_tensor(model.generation_config.eos_token_id).flatten()  # type: ignore[union-attr]
    rows = _generate(model, features, room)[:, start:].cpu()
    found = []
    for row in rows:
        ended = torch.isin(row, ends).nonzero()
        found.append(row[: int(ended[0]) + 1 if len(ended) else None].tolist())
    return found


@torch.no_grad()
def _generate(model: nn.Module, features: Tensor, tokens: int) -> Tensor:
    device = next(model.parameters()).device
    with blamed(lambda reason: _silent(model, reason)):
        found: Tensor = model.generate(  # type: ignore[operator]  # a transformers model
            features.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            return_timestamps=False,
            # Gives what the decoder started from, too.
            force_unique_generate_call=True,
        )
        return found


def _silent(model: nn.Module, reason: str) -> ModelDirError:
    return ModelDirError(
        f"The {type(model).__name__} cannot write down a recording ({reason}); restore its "
        "config.json and generation_config.json."
    )
