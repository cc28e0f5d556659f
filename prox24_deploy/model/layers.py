"""The kinds of layer that can be pruned, each seen as one matrix.

Every kind computes Y = X Wᵀ + b for rows X of its input, (rows, d), and a matrix W, (out, d), whose
groups of four are consecutive along d. What differs is how W is stored and how X is cut from the
input:

* Linear stores W itself.
* Conv1D, the layer of GPT-2, stores Wᵀ.
* Conv2d stores (out, channels, height, width). Sparse kernels want groups of four input channels at
  one place of the kernel, so d runs over places first and channels within them.
"""

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from prox24_deploy.sparsity.pattern import GROUP

Layer = nn.Linear | nn.Conv2d | Conv1D

_PADDING_MODES = {"zeros": "constant"}


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module is of a kind that can be pruned; a subclass may compute something else."""
    return type(module) in {nn.Linear, nn.Conv2d, Conv1D} or _is_linear(module)


def layer_at(block: nn.Module, name: str) -> Layer:
    """The layer at a path inside a block.

    Raises:
        TypeError: something else is there.
    """
    layer = block.get_submodule(name)
    if not is_layer(layer):
        raise TypeError(f"{name} is a {type(layer).__name__}, expected Linear, Conv1D or Conv2d")
    return layer


def reduction_axis(layer: Layer) -> int:
    """The axis of the stored weight along which groups of four lie."""
    return 0 if isinstance(layer, Conv1D) else 1


def to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """W, (out, d), of a weight in the layout of `layer`."""
    if isinstance(layer, Conv1D):
        return weight.T
    if isinstance(layer, nn.Conv2d):
        return weight.permute(0, 2, 3, 1).flatten(1)
    return weight


def from_matrix(layer: Layer, matrix: Tensor) -> Tensor:
    """The weight in the layout of `layer`, contiguous: the inverse of `to_matrix`."""
    if isinstance(layer, Conv1D):
        return matrix.T.contiguous()
    if isinstance(layer, nn.Conv2d):
        places: Tensor = matrix.unflatten(1, (*layer.kernel_size, layer.in_channels))
        return places.permute(0, 3, 1, 2).contiguous()
    return matrix


def input_rows(layer: Layer, tensor: Tensor) -> Tensor:
    """Cut the input of a layer into rows: (batch, ..., d), one per output position."""
    if not isinstance(layer, nn.Conv2d):
        return tensor
    mode = _PADDING_MODES.get(layer.padding_mode, layer.padding_mode)
    padded = functional.pad(tensor, layer._reversed_padding_repeated_twice, mode)
    patches = functional.unfold(
        padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )
    channels_first: Tensor = patches.unflatten(1, (layer.in_channels, -1))
    return channels_first.permute(0, 3, 2, 1).flatten(2)


def obstacle(layer: Layer) -> str:
    """Why a layer cannot be pruned to 2:4; "" where it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return f"its convolution runs in {layer.groups} groups of channels"
        name, length = "in_channels", layer.in_channels
    else:
        name, length = "in_features", layer.weight.shape[reduction_axis(layer)]
    return f"{name} {length} is not a multiple of {GROUP}" if length % GROUP else ""


def same_rows(first: Layer, second: Layer) -> bool:
    """Whether two layers cut one and the same input into the same rows."""
    return _geometry(first) == _geometry(second)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, d)."""
    rows, features = to_matrix(layer, layer.weight.detach()).shape
    return rows, features


def _geometry(layer: Layer) -> tuple[object, ...]:
    if not isinstance(layer, nn.Conv2d):
        return ()
    parts = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    return (*parts, layer.groups)


def _is_linear(module: nn.Module) -> bool:
    """A subclass of Linear that leaves the multiplication as it is."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
