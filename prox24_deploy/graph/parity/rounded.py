"""Compare the rounding of a quantised file with PyTorch, step by step.

An activation that lies between two numbers of an 8-bit format may fall on either side in two
runtimes, and everything behind is different then by far more than the rounding of floats. So here
PyTorch follows the file: each quantised layer reads what it read there, once the value in front of
the rounding was seen to be that of PyTorch, within the tolerance for a model that is not quantised,
and its number a rounding of it. Behind it both compute with equal numbers, so the same tolerance
holds at the next layer and at the outputs. A wrong scale, axis, zero point or weight shows at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.check.quantised_nodes import quantised_nodes
from prox24_deploy.graph.export.module import TORCH_DTYPES
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.tensors import QuantizedModel
from prox24_deploy.sparsity.groups import Array

# What a quantised layer is given in a file, and what it reads, rounded.
Read = tuple[Array, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How a file rounds, and how much of a difference in front of it is allowed.

    Attributes:
        path: of the file.
        quantized: scales that were decided.
        dtype: of the file.
        relative: by how much a value that is rounded may differ, as a part of the largest of its
            tensor; None where what is rounded is not compared.
    """

    path: Path
    quantized: QuantizedModel
    dtype: DType
    relative: float | None


def rounded_values(model: ir.Model) -> dict[str, list[tuple[ir.Value, ir.Value]]]:
    """What quantised layers are given and what they read, by module path, a pair for each call."""
    found: dict[str, list[tuple[ir.Value, ir.Value]]] = {}
    for each in quantised_nodes(model):
        if (given := each.quantiser.inputs[0]) is not None:
            found.setdefault(each.module, []).append((given, each.input))
    return found


@contextmanager
def following(
    model: nn.Module, read: Mapping[str, Sequence[Read]], rounding: Rounding
) -> Iterator[None]:
    """Within it, layers of `model` read `read`, by module path, in the order of their calls.

    Raises:
        ExportError: while the model runs, names the layer that was given something else in the file
            than in PyTorch, or read what is no rounding of it by its scale.
    """
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_Followed(name, values, rounding))
        for name, values in read.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Followed:
    """A hook that replaces the input of a layer by what it was in the file."""

    def __init__(self, name: str, values: Sequence[Read], rounding: Rounding) -> None:
        self._name = name
        self._rounding = rounding
        self._left = list(values)
        self._form = FORMATS[rounding.quantized.format]
        self._scale = rounding.quantized.layers[name].input_scale
        self._held = TORCH_DTYPES[rounding.dtype]

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments with the first as the file has it."""
        if not self._left or self._left[0][1].size != given[0].numel():
            raise self._wrong(f"other calls than the file, or one of shape {tuple(given[0].shape)}")
        pair = self._left.pop(0)
        raw, found = (
            torch.from_numpy(each.astype(np.float32)).reshape(given[0].shape) for each in pair
        )
        self._require_steps(found)
        if self._rounding.relative is not None:
            self._require_near(raw, given[0].cpu().float(), self._rounding.relative)
            self._require_nearest(raw, found)
        return (found.to(given[0]), *given[1:])

    def _require_steps(self, found: Tensor) -> None:
        """Every value is a number of the format times the scale, in the dtype of the file."""
        numbers = self._form.numbers(found, self._scale)
        expected = self._form.values(numbers, self._scale).to(self._held).float()
        # NaN is what padding of the file may hold, and is compared nowhere.
        wrong = (expected != found) & ~found.isnan()
        if bool(wrong.any()):
            raise self._wrong(
                f"inputs such as {float(found[wrong][0]):g}, which is no number of "
                f"{self._form.name} times its scale {self._scale:g}"
            )

    def _require_near(self, raw: Tensor, own: Tensor, relative: float) -> None:
        """What is to be rounded is what PyTorch has."""
        slack = relative * float(own.abs().max()) if own.numel() else 0.0
        # Not `>`, which NaN would pass.
        wrong = ~((raw - own).abs() <= slack)
        if bool(wrong.any()):
            raise self._wrong(
                f"the input {float(raw[wrong][0]):g} where PyTorch has {float(own[wrong][0]):g}, "
                f"more than the tolerance {slack:.3g} apart"
            )

    def _require_nearest(self, raw: Tensor, found: Tensor) -> None:
        """Numbers are roundings of the value, up to that of its division by the scale."""
        slack = torch.finfo(self._held).eps * raw.abs()
        least, most = (
            self._form.numbers(raw + end, self._scale).float() for end in (-slack, slack)
        )
        numbers = self._form.numbers(found, self._scale).float()
        wrong = ~((least <= numbers) & (numbers <= most))
        if bool(wrong.any()):
            raise self._wrong(
                f"the input {float(raw[wrong][0]):g} rounded to {float(found[wrong][0]):g}, which "
                f"is not its number in {self._form.name} by the scale {self._scale:g}"
            )

    def _wrong(self, what: str) -> ExportError:
        return ExportError(
            f"Quantised layer {self._name} of {self._rounding.path} has {what}; the file must not "
            "be used, export it again."
        )
