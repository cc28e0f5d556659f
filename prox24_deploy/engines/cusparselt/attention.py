"""Attention of torch, without masks and copies that only a padded batch would need.

A mask that hides nothing but the future keeps torch from its fastest kernels, and transformers
makes one whenever a model is traced. Here rows without padding get none.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "prox24_sdpa"


def use_fast_attention(model: nn.Module) -> None:
    """Let a model attend as this module says, in place.

    Models with another attention than that of torch stay as they are.
    """
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = _NAME


def _mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask of transformers; none where rows are not padded and see all, or all before them."""
    everywhere = local_size is None or kv_length < local_size
    causal = allow_is_causal_skip and q_length == kv_length
    if attention_mask is None and everywhere and (causal or allow_is_bidirectional_skip):
        return None
    found: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of torch; query heads of one token that share keys become rows of one product.

    Where there is a mask, transformers repeats keys and values for every query head under
    torch.compile, which takes more time than the attention of one token.
    """
    groups = int(getattr(module, "num_key_value_groups", 1))
    batch, heads, tokens, size = query.shape
    if tokens != 1 or groups == 1 or options.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    rows = query.reshape(batch, heads // groups, groups, size)
    mixed = functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(batch, 1, heads, -1), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
