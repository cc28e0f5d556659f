"""Linear layers that multiply 8-bit numbers, dense or 2:4, in place of those of a model.

Y[m, n] = b[n] + w[n] · x · Σₖ W[n, k] · Q(X)[m, k], with numbers W, a scale w for each output
channel, one scale x for all inputs, and Q(X) the numbers of X / x. The quantisation of the inputs
and the scales of the outputs are plain PyTorch, so that Inductor fuses them into the kernels
before and after; the product between them is an operator that it takes as it is. cuSPARSELt 0.8
could scale by output channel itself for int8, but refuses to for FP8 (H200).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.engines.cusparselt.formats import OPERANDS, WIDE, format_of, padded
from prox24_deploy.engines.cusparselt.linear import (
    SparseLinear,
    replace_layers,
    shape_obstacle,
)
from prox24_deploy.model.layers import Layer, layer_at, matrix_shape, to_matrix
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import (
    QuantizedLayer,
    QuantizedModel,
)
from prox24_deploy.sparsity.pattern import is_24

DENSE_OPERATOR = "prox24_deploy::linear_8"
# Rows and columns of a dense weight, by the rule of cuBLAS on bytes.
_DENSE_MULTIPLE = 16
# cuBLAS multiplies integers from 17 rows on, and rows of its result come in multiples of 8.
_LEAST_ROWS, _ROW_MULTIPLE = 32, 8


@dataclass(frozen=True, slots=True)
class _Scales:
    """From sums of numbers to values: by output channel a factor, (n,) float32, and a bias."""

    factor: Tensor
    bias: Tensor | None

    def values(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Values (m, n) in `dtype`, computed in float32."""
        scaled = sums.float() * self.factor
        return (scaled if self.bias is None else scaled + self.bias.float()).to(dtype)


class QuantizedLinear(nn.Module):
    """A linear layer that multiplies 8-bit numbers, by cuBLAS.

    Args:
        weight: (n, k) int8 or float8_e4m3fn.
        weight_scale: (n,) float32.
        input_scale: of all inputs.
        bias: (n,) or None.
    """

    weight: Tensor
    factor: Tensor
    bias: Tensor | None
    one: Tensor

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, input_scale: float, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._input_scale = input_scale
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.register_buffer("factor", weight_scale.float() * input_scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("one", torch.ones((), device=weight.device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply (..., k) to (..., n)."""
        numbers = to_numbers(hidden, self._input_scale, self.weight.dtype)
        rows = numbers.reshape(-1, self.in_features)
        sums: Tensor = torch.ops.prox24_deploy.linear_8(rows, self.weight, self.one)
        values = _Scales(self.factor, self.bias).values(sums, hidden.dtype)
        return values.view(*hidden.shape[:-1], self.out_features)


class SparseQuantizedLinear(SparseLinear):
    """A linear layer that multiplies 8-bit numbers, its 2:4 weight held compressed.

    Args:
        weight: (n, k) int8 or float8_e4m3fn, 2:4 along k.
        weight_scale: (n,) float32.
        input_scale: of all inputs.
        bias: (n,) or None.
        algorithms: of cuSPARSELt by rows of activations.
        name: what the profiler shows the product under.
    """

    factor: Tensor
    offset: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: float,
        bias: Tensor | None,
        algorithms: Mapping[int, int],
        name: str = "",
    ) -> None:
        # The product adds no bias, which comes after the scales.
        super().__init__(weight, None, algorithms, name)
        self._input_scale = input_scale
        self.register_buffer("factor", weight_scale.float() * input_scale, persistent=False)
        self.register_buffer("offset", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply (..., k) to (..., n)."""
        numbers = to_numbers(hidden, self._input_scale, self.packed.dtype)
        sums = super().forward(numbers)
        return _Scales(self.factor, self.offset).values(sums, hidden.dtype)


@torch.library.custom_op(DENSE_OPERATOR, mutates_args=())
def linear_8(rows: Tensor, weight: Tensor, one: Tensor) -> Tensor:
    """Sums (m, n) of products of 8-bit numbers X (m, k) and W (n, k), on a GPU.

    Exact in int32 for int8; of FP8 in the fast accumulation of the tensor cores, rounded to `WIDE`.
    `one` is the number 1 where the operands are, for FP8 kernels read their scales there.
    """
    if rows.dtype == torch.int8:
        missing = max(_LEAST_ROWS - len(rows), 0)
        full = padded(rows, _LEAST_ROWS if missing else _ROW_MULTIPLE)
        return torch._int_mm(full, weight.t())[: len(rows)]
    return torch._scaled_mm(rows, weight.t(), one, one, out_dtype=WIDE, use_fast_accum=True)


@linear_8.register_fake
def _(rows: Tensor, weight: Tensor, one: Tensor) -> Tensor:  # noqa: ARG001  # as the operator has it
    kind = torch.int32 if rows.dtype == torch.int8 else WIDE
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=kind)


def dense_obstacle(n: int, k: int) -> str:
    """Why cuBLAS cannot multiply by an 8-bit weight (n, k); "" where it can."""
    for name, size in (("N", n), ("K", k)):
        if size % _DENSE_MULTIPLE:
            return f"shape rule: {name} = {size} is not a multiple of {_DENSE_MULTIPLE}"
    return ""


def multiplied(model: nn.Module, quantized: QuantizedModel) -> list[str]:
    """Paths of the quantised layers that can multiply 8-bit numbers on a GPU.

    Convolutions and layers of odd sizes round what they read, and are multiplied in 16 bits.
    """
    layers = {name: layer_at(model, name) for name in quantized.layers}
    return [
        name
        for name, layer in layers.items()
        if not isinstance(layer, nn.Conv2d) and not dense_obstacle(*matrix_shape(layer))
    ]


def untrained(
    model: nn.Module, format: QuantizedFormat, input_scales: Mapping[str, float]
) -> QuantizedModel:
    """A quantised model of the same structure, all of its weights zero."""
    layers = {}
    for name, scale in input_scales.items():
        weight = layer_at(model, name).weight
        layers[name] = QuantizedLayer(
            weight=torch.zeros_like(weight, dtype=OPERANDS[format].dtype),
            weight_scale=weight.new_ones(matrix_shape(layer_at(model, name))[0]).float(),
            input_scale=scale,
        )
    return QuantizedModel(format=format, layers=layers)


def multiply_as(
    model: nn.Module,
    algorithms: Mapping[str, Mapping[int, int]],
    quantized: QuantizedModel | None = None,
) -> None:
    """Hold the named layers compressed, and let quantised ones multiply their numbers, in place.

    Args:
        model: in half precision on a GPU; a quantised one as `apply_weights` and
            `apply_inputs` leave it.
        algorithms: by layer to compress, in 16 or 8 bits, their numbers by rows of activations.
        quantized: what its layers multiply.

    Raises:
        EngineError: a layer is not what it would have to be, by name.
    """
    eight = multiplied(model, quantized) if quantized else []
    replace_layers(model, {n: own for n, own in algorithms.items() if n not in eight})
    if quantized:
        stored = {name: quantized.layers[name] for name in eight}
        sparse = {name: algorithms[name] for name in eight if name in algorithms}
        replace_quantized(model, stored, sparse)


def replace_quantized(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    sparse: Mapping[str, Mapping[int, int]],
) -> None:
    """Let the named layers of `model` multiply 8-bit numbers, in place.

    Args:
        model: float16 or bfloat16, on a GPU.
        layers: by path, what each is to multiply by; the bias stays that of the layer.
        sparse: those that are to be held compressed, with the number of the algorithm by rows of
            activations; the others are multiplied dense.

    Raises:
        EngineError: a layer is not what it would have to be, by name.
    """
    if unknown := sorted(sparse.keys() - layers.keys()):
        raise EngineError(f"Layer {unknown[0]} is to multiply sparse, but is not quantised.")
    for name, stored in layers.items():
        parent, _, own = name.rpartition(".")
        layer = layer_at(model, name)
        made = _quantized(layer, name, stored, sparse.get(name))
        for hook in layer._forward_hooks.values():
            # That which rounds what the layer gives.
            made.register_forward_hook(hook)
        setattr(model.get_submodule(parent), own, made)


def _quantized(
    layer: Layer, name: str, stored: QuantizedLayer, algorithms: Mapping[int, int] | None
) -> nn.Module:
    """One layer in its new form, dense where there are no `algorithms`."""
    if isinstance(layer, nn.Conv2d):
        raise EngineError(
            f"Layer {name} is a convolution, and cuSPARSELt and cuBLAS multiply matrices only; "
            "leave it in 16 bits."
        )
    weight = to_matrix(layer, stored.weight).to(layer.weight.device)
    scale = stored.weight_scale.to(weight.device)
    held: Tensor | None = layer.bias
    bias = None if held is None else held.detach()
    if why := _obstacle(weight, sparse=algorithms is not None):
        raise EngineError(f"Layer {name} cannot be multiplied in 8 bits: {why}.")
    if algorithms is None:
        return QuantizedLinear(weight, scale, stored.input_scale, bias)
    return SparseQuantizedLinear(weight, scale, stored.input_scale, bias, algorithms, name)


def _obstacle(weight: Tensor, *, sparse: bool) -> str:
    n, k = weight.shape
    if not sparse:
        return dense_obstacle(n, k)
    # float32 holds both kinds of numbers, and can be compared everywhere.
    return shape_obstacle(n, k, format_of(weight.dtype)) or (
        "" if is_24(weight.float()) else "it is not 2:4"
    )
