"""Compare the rounding of a quantised file with PyTorch, step by step.

An activation that lies between two numbers of an 8-bit format may fall on either side in two
runtimes, and everything behind is different then by far more than the rounding of floats. So here
PyTorch follows the file: each quantised layer reads what it read there, once that was seen to be a
rounding of what PyTorch has itself. Behind it, both compute with equal numbers, and the same
tolerance holds as for a model that is not quantised.
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


def rounded_values(model: ir.Model) -> dict[str, list[ir.Value]]:
    """What the quantised layers of a graph read, by module path, one value for each call."""
    found: dict[str, list[ir.Value]] = {}
    for each in quantised_nodes(model):
        found.setdefault(each.module, []).append(each.input)
    return found


@contextmanager
def following(
    model: nn.Module, read: Mapping[str, Sequence[Array]], rounding: Rounding
) -> Iterator[None]:
    """Within it, layers of `model` read `read`, by module path, in the order of their calls.

    Raises:
        ExportError: while the model runs, names the layer that read something in the file that is
            no rounding, by its scale, of what it reads in PyTorch.
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

    def __init__(self, name: str, values: Sequence[Array], rounding: Rounding) -> None:
        self._name = name
        self._rounding = rounding
        self._left = list(values)
        self._form = FORMATS[rounding.quantized.format]
        self._scale = rounding.quantized.layers[name].input_scale

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments with the first as the file has it."""
        if not self._left or self._left[0].size != given[0].numel():
            raise self._wrong(f"other calls than the file, or one of shape {tuple(given[0].shape)}")
        found = torch.from_numpy(self._left.pop(0).astype(np.float32)).reshape(given[0].shape)
        self._require_steps(found)
        if self._rounding.relative is not None:
            self._require_near(found, given[0].cpu().float(), self._rounding.relative)
        return (found.to(given[0]), *given[1:])

    def _require_steps(self, found: Tensor) -> None:
        """Every value is a number of the format times the scale, in the dtype of the file."""
        numbers = self._form.numbers(found, self._scale)
        held = TORCH_DTYPES[self._rounding.dtype]
        expected = self._form.values(numbers, self._scale).to(held).float()
        # NaN is what padding of the file may hold, and is compared nowhere.
        wrong = (expected != found) & ~found.isnan()
        if bool(wrong.any()):
            raise self._wrong(
                f"inputs such as {float(found[wrong][0]):g}, which is no number of "
                f"{self._form.name} times its scale {self._scale:g}"
            )

    def _require_near(self, found: Tensor, own: Tensor, relative: float) -> None:
        """Rounding is monotone, so what is within reach of a value rounds between its ends."""
        slack = relative * float(own.abs().max()) if own.numel() else 0.0
        least, most = (
            self._form.numbers(own + end, self._scale).float() for end in (-slack, slack)
        )
        numbers = self._form.numbers(found, self._scale).float()
        # Not `<`, which NaN would pass.
        wrong = ~((least <= numbers) & (numbers <= most))
        if bool(wrong.any()):
            raise self._wrong(
                f"the input {float(found[wrong][0]):g} for {float(own[wrong][0]):g} in PyTorch, "
                f"which is no rounding to {self._form.name} by its scale {self._scale:g}"
            )

    def _wrong(self, what: str) -> ExportError:
        return ExportError(
            f"Quantised layer {self._name} of {self._rounding.path} has {what}; the file must not "
            "be used, export it again."
        )
