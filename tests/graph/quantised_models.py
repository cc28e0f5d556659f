"""A small module with every kind of quantised layer, and the plainest way to quantise a module."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.model.layers import from_matrix, layer_at, reduction_axis, to_matrix
from prox24_deploy.quantization.formats import FORMATS, exact_scale
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel, apply_weights
from prox24_deploy.sparsity.pattern import mask_24

WIDTH = 16
MIXED_RECIPE = """
family = "mixed"
model_types = ["mixed"]
task = "feature-extraction"
blocks = "layers"
targets = ["*"]

[[inputs]]
name = "x"
dtype = "float"
axes = ["batch", 16, 4, 4]

[[outputs]]
name = "last_hidden_state"
dtype = "float"
axes = ["batch", 16]
"""


class Mixed(nn.Module):
    """Products of every form that exporters make of a layer; (batch, 16, 4, 4) to (batch, 16).

    The norm behind the convolution has factors of both signs, and `left` and `tied` are one weight.
    """

    LAYERS = ("conv", "left", "right", "flat", "turned")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.norm.weight.data = torch.linspace(-1.9, 2.1, WIDTH)
        self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        self.left, self.right, self.tied, self.flat, self.unused = (
            nn.Linear(WIDTH, WIDTH) for _ in range(5)
        )
        self.turned = Conv1D(WIDTH, WIDTH)
        self.turned.weight.data.mul_(10)
        for name in self.LAYERS:
            layer = layer_at(self, name)
            weight = layer.weight.data
            kept = mask_24(weight.abs(), reduction_axis(layer))
            layer.weight.data = torch.where(kept, weight, 0.0)
        self.tied.weight = self.left.weight
        self.eval()

    def forward(self, x: Tensor) -> SimpleNamespace:
        """Convolve, then multiply rows (MatMul), then vectors (Gemm)."""
        seen = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        rows = self.left(seen) * self.right(seen) + self.tied(-seen)
        return SimpleNamespace(last_hidden_state=self.turned(self.flat(rows.mean(1)).relu()))


def images() -> Tensor:
    """What a `Mixed` reads."""
    return torch.randn(8, WIDTH, 4, 4, generator=torch.Generator().manual_seed(1))


def quantised(
    model: nn.Module,
    names: Sequence[str],
    form: QuantizedFormat,
    run: Callable[[], object],
    outputs: Sequence[str] = (),
) -> QuantizedModel:
    """Scales by the largest magnitudes that `run` shows; `model` gets the values of the numbers.

    The layers in `outputs` round what they give, too.
    """
    largest: dict[str, float] = {}
    given: dict[str, float] = {}

    def see(name: str, tensor: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(tensor.abs().max()))

    def see_output(name: str, tensor: Tensor) -> None:
        given[name] = max(given.get(name, 0.0), float(tensor.abs().max()))

    handles = [
        layer_at(model, name).register_forward_pre_hook(lambda _, given, n=name: see(n, given[0]))
        for name in names
    ]
    handles += [
        layer_at(model, name).register_forward_hook(lambda _, __, y, n=name: see_output(n, y))
        for name in outputs
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    layers = {name: _layer(model, name, form, largest[name]) for name in names}
    for name, size in given.items():
        layers[name] = replace(layers[name], output_scale=_scale(size, form))
    made = QuantizedModel(format=form, layers=layers)
    apply_weights(model, made)
    return made


def _layer(model: nn.Module, name: str, form: QuantizedFormat, largest: float) -> QuantizedLayer:
    known, layer = FORMATS[form], layer_at(model, name)
    matrix = to_matrix(layer, layer.weight.detach())
    scales = exact_scale(matrix.abs().amax(1) / known.largest)
    return QuantizedLayer(
        weight=from_matrix(layer, known.weight_numbers(matrix, scales)).clone(),
        weight_scale=scales,
        input_scale=_scale(largest, form),
    )


def _scale(largest: float, form: QuantizedFormat) -> float:
    return float(exact_scale(torch.tensor(largest / FORMATS[form].largest)))
