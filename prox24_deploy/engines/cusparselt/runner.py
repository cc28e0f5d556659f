"""What an engine runs of a model: prefill with and without padding, and steps of decoding.

Which of these it is shows in the shapes of the inputs, so that each gets a graph of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prox24_deploy.config.recipe import dynamic_names
from prox24_deploy.engines.base import Feeds
from prox24_deploy.engines.cusparselt import decode
from prox24_deploy.graph.export.module import RecipeModule

_IDS, _MASK = "input_ids", "attention_mask"


class EngineModule(nn.Module):
    """A model as its recipe says, which takes what `fit` makes of the inputs of the recipe.

    Rows without padding come with an empty mask, and are run without one.
    """

    def __init__(self, whole: RecipeModule) -> None:
        super().__init__()
        self.whole = whole
        self._decodes = "past" in dynamic_names(whole.signature.inputs)
        self._names = [spec.name for spec in whole.signature.inputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of the recipe; of a step with all slots of keys and values."""
        if self._decodes and decode.is_step(inputs):
            return decode.run_step(self.whole, inputs)
        named = dict(zip(self._names, inputs, strict=True))
        unpadded = _MASK in named and not named[_MASK].numel()
        outputs: tuple[Tensor, ...] = self.whole(*inputs, unpadded=unpadded)
        return outputs

    def fit(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `forward` takes, from the inputs of the recipe.

        Raises:
            EngineError: the rows of a step are padded, or its position is not behind its past.
        """
        named = dict(zip(self._names, given, strict=True))
        if self._decodes and (step := decode.fit_step(named)) is not None:
            return step
        if not _is_full(named):
            return given
        return tuple({**named, _MASK: named[_MASK].new_empty(0, 0)}.values())

    def trim(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs of the recipe, from what `forward` took and gave."""
        if self._decodes and decode.is_step(inputs):
            return decode.trim_step(inputs, outputs)
        return outputs


def padded(feeds: Feeds) -> Feeds | None:
    """The same inputs with the last token of the first row masked; None where no mask does that."""
    if not {_IDS, _MASK} <= feeds.keys() or feeds[_MASK].shape[1] < 2:
        return None
    mask = feeds[_MASK].copy()
    mask[0, -1] = 0
    return {**feeds, _MASK: mask}


def _is_full(named: Mapping[str, Tensor]) -> bool:
    """Whether these are whole texts, none of them padded."""
    if not {_IDS, _MASK} <= named.keys() or named[_MASK].shape != named[_IDS].shape:
        return False
    return bool(torch.all(named[_MASK] != 0))
