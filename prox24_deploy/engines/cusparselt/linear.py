"""Linear layers held compressed, multiplied by cuSPARSELt, and how each layer is used.

A 2:4 weight W (n, k) is stored as its kept values and two bits of position for each, which sparse
tensor cores read; Y = X Wᵀ is then computed with half of the multiplications.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt import matmul
from prox24_deploy.engines.cusparselt.formats import (
    OPERANDS,
    format_of,
    padded,
    result_dtype,
    sparse_shape,
)
from prox24_deploy.engines.cusparselt.matmul import MatmulPlan
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape
from prox24_deploy.model.layers import is_layer, layer_at, matrix_shape, obstacle, to_matrix
from prox24_deploy.sparsity.pattern import is_24

# What the name of a layer stands behind where the profiler shows its product.
PRODUCT_MARK = "sparse product of "
OPERATOR = "prox24_deploy::linear_24"


class SparseLinear(nn.Module):
    """A linear layer whose 2:4 weight is held compressed; float16 or bfloat16, on a GPU."""

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, algorithms: Mapping[int, int], name: str = ""
    ) -> None:
        """Compress `weight`, (n, k) and 2:4 along k; `algorithms` by rows of activations.

        `name` is what the profiler shows the product under.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", torch._cslt_compress(weight.contiguous()), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._name = name
        self._algorithms = dict(algorithms)
        self._plans: dict[int, MatmulPlan] = {}
        _layers[self.packed.data_ptr()] = self

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply (..., k) to (..., n)."""
        rows = hidden.reshape(-1, self.in_features)
        product: Tensor = torch.ops.prox24_deploy.linear_24(rows, self.packed)
        return product.view(*hidden.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply (m, k) to (m, n)."""
        count = len(rows)
        rows = padded(rows, OPERANDS[format_of(rows.dtype)].row_multiple)
        with record_function(f"{PRODUCT_MARK}{self._name}"):
            return self._plan(count).multiply(self.packed, rows.contiguous())[:count]

    def _plan(self, count: int) -> MatmulPlan:
        """The plan for `count` rows, made where there is none yet."""
        if count not in self._plans:
            dtype = self.packed.dtype
            asked = GemmShape(n=self.out_features, k=self.in_features, m=count)
            shape = sparse_shape(asked, format_of(dtype))
            algorithm = self._algorithm(count)
            self._plans[count] = matmul.shared_plan(shape, dtype, algorithm, self.bias)
        return self._plans[count]

    def _algorithm(self, count: int) -> int:
        """The one timed for `count` rows, or for the nearest number; the default may be broken."""
        if not self._algorithms:
            return 0
        nearest = min(self._algorithms, key=lambda timed: (abs(log(timed / count)), timed))
        return self._algorithms[nearest]


# By the address of the packed weight, so that compiled code is the same for all layers of a shape.
_layers: WeakValueDictionary[int, SparseLinear] = WeakValueDictionary()


@torch.library.custom_op(OPERATOR, mutates_args=())
def _linear_24(rows: Tensor, packed: Tensor) -> Tensor:
    """Y (m, n) of X (m, k), an operator that Inductor takes as it is."""
    layer = _layers.get(packed.data_ptr())
    if layer is None:
        raise EngineError(
            "A compressed layer was moved or copied, and cuSPARSELt knows it by its address only; "
            "compress it where it is to run."
        )
    return layer.multiply(rows)


@_linear_24.register_fake
def _(rows: Tensor, packed: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], packed.shape[0], dtype=result_dtype(rows.dtype))


def shape_obstacle(n: int, k: int, format: GemmFormat = "float16") -> str:
    """Why cuSPARSELt cannot hold a weight (n, k) of a format; "" where it can."""
    multiple = OPERANDS[format].weight_multiple
    for name, size in (("N", n), ("K", k)):
        if size % multiple:
            return f"shape rule: {name} = {size} is not a multiple of {multiple}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUse:
    """A layer as the model uses it: `gemms` has its GEMM in each of the input shapes asked for.

    `gemms` is empty for a convolution, which cuSPARSELt does not compute.
    """

    name: str
    n: int
    k: int
    gemms: tuple[GemmShape, ...]


@torch.inference_mode()
def layer_uses(model: nn.Module, runs: Sequence[Callable[[], object]]) -> tuple[LayerUse, ...]:
    """Note the GEMM of every layer of `model` during each of `runs`, in the order of use.

    A layer that one run reaches several times, or not at all, is left out.
    """
    layers = {name: layer for name, layer in model.named_modules() if is_layer(layer)}
    shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
    seen: dict[str, list[GemmShape]] = {}

    def note(name: str, hidden: Tensor) -> None:
        n, k = shapes[name]
        seen.setdefault(name, []).append(GemmShape(n=n, k=k, m=hidden.numel() // k))

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        LayerUse(
            name=name,
            n=shapes[name][0],
            k=shapes[name][1],
            gemms=() if isinstance(layers[name], nn.Conv2d) else tuple(gemms),
        )
        for name, gemms in seen.items()
        if len(gemms) == len(runs)
    )


def two_four_layers(model: nn.Module) -> set[str]:
    """Paths of the layers whose weight is 2:4 along its reduction axis."""
    return {
        name
        for name, layer in model.named_modules()
        if is_layer(layer)
        and not obstacle(layer)
        and is_24(to_matrix(layer, layer.weight.detach()))
    }


def replace_layers(model: nn.Module, algorithms: Mapping[str, Mapping[int, int]]) -> None:
    """Hold the named layers of `model` compressed, in place.

    Args:
        model: in half precision on a GPU.
        algorithms: layer path to the number of the algorithm by rows of activations.

    Raises:
        EngineError: the weight of a layer is not 2:4.
    """
    for name, chosen in algorithms.items():
        layer = layer_at(model, name)
        matrix = to_matrix(layer, layer.weight.detach())
        if not is_24(matrix):
            raise EngineError(f"Layer {name} is not 2:4, so it cannot be held compressed.")
        bias = None if layer.bias is None else layer.bias.detach()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, SparseLinear(matrix, bias, chosen, name))
