"""Linear layers held compressed, multiplied by cuSPARSELt, and how each layer is used.

A 2:4 weight W (n, k) is stored as its kept values and two bits of position for each, which sparse
tensor cores read; Y = X Wᵀ is then computed with half of the multiplications.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from prox24_deploy.engines.profile import Algorithm, GemmShape
from prox24_deploy.errors import EngineError
from prox24_deploy.model.layers import is_layer, layer_at, matrix_shape, obstacle, to_matrix
from prox24_deploy.pruning.pattern import is_24

# torch.sparse checks the same: rows and columns of a compressed half-precision weight.
WEIGHT_MULTIPLE = 16
# Rows of activations; fewer are padded.
ROW_MULTIPLE = 8


class SparseLinear(nn.Module):
    """A linear layer whose 2:4 weight is held compressed; half precision, on a GPU."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, algorithms: Mapping[int, Algorithm]
    ) -> None:
        """Compress `weight`, (n, k) and 2:4 along k; `algorithms` by rows of activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", torch._cslt_compress(weight.contiguous()), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._algorithms = dict(algorithms)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply (..., k) to (..., n)."""
        rows = hidden.reshape(-1, self.in_features)
        algorithm = self._algorithms.get(len(rows), Algorithm())
        product = sparse_product(self.packed, rows, self.bias, algorithm)  # type: ignore[arg-type]
        return product.view(*hidden.shape[:-1], self.out_features)


def sparse_product(
    packed: Tensor, rows: Tensor, bias: Tensor | None, algorithm: Algorithm
) -> Tensor:
    """X Wᵀ + b, (m, n), of rows X (m, k) and a compressed W (n, k)."""
    count = len(rows)
    padded = functional.pad(rows, (0, 0, 0, -count % ROW_MULTIPLE))
    product = torch._cslt_sparse_mm(
        packed,
        padded.contiguous().t(),
        bias=bias,
        transpose_result=True,
        alg_id=algorithm.number,
        split_k=algorithm.split_k,
        split_k_mode=algorithm.split_k_mode,
    )
    return product[:count]


def shape_obstacle(n: int, k: int) -> str:
    """Why cuSPARSELt cannot hold a weight (n, k) in half precision; "" where it can."""
    for name, size in (("N", n), ("K", k)):
        if size % WEIGHT_MULTIPLE:
            return f"shape rule: {name} = {size} is not a multiple of {WEIGHT_MULTIPLE}"
    return ""


@dataclass(frozen=True, slots=True)
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
        seen.setdefault(name, []).append(GemmShape(n, k, hidden.numel() // k))

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
        LayerUse(name, *shapes[name], () if isinstance(layers[name], nn.Conv2d) else tuple(gemms))
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


def replace_layers(model: nn.Module, algorithms: Mapping[str, Mapping[int, Algorithm]]) -> None:
    """Hold the named layers of `model` compressed, in place.

    Args:
        model: in half precision on a GPU.
        algorithms: layer path to the algorithm by rows of activations.

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
        setattr(model.get_submodule(parent), own, SparseLinear(matrix, bias, chosen))
