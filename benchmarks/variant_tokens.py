"""Tokens weighted by what the loss of the whole model says: the diagonal Fisher information.

Rows of a layer are solved independently, so that a weight for each output row cannot change any
solution. What can is a weight for each token in the Gram matrix: the squared norm of the gradient
of the log-likelihood at the layer's output there, with the next tokens drawn from the dense model.
Layers that read the same input then have Gram matrices of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from variant_lab import Figures, Lab

from prox24_deploy.evaluation.language import next_logits
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import BlockCall, real_rows, shared_inputs
from prox24_deploy.model.layers import Layer, layer_at, matrix_shape
from prox24_deploy.pruning import block
from prox24_deploy.pruning.activations import Activations, BlockPair, input_pairs
from prox24_deploy.pruning.second_moments import SecondMoments

# By layer and batch, (tokens,).
Weights = Mapping[str, Sequence[Tensor]]


def with_weights(lab: Lab, power: float) -> tuple[nn.Module, Figures]:
    """Prune with tokens that count by a power of that squared norm."""
    weights = {
        path: _scaled([each**power for each in parts]) for path, parts in squares(lab).items()
    }
    with weighing(weights, lab.calibration):
        model = lab.prune()
    whole = [torch.cat(list(parts)) for parts in weights.values()]
    # As many tokens of equal weight would estimate as well.
    effective = [float(each.sum().square() / each.square().sum()) / len(each) for each in whole]
    return model, {"effective_tokens": fmean(effective)}


def _scaled(parts: Sequence[Tensor]) -> list[Tensor]:
    mean = torch.cat(list(parts)).mean()
    return [each / mean for each in parts]


def squares(lab: Lab) -> dict[str, list[Tensor]]:
    """Squared norms of the gradient at the output of each target, of every real token."""
    model = lab.dense
    generator = torch.Generator(device=lab.device).manual_seed(0)
    found: dict[str, list[Tensor]] = {path: [] for path in lab.targets}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    embedding.requires_grad = True
    try:
        for batch in lab.calibration:
            with torch.enable_grad(), _noted(model, batch, found):
                logits = next_logits(model, batch).flatten(0, 1)
                drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
                real = batch.real[:, 1:].flatten().to(lab.device)
                losses = functional.cross_entropy(logits, drawn, reduction="none")
                torch.autograd.grad(losses[real].sum(), embedding)
    finally:
        embedding.requires_grad = False
    return found


@contextmanager
def _noted(model: nn.Module, batch: Batch, found: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Append the squared norm of the gradient at each layer's output as it is computed."""

    def note(path: str, gradient: Tensor) -> None:
        found[path].append(real_rows(gradient, batch.real).square().sum(1))

    def watch(path: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(partial(note, path))

    handles = [layer_at(model, path).register_forward_hook(partial(watch, path)) for path in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weighing(weights: Weights, calibration: Sequence[Batch]) -> Iterator[None]:
    """Let each layer have a Gram matrix of its own, of weighted tokens of the calibration text."""

    def alone(
        block: nn.Module, layers: Mapping[str, Layer], call: BlockCall, hidden: Tensor
    ) -> list[list[str]]:
        return [[name] for group in shared_inputs(block, layers, call, hidden) for name in group]

    def weighted(
        twin: BlockPair,
        wave: Sequence[Sequence[str]],
        activations: Activations,
        *,
        dense_goes_on: bool = False,
    ) -> list[SecondMoments]:
        ((name,),) = wave
        layer = layer_at(twin.pruned, name)
        moments = SecondMoments.empty(matrix_shape(layer)[1], layer.weight.device)
        pairs = input_pairs(twin, name, activations, dense_goes_on=dense_goes_on)
        # Only the set that layers are solved on has weights; the other is empty here. Pairs come
        # first, for only behind the last of them the dense stream is known to have gone on.
        for (dense, pruned), weight in zip(pairs, weights[f"{twin.prefix}.{name}"], strict=False):
            root = weight.sqrt()[:, None]
            moments.add(dense * root, pruned * root)
        assert moments.tokens in {0, sum(int(batch.real.sum()) for batch in calibration)}
        return [moments]

    with patch.object(block, "shared_inputs", alone), patch.object(block, "collect_wave", weighted):
        yield
