"""Train a quantised model through its rounding, so that its numbers do what the dense model does.

Straight-through estimation (Bengio et al., arXiv 1308.3432): forward, weights and activations are
rounded as they will be; backward, rounding counts as the identity, but for activations that are
clipped. Scales, zeros and all that is not a weight of a quantised layer stay as they were decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prox24_deploy.core.quantized import StraightThrough
from prox24_deploy.core.types import Progress
from prox24_deploy.model.layers import (
    Layer,
    from_matrix,
    layer_at,
    reduction_axis,
    to_matrix,
)
from prox24_deploy.quantization.formats import FORMATS, NumberFormat
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel
from prox24_deploy.recovery.objective import loss_name
from prox24_deploy.recovery.recover import Recovery, recovered_alone
from prox24_deploy.recovery.student import Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """By what numbers are trained.

    `asked` has the dense model, samples and options, with the steps to take; what an interrupted
    run goes on from is in the folder `kept`.
    """

    asked: Recovery
    kept: Path


def zeros_of(model: nn.Module, sparse: Sequence[str]) -> dict[str, Tensor]:
    """Where the weights of 2:4 layers are 0, by path, before they are rounded."""
    return {name: layer_at(model, name).weight == 0 for name in sparse}


def train_through(
    model: nn.Module,
    made: QuantizedModel,
    zeros: Mapping[str, Tensor],
    by: Through,
    *,
    began: float,
    progress: Progress,
) -> tuple[QuantizedModel, StraightThrough]:
    """Train the weights behind the numbers of `made`, in place.

    Args:
        model: quantised, float32; its layers round what they read.
        made: what it was quantised to.
        zeros: by path, where a weight stays 0.
        by: what it is trained by.
        began: when the stage did, by `time.perf_counter`.
        progress: called with (label, done, total).

    Returns:
        The same with the numbers that are best on withheld samples, and how that went.
    """
    form = FORMATS[made.format]
    trained = []
    for name, stored in made.layers.items():
        layer = layer_at(model, name)
        latent = layer.weight
        parametrize.register_parametrization(layer, "weight", RoundedWeight(layer, stored, form))
        trained.append(_latent(name, layer, latent, zeros.get(name)))
    found = recovered_alone(by.asked, model, trained, by.kept, began, progress)
    outcome = found.outcome
    record = StraightThrough(
        loss=loss_name(by.asked.recipe.task, by.asked.dense.config),
        steps=found.schedule.steps,
        taken=outcome.taken,
        kept=outcome.kept,
        before=outcome.before,
        after=outcome.after,
        warning=outcome.failure,
    )
    if not outcome.kept:
        return made, record
    layers = {
        each.names[0]: _rounded(layer_at(model, each.names[0]), each, made, form)
        for each in trained
    }
    return replace(made, layers=layers), record


def _latent(name: str, layer: Layer, latent: Tensor, zeros: Tensor | None) -> Trained:
    values = latent[latent != 0]
    return Trained(
        names=(name,),
        parameter=latent,
        zeros=zeros,
        axis=None if zeros is None else reduction_axis(layer),
        dtype=torch.float32,
        scale=float(values.square().mean().sqrt()) if len(values) else 0.0,
    )


@torch.no_grad()
def _rounded(
    layer: Layer, trained: Trained, made: QuantizedModel, form: NumberFormat
) -> QuantizedLayer:
    """The numbers nearest to the weight behind them."""
    stored = made.layers[trained.names[0]]
    scale = stored.weight_scale.to(trained.parameter.device)
    numbers = form.weight_numbers(to_matrix(layer, trained.parameter), scale)
    return replace(stored, weight=from_matrix(layer, numbers).clone())


class RoundedWeight(nn.Module):
    """A parametrisation: the values of the nearest numbers, through which gradients go."""

    def __init__(self, layer: Layer, stored: QuantizedLayer, form: NumberFormat) -> None:
        super().__init__()
        # As an attribute it would be a module of its own parametrisation.
        self._layout, self._form = (layer,), form
        self._scale = stored.weight_scale.to(layer.weight.device)

    def forward(self, latent: Tensor) -> Tensor:
        """What the layer multiplies by."""
        (layer,) = self._layout
        with torch.no_grad():
            numbers = self._form.weight_numbers(to_matrix(layer, latent.detach()), self._scale)
            values = from_matrix(layer, self._form.values(numbers, self._scale[:, None]))
        return values if not latent.requires_grad else latent + (values - latent).detach()
