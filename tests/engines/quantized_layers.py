"""Random 8-bit weights, and what a layer that multiplies them must give."""

import torch
from torch import Tensor

from prox24_deploy.engines.cusparselt.formats import OPERANDS
from prox24_deploy.engines.cusparselt.profile import GemmFormat
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import QuantizedLayer


def stored_weight(
    format: GemmFormat, n: int, k: int, *, device: str, sparse: bool, spread: float = 4.0
) -> QuantizedLayer:
    """A weight whose scales differ from channel to channel, 2:4 if asked for."""
    generator = torch.Generator().manual_seed(n + k)
    values = torch.randn(n, k, generator=generator) * 32
    if sparse:
        values.view(n, -1, 4)[..., ::2] = 0
    scale = torch.rand(n, generator=generator) * spread + 0.1
    return QuantizedLayer(
        weight=to_numbers(values, 1.0, OPERANDS[format].dtype).to(device),
        weight_scale=(scale * 1e-3).to(device),
        input_scale=0.03,
    )


def formula(stored: QuantizedLayer, hidden: Tensor, bias: Tensor | None) -> Tensor:
    """b + (w · x) Σ W Q(X) in float64, for rows (m, k)."""
    numbers = to_numbers(hidden, stored.input_scale, stored.weight.dtype).double()
    sums = numbers @ stored.weight.double().T
    values = sums * stored.weight_scale.double() * stored.input_scale
    return values if bias is None else values + bias.double()
