"""Adapt a Hugging Face module to the graph that a recipe describes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from prox24_deploy.config.recipe import EMBEDDING, SENTENCE_MODULES, STATES, Recipe
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.signature import cached_layers, signature_of

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Convert = Callable[[str, torch.Tensor], torch.Tensor]
# Gives back the same tensor, in another place.
Keep = Callable[[torch.Tensor], torch.Tensor]


class RecipeModule(nn.Module):
    """Calls a model with the inputs of its signature, in order, and returns the outputs.

    Of an encoder-decoder it calls the half that the recipe, a part of one, describes. Its decoder
    starts every call with an empty cache of the cross-attention, so the states of the encoder are
    projected anew each time. Where the model has modules that embed texts, under the name
    `SENTENCE_MODULES`, they make the output `sentence_embedding`.

    The model sits under the attribute `wrapped`, so each of its module paths has the prefix
    "wrapped." in the exported graph.
    """

    PREFIX = "wrapped."

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.wrapped = model
        self.signature = signature_of(recipe, model)
        self._inputs = [spec.name for spec in recipe.inputs]
        self._outputs = [spec.name for spec in recipe.outputs]
        self._cache = recipe.cache
        self._recipe = recipe
        self._graph = recipe.graph
        # Without this a decoder returns its key/value cache as a second, unasked-for result.
        generates = recipe.cache or recipe.kind.decoder_alone
        self._options = {"use_cache": recipe.cache} if generates else {}

    def forward(self, *inputs: torch.Tensor, unpadded: bool = False) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the recipe in its order, then keys and values of each layer.

        Args:
            inputs: those of the signature, in order.
            unpadded: run without an attention mask; whatever is given for it is not looked at.

        Raises:
            ExportError: the model has no output of that name.
        """
        count = len(self._inputs)
        feeds: dict[str, Any] = dict(zip(self._inputs, inputs[:count], strict=True))
        if self._cache:
            past = inputs[count:]
            feeds["past_key_values"] = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            if "attention_mask" in feeds and not unpadded:
                _tie_lengths(feeds["attention_mask"], feeds["input_ids"], past[0])
        if unpadded:
            feeds["attention_mask"] = torch.ones_like(feeds["input_ids"])
        result = self._run({**feeds, "attention_mask": None} if unpadded else feeds)
        outputs = [self._output(result, name, feeds) for name in self._outputs]
        for layer in cached_layers(result) if self._cache else ():
            outputs += [layer.keys, layer.values]
        return tuple(outputs)

    def with_weights(self, convert: "Convert") -> "RecipeModule":
        """The same around a copy of the model with converted weights, see `copy_with`."""
        return RecipeModule(copy_with(self.wrapped, convert), self._recipe).eval()

    def _run(self, feeds: dict[str, Any]) -> object:
        """Call the model, or the half of it that the graph is."""
        if self._graph == "encoder":
            return self.wrapped.get_encoder()(**feeds)  # type: ignore[operator]
        if self._graph == "decoder":
            feeds = _decoder_feeds(feeds)
        return self.wrapped(**feeds, **self._options)

    def _output(self, result: object, name: str, feeds: dict[str, Any]) -> torch.Tensor:
        modules = getattr(self.wrapped, SENTENCE_MODULES, None)
        if name != EMBEDDING or modules is None:
            return _output(result, name)
        hidden = _output(result, "last_hidden_state")
        embedding: torch.Tensor = modules(hidden, feeds["attention_mask"])
        return embedding


def copy_with(model: nn.Module, convert: Convert) -> nn.Module:
    """Copy the structure of `model` in eval mode, with converted weights.

    `convert` gets the name and value of every floating parameter and persistent buffer; where it
    returns its argument, the copy shares that tensor with `model`, so an identity costs no memory.
    Ties are kept. Other buffers (tables such as rotary frequencies, which `from_pretrained` leaves
    in float32 too) are shared unconverted.
    """
    memo: dict[int, object] = {}
    stored = model.state_dict(keep_vars=True).keys()
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = _converted_parameter(name, parameter, convert)
    for name, buffer in model.named_buffers():
        converts = name in stored and buffer.is_floating_point()
        memo[id(buffer)] = convert(name, buffer) if converts else buffer
    copy: nn.Module = deepcopy(model, memo)
    return copy.eval()


def kept_by(keep: Keep | None, convert: Convert) -> Convert:
    """The same conversion, with what it makes kept elsewhere than in memory, if it is to be."""
    if keep is None:
        return convert

    def converted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = convert(name, tensor)
        return tensor if made is tensor else keep(made)

    return converted


def to_dtype(dtype: DType) -> Convert:
    """Conversion of weights to `dtype` that refuses to overflow.

    The conversion raises ExportError, naming the tensor, if a finite value becomes infinite.
    """
    target = TORCH_DTYPES[dtype]

    def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
        converted = tensor.detach().to(target)
        if converted.dtype == tensor.dtype:
            return tensor
        if bool((converted.isinf() & tensor.isfinite()).any()):
            largest = tensor.detach().abs().max().item()
            raise ExportError(
                f"Weight {name} does not fit {dtype}: its largest magnitude is {largest:g}, the "
                f"limit {torch.finfo(target).max:g}; export with --dtype bfloat16 or float32."
            )
        return converted

    return convert


def rounded_to(dtype: DType) -> Convert:
    """Conversion that keeps a weight's own dtype but rounds its values to those of `dtype`."""
    target = TORCH_DTYPES[dtype]

    def convert(_name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.detach().to(target).to(tensor.dtype)
        return tensor if torch.equal(rounded, tensor) else rounded

    return convert


def _converted_parameter(name: str, parameter: nn.Parameter, convert: Convert) -> nn.Parameter:
    if not parameter.is_floating_point():
        return parameter
    value = convert(name, parameter)
    return parameter if value is parameter else nn.Parameter(value, requires_grad=False)


def _output(result: object, name: str) -> torch.Tensor:
    value = getattr(result, name, None)
    if not isinstance(value, torch.Tensor):
        raise ExportError(
            f"The model has no output tensor {name!r} ({type(result).__name__}); correct the "
            "outputs of the recipe."
        )
    return value


def _decoder_feeds(feeds: dict[str, Any]) -> dict[str, Any]:
    """What an encoder-decoder is called with to run its decoder alone."""
    renamed = {"input_ids": "decoder_input_ids", "encoder_attention_mask": "attention_mask"}
    found = {renamed.get(name, name): value for name, value in feeds.items() if name != STATES}
    found["encoder_outputs"] = BaseModelOutput(last_hidden_state=feeds[STATES])
    found["past_key_values"] = EncoderDecoderCache(feeds["past_key_values"], DynamicCache())
    return found


def _tie_lengths(mask: torch.Tensor, ids: torch.Tensor, past: torch.Tensor) -> None:
    """Tell the exporter that the mask covers the past and the new tokens, and nothing else."""
    torch._check(mask.shape[1] == past.shape[2] + ids.shape[1])
