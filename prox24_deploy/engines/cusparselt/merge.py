"""Layers that read the same input, computed as one product.

Queries, keys and values of an attention, or both halves of a gated MLP: one large GEMM takes less
time than several small ones, and may be worth holding compressed where small ones are not. What is
computed stays the same, row by row of the weight.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.engines.cusparselt.linear import LayerUse, two_four_layers
from prox24_deploy.engines.cusparselt.profile import GemmTiming
from prox24_deploy.model.layers import layer_at
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel

# Between the names of layers in that of their product, which stands where they stand.
SEPARATOR = "+"

Groups = tuple[tuple[str, ...], ...]


def members(name: str) -> tuple[str, ...]:
    """Paths of the layers behind the path of a product; of any other layer its own alone."""
    parent, dot, own = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in own.split(SEPARATOR))


def product_name(group: Sequence[str]) -> str:
    """Path of the product of some layers."""
    parent, dot, _ = group[0].rpartition(".")
    return f"{parent}{dot}{SEPARATOR.join(name.rpartition('.')[2] for name in group)}"


@torch.inference_mode()
def shared_layers(model: nn.Module, run: Callable[[], object]) -> Groups:
    """Paths of the linear layers beside each other that are given the same tensor in a run.

    A layer that is used several times is left out, and so is one that differs from the others in
    its dtype or in having a bias.
    """
    seen: dict[str, list[Tensor]] = {}
    layers = {name: one for name, one in model.named_modules() if type(one) is nn.Linear}
    hooks = [
        layer.register_forward_pre_hook(
            # The tensors are kept, so that no other gets the identity of one.
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0])
        )
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, inputs in seen.items():
        layer, parent = layers[name], name.rpartition(".")[0]
        kind = id(inputs[0]), parent, layer.weight.dtype, layer.bias is None
        if len(inputs) == 1 and parent:
            groups.setdefault(kind, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def alike(groups: Groups, model: nn.Module, quantized: QuantizedModel | None = None) -> Groups:
    """Groups of layers that can be held in the same way: 2:4 or not, and alike in 8 bits."""
    sparse, stored = two_four_layers(model), quantized.layers if quantized else {}
    found: dict[tuple[object, ...], list[str]] = {}
    for number, group in enumerate(groups):
        for name in group:
            scale = stored[name].input_scale if name in stored else None
            found.setdefault((number, name in sparse, scale), []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


@torch.no_grad()
def merge_layers(model: nn.Module, groups: Groups) -> None:
    """Compute each group as one linear layer, in place.

    The product stands beside the layers under `product_name`; these become parts of it.
    """
    for group in groups:
        layers = [layer_at(model, name) for name in group]
        weight = torch.cat([layer.weight for layer in layers])
        biases: list[Any] = [layer.bias for layer in layers]
        whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        whole.weight = nn.Parameter(weight, requires_grad=False)
        if biases[0] is not None:
            whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        path, _, name = product_name(group).rpartition(".")
        parent = model.get_submodule(path)
        parent.add_module(name, whole.eval())
        product, start = _Product(parent, name, len(group)), 0
        for layer, part in zip(layers, group, strict=True):
            rows = layer.weight.shape[0]
            setattr(parent, part.rpartition(".")[2], Part(product, start, start + rows))
            start += rows


def merged_numbers(quantized: QuantizedModel, groups: Groups) -> QuantizedModel:
    """What products multiply in 8 bits, from what their parts do; no axes are kept."""
    layers = dict(quantized.layers)
    for group in groups:
        if group[0] not in layers:
            continue
        parts = [layers.pop(name) for name in group]
        layers[product_name(group)] = QuantizedLayer(
            weight=torch.cat([part.weight for part in parts]),
            weight_scale=torch.cat([part.weight_scale for part in parts]),
            input_scale=parts[0].input_scale,
        )
    return replace(quantized, layers=layers, axes={})


def merged_uses(uses: Sequence[LayerUse], groups: Groups) -> list[LayerUse]:
    """The GEMMs of a model whose groups are computed as one product each."""
    known = {use.name: use for use in uses}
    whole = [group for group in groups if known.keys() >= set(group)]
    own = {name: group for group in whole for name in group}
    found: dict[str, LayerUse] = {}
    for use in uses:
        parts = [known[name] for name in own.get(use.name, (use.name,))]
        rows = sum(part.n for part in parts)
        name = product_name([part.name for part in parts])
        gemms = tuple(replace(gemm, n=rows) for gemm in use.gemms)
        found.setdefault(name, replace(use, name=name, n=rows, gemms=gemms))
    return list(found.values())


def by_member(
    name: str, timings: Sequence[GemmTiming], outputs: Mapping[str, int]
) -> dict[str, tuple[GemmTiming, ...]]:
    """The share that each layer of a product has in its times, by the number of its outputs."""
    own = {member: outputs[member] for member in members(name)}
    whole = sum(own.values())
    return {
        member: tuple(_part(timing, count / whole) for timing in timings)
        for member, count in own.items()
    }


def _part(timing: GemmTiming, share: float) -> GemmTiming:
    return replace(timing, dense_us=timing.dense_us * share, sparse_us=timing.sparse_us * share)


class Part(nn.Module):
    """A layer whose outputs are some of those of a product."""

    def __init__(self, product: "_Product", start: int, stop: int) -> None:
        super().__init__()
        # In a tuple, so that the product is a module of its parent alone.
        self._product = (product,)
        self._start, self._stop = start, stop

    def forward(self, hidden: Tensor) -> Tensor:
        """Outputs (..., stop - start) of the product of `hidden`."""
        return self._product[0].of(hidden)[..., self._start : self._stop]


class _Product:
    """The product of several layers, computed for the first of them to be run.

    torch.compile sees it computed for each and keeps one, see `ShareEqual`.
    """

    def __init__(self, parent: nn.Module, name: str, parts: int) -> None:
        self._parent, self._name, self._parts = parent, name, parts
        self._given: Callable[[], Tensor | None] = lambda: None
        self._kept: Tensor | None = None
        self._left = 0

    def of(self, hidden: Tensor) -> Tensor:
        """Outputs of the product of `hidden`."""
        whole: Callable[[Tensor], Tensor] = getattr(self._parent, self._name)
        if torch.compiler.is_compiling():
            return whole(hidden)
        kept = self._kept
        if kept is None or self._given() is not hidden:
            self._given, self._left = weakref.ref(hidden), self._parts
            kept = whole(hidden)
        self._left -= 1
        # Given to all, it is not taken for the product of what the same tensor holds later.
        self._kept = kept if self._left else None
        return kept
