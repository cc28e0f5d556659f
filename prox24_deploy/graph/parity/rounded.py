"""Compare the rounding of a quantised file with PyTorch, step by step.

An activation that lies between two numbers of an 8-bit format may fall on either side in two
runtimes, and everything behind is different then by far more than the rounding of floats. So here
PyTorch follows the file: each quantised layer reads what it read there, and gives what it gave
where that is rounded too, once the value in front of the rounding was seen to be that of PyTorch,
within the tolerance for a model that is not quantised, and its number a rounding of it. Behind it
both compute with equal numbers, so the same tolerance
holds at the next layer and at the outputs. A wrong scale, axis, zero point or weight shows at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

# A module path, and which end of that layer is rounded.
Side = Literal["input", "output"]
Place = tuple[str, Side]
# What is rounded there in a file, and what becomes of it.
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


def rounded_values(model: ir.Model) -> dict[Place, list[tuple[ir.Value, ir.Value]]]:
    """What is rounded at quantised layers, and what becomes of it, a pair for each call."""
    found: dict[Place, list[tuple[ir.Value, ir.Value]]] = {}
    for each in quantised_nodes(model):
        pairs: dict[Side, tuple[ir.Node, ir.Node]] = {"input": (each.quantiser, each.dequantiser)}
        if each.rounded:
            pairs["output"] = each.rounded
        for side, (quantiser, dequantiser) in pairs.items():
            if (given := quantiser.inputs[0]) is not None:
                pair = (given, dequantiser.outputs[0])
                found.setdefault((each.module, side), []).append(pair)
    return found


@contextmanager
def following(
    model: nn.Module, read: Mapping[Place, Sequence[Read]], rounding: Rounding
) -> Iterator[None]:
    """Within it, layers of `model` read and give `read`, in the order of their calls.

    Raises:
        ExportError: while the model runs, names the layer at which something else is rounded in the
            file than in PyTorch, or to what is no rounding of it by its scale.
    """
    handles = []
    for (name, side), values in read.items():
        followed = _Followed(name, side, values, rounding)
        module = model.get_submodule(name)
        if side == "input":
            handles.append(module.register_forward_pre_hook(followed.read))
        else:
            handles.append(module.register_forward_hook(followed.give))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Followed:
    """Hooks that replace the input or the output of a layer by what it was in the file."""

    def __init__(self, name: str, side: Side, values: Sequence[Read], rounding: Rounding) -> None:
        self._name = name
        self._side = side
        self._rounding = rounding
        self._left = list(values)
        self._form = FORMATS[rounding.quantized.format]
        layer = rounding.quantized.layers[name]
        self._scale = (layer.input_scale if side == "input" else layer.output_scale) or 0.0
        self._held = TORCH_DTYPES[rounding.dtype]

    def read(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments with the first as the file has it."""
        return (self._followed(given[0]), *given[1:])

    def give(self, _: nn.Module, __: object, made: Tensor) -> Tensor:
        """The output as the file has it."""
        return self._followed(made)

    def _followed(self, own: Tensor) -> Tensor:
        if not self._left or self._left[0][1].size != own.numel():
            raise self._wrong(f"other calls than the file, or one of shape {tuple(own.shape)}")
        pair = self._left.pop(0)
        raw, found = (torch.from_numpy(each.astype(np.float32)).reshape(own.shape) for each in pair)
        if self._scale == 0:
            raise self._wrong(f"an {self._side} that is rounded without a scale for it")
        self._require_steps(found)
        if self._rounding.relative is not None:
            self._require_near(raw, own.cpu().float(), self._rounding.relative)
            self._require_nearest(raw, found)
        return found.to(own)

    def _require_steps(self, found: Tensor) -> None:
        """Every value is a number of the format times the scale, in the dtype of the file."""
        numbers = self._form.numbers(found, self._scale)
        expected = self._form.values(numbers, self._scale).to(self._held).float()
        # NaN is what padding of the file may hold, and is compared nowhere.
        wrong = (expected != found) & ~found.isnan()
        if bool(wrong.any()):
            raise self._wrong(
                f"{self._side}s such as {float(found[wrong][0]):g}, which is no number of "
                f"{self._form.name} times its scale {self._scale:g}"
            )

    def _require_near(self, raw: Tensor, own: Tensor, relative: float) -> None:
        """What is to be rounded is what PyTorch has."""
        slack = relative * float(own.abs().max()) if own.numel() else 0.0
        # Not `>`, which NaN would pass.
        wrong = ~((raw - own).abs() <= slack)
        if bool(wrong.any()):
            raise self._wrong(
                f"the {self._side} {float(raw[wrong][0]):g} where PyTorch has "
                f"{float(own[wrong][0]):g}, more than the tolerance {slack:.3g} apart"
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
                f"the {self._side} {float(raw[wrong][0]):g} rounded to "
                f"{float(found[wrong][0]):g}, which is not its number in {self._form.name} by the "
                f"scale {self._scale:g}"
            )

    def _wrong(self, what: str) -> ExportError:
        return ExportError(
            f"Quantised layer {self._name} of {self._rounding.path} has {what}; the file must not "
            "be used, export it again."
        )
