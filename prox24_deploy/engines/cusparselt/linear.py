"""Linear layers held compressed, multiplied by cuSPARSELt, and how each layer is used.

A 2:4 weight W (n, k) is stored as its kept values and two bits of position for each, which sparse
tensor cores read; Y = X Wᵀ is then computed with half of the multiplications.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from prox24_deploy.core.errors import EngineError
from prox24_deploy.engines.cusparselt import matmul as cusparselt_plan
from prox24_deploy.engines.cusparselt.matmul import MatmulPlan
from prox24_deploy.engines.cusparselt.profile import GemmShape
from prox24_deploy.model.layers import is_layer, layer_at, matrix_shape, obstacle, to_matrix
from prox24_deploy.sparsity.pattern import is_24

# torch.sparse checks the same: rows and columns of a compressed half-precision weight.
WEIGHT_MULTIPLE = 16
# Rows of activations; fewer are padded.
ROW_MULTIPLE = 8


class SparseLinear(nn.Module):
    """A linear layer whose 2:4 weight is held compressed; half precision, on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, algorithms: Mapping[int, int]) -> None:
        """Compress `weight`, (n, k) and 2:4 along k; `algorithms` by rows of activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", torch._cslt_compress(weight.contiguous()), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._algorithms = dict(algorithms)
        self._plans: dict[int, MatmulPlan] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply (..., k) to (..., n)."""
        rows = hidden.reshape(-1, self.in_features)
        count = len(rows)
        # Padding by nothing would copy.
        if missing := -count % ROW_MULTIPLE:
            rows = functional.pad(rows, (0, 0, 0, missing))
        padded = rows.contiguous()
        plan = self._plan(len(padded), self._algorithms.get(count, 0))
        product: Tensor = torch.ops.prox24_deploy.sparse_product(self.packed, padded, plan)
        return product[:count].view(*hidden.shape[:-1], self.out_features)

    def _plan(self, count: int, algorithm: int) -> int:
        """Key of the plan for `count` rows, made where there is none yet."""
        plan = self._plans.get(count)
        if plan is None:
            shape = GemmShape(n=self.out_features, k=self.in_features, m=count)
            bias: Tensor | None = self.bias  # type: ignore[assignment]
            plan = cusparselt_plan.shared_plan(shape, self.packed.dtype, algorithm, bias)  # type: ignore[arg-type]
            self._plans[count] = plan
            _plans[id(plan)] = plan
        return id(plan)


_plans: WeakValueDictionary[int, MatmulPlan] = WeakValueDictionary()


@torch.library.custom_op("prox24_deploy::sparse_product", mutates_args=())
def _sparse_product(packed: Tensor, rows: Tensor, plan: int) -> Tensor:
    """An operator, for the profiler tells which layer launched a kernel by operators alone."""
    return _plans[plan].multiply(packed, rows)


def shape_obstacle(n: int, k: int) -> str:
    """Why cuSPARSELt cannot hold a weight (n, k) in half precision; "" where it can."""
    for name, size in (("N", n), ("K", k)):
        if size % WEIGHT_MULTIPLE:
            return f"shape rule: {name} = {size} is not a multiple of {WEIGHT_MULTIPLE}"
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
        setattr(model.get_submodule(parent), own, SparseLinear(matrix, bias, chosen))
