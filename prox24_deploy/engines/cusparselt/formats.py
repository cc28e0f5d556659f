"""The formats of GEMMs: what their operands are held in, and what the kernels for them ask for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmShape

# Of every product of 8-bit operands, whatever the dtype of the model. It holds any sum of such
# products, which float16 does not, and its rounding, 2⁻⁹ of a value, is far below theirs.
WIDE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What both operands of a GEMM are held in.

    Attributes:
        dtype: of weight and activations.
        weight_multiple: rows and columns of a compressed weight come in multiples of it. That is
            the rule of cuSPARSELt for structured matrices, by bytes.
        row_multiple: so do rows of activations, which are padded.
        capability: the least compute capability with sparse kernels for it.
    """

    dtype: torch.dtype
    weight_multiple: int
    row_multiple: int
    capability: tuple[int, int]


# https://docs.nvidia.com/cuda/cusparselt/functions.html, cusparseLtStructuredDescriptorInit and
# cusparseLtDenseDescriptorInit.
OPERANDS: dict[GemmFormat, Operands] = {
    "float16": Operands(dtype=torch.float16, weight_multiple=16, row_multiple=8, capability=(8, 0)),
    "bfloat16": Operands(
        dtype=torch.bfloat16, weight_multiple=16, row_multiple=8, capability=(8, 0)
    ),
    "fp8": Operands(
        dtype=torch.float8_e4m3fn, weight_multiple=32, row_multiple=16, capability=(8, 9)
    ),
    "int8": Operands(dtype=torch.int8, weight_multiple=32, row_multiple=16, capability=(8, 0)),
}
_FORMATS = {operands.dtype: format for format, operands in OPERANDS.items()}


def format_of(dtype: torch.dtype) -> GemmFormat:
    """The format whose operands have a dtype."""
    return _FORMATS[dtype]


def result_dtype(operand: torch.dtype) -> torch.dtype:
    """Dtype of a product: that of 16-bit operands, `WIDE` for 8-bit ones."""
    return operand if operand.itemsize == 2 else WIDE


def gpu_obstacle(format: GemmFormat, capability: tuple[int, int]) -> str:
    """Why a GPU of that compute capability has no kernels for a format; "" where it has."""
    least = OPERANDS[format].capability
    if capability >= least:
        return ""
    return (
        f"{format} needs compute capability {least[0]}.{least[1]}, and this GPU has "
        f"{capability[0]}.{capability[1]}"
    )


def sparse_shape(shape: GemmShape, format: GemmFormat) -> GemmShape:
    """The GEMM that cuSPARSELt computes for `shape`, its rows padded."""
    return replace(shape, m=shape.m + -shape.m % OPERANDS[format].row_multiple)


def padded(rows: Tensor, multiple: int) -> Tensor:
    """Rows with rows of zeros added up to a multiple; the same where there are so many."""
    # Padding by nothing would copy, and not all padding knows FP8.
    if not (missing := -len(rows) % multiple):
        return rows
    if rows.dtype.itemsize == 2:
        return functional.pad(rows, (0, 0, 0, missing))
    return functional.pad(rows.view(torch.uint8), (0, 0, 0, missing)).view(rows.dtype)
