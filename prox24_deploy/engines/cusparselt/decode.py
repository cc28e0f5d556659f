"""One step of a decoder with its keys and values in static buffers, as a CUDA graph needs them.

The graph of a recipe takes the keys and values of all tokens before and gives those with the new
one: tensors that grow, and are copied in every step. Here they have slots to spare, the new token
is written into its slot in place, and attention is masked behind it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, StaticLayer

from prox24_deploy.core.errors import EngineError
from prox24_deploy.graph.export.module import RecipeModule

# Rows of keys that kernels of attention read at once.
_SLOT_MULTIPLE = 16


class Slots(StaticLayer):
    """Keys and values of one layer, (batch, heads, slots, size), as tensors that the caller holds.

    The layer of transformers counts its tokens itself; this one is told the `position`, (1,), of
    the new one, so that a step can be run again.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = self._slots = keys, values
        self._position = position
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new token into its slot; keys and values of all slots."""
        keys, values = self._slots
        keys.index_copy_(2, self._position, key_states)
        values.index_copy_(2, self._position, value_states)
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens before the new one, as a tensor without axes."""
        return self._position[0]


def run_step(whole: RecipeModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs of the recipe for one new token, with all slots of keys and values.

    Args:
        whole: the decoder.
        inputs: what `fit_step` made.
    """
    ids, position, *slots = inputs
    pairs = zip(slots[::2], slots[1::2], strict=True)
    cache = Cache(layers=[Slots(keys, values, position) for keys, values in pairs])
    filled = torch.arange(slots[0].shape[2], device=ids.device) <= position
    result = whole.wrapped(
        input_ids=ids,
        attention_mask=filled.long().expand(len(ids), -1),
        position_ids=position.expand(len(ids), 1),
        past_key_values=cache,
        use_cache=True,
    )
    own = [spec.name for spec in whole.signature.outputs if not spec.name.startswith("present.")]
    return (*(getattr(result, name) for name in own), *slots)


def is_step(inputs: Sequence[Tensor]) -> bool:
    """Whether these are inputs of a step: token ids, (batch, 1), then a position, (1,)."""
    return inputs[1].dim() == 1


def fit_step(named: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """Inputs of `run_step` from those of the recipe; None for what is no step.

    Raises:
        EngineError: the rows of a step are padded, or its position is not behind its past.
    """
    past = [one for name, one in named.items() if name.startswith("past_key_values.")]
    ids = named["input_ids"]
    count = past[0].shape[2]
    if ids.shape[1] != 1 or not count:
        return None
    padded = not bool(named["attention_mask"].all())
    elsewhere = "position_ids" in named and bool((named["position_ids"] != count).any())
    if padded or elsewhere:
        raise EngineError(
            "Backend 'cusparselt' decodes rows of equal length, but these are padded or their "
            f"position_ids are not {count}, behind the past; decode rows of one length at a time."
        )
    spare = -(count + 1) % _SLOT_MULTIPLE + 1
    slots = (functional.pad(one, (0, 0, 0, spare)) for one in past)
    return ids, torch.tensor([count], device=ids.device), *slots


def trim_step(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs of a step as the recipe has them: without the slots that hold no token yet."""
    filled, buffers = int(inputs[1]) + 1, len(inputs) - 2
    own, slots = outputs[: len(outputs) - buffers], outputs[len(outputs) - buffers :]
    return (*own, *(one[:, :, :filled] for one in slots))
