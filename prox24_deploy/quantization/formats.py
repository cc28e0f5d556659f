"""The 8-bit formats: how a value becomes a number of the format, and what that number stands for.

Both are symmetric: value ≈ scale · number and the zero point is 0, so that a zero stays a zero and
a 2:4 weight stays 2:4. Rounding is to the nearest number, ties to even, and saturates, as in the
QuantizeLinear of ONNX.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.core.types import QuantizedFormat

# The smallest and the greatest number of an activation.
_RANGES = {torch.float8_e4m3fn: (-448.0, 448.0), torch.int8: (-128.0, 127.0)}


def to_numbers(values: Tensor, scale: Tensor | float, kind: torch.dtype) -> Tensor:
    """Numbers of `values`, of any shape: the nearest to values / scale, saturating.

    `scale` broadcasts. A NaN stays one in FP8; int8 has none.
    """
    least, greatest = _RANGES[kind]
    scaled = (values.float() / scale).clamp(least, greatest)
    # A cast to integers would round towards zero.
    return (scaled if kind.is_floating_point else scaled.round()).to(kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """An 8-bit format.

    Attributes:
        name: on the command line and in files.
        dtype: in which numbers are stored.
    """

    name: QuantizedFormat
    dtype: torch.dtype

    @property
    def largest(self) -> float:
        """The greatest number, and the greatest magnitude of a weight."""
        return _RANGES[self.dtype][1]

    def numbers(self, values: Tensor, scale: Tensor | float) -> Tensor:
        """Numbers of activations, of any shape, in `dtype`; `scale` broadcasts."""
        return to_numbers(values, scale, self.dtype)

    def weight_numbers(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Numbers of a matrix (n, k) with one scale for each row, (n,)."""
        scaled = weight.float() / scale[:, None]
        return to_numbers(scaled.clamp(-self.largest, self.largest), 1.0, self.dtype)

    def values(self, numbers: Tensor, scale: Tensor | float) -> Tensor:
        """What numbers stand for, float32; `scale` broadcasts."""
        return numbers.float() * scale


FORMATS: dict[QuantizedFormat, NumberFormat] = {
    "fp8": NumberFormat(name="fp8", dtype=torch.float8_e4m3fn),
    "int8": NumberFormat(name="int8", dtype=torch.int8),
}


def exact_scale(scale: Tensor) -> Tensor:
    """The nearest scale that float16 and bfloat16 both hold exactly, float32.

    A runtime that keeps scales in the dtype of the model then computes with the same ones. What is
    below the smallest number of float16 becomes that.
    """
    rounded = scale.to(torch.bfloat16).to(torch.float16).float()
    smallest = torch.finfo(torch.float16).smallest_normal / 1024
    return rounded.clamp(smallest, torch.finfo(torch.bfloat16).max).clamp(max=65280.0)
