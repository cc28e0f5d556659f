"""Products of float32 matrices on the tensor cores of a GPU: in TF32, or as exact as float32.

TF32 reads 11 significant bits of each factor and sums in float32; on Hopper it is about seven times
as fast as float32. It serves where a product of rounded factors is as good: forward passes, Gram
matrices, which stay Gram matrices of the rounded inputs, and the iterations of a solver. The right
side of a linear system and the residuals of its solution need float32. There each factor is taken
as the sum of two numbers of TF32, and three products give all but a part in 2²¹.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What TF32 leaves out of the significand of a float32: thirteen bits.
_TF32_BITS = -(1 << 13)


def tensor_cores(device: torch.device) -> AbstractContextManager[None]:
    """Round the factors of all float32 products to TF32 on a GPU; on a CPU nothing changes."""
    return _precision("high") if device.type == "cuda" else nullcontext()


def float32_products() -> AbstractContextManager[None]:
    """Round nothing to TF32, in solving with a triangle neither, whatever holds outside."""
    return _precision("highest")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    # The name decides for both of these too, where nothing may have been decided yet. Inductor's
    # cache knows a graph by them, so a twin would not be found there after pruning.
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    decided = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, decided, strict=True):
            backend.fp32_precision = precision


@dataclass(frozen=True, slots=True)
class ExactFactor:
    """A matrix that others are multiplied by as exactly as float32 allows.

    Attributes:
        whole: (d, n), float32.
        parts: its high and its low bits, two numbers of TF32 that sum to it; none where products
            are taken in float32.
    """

    whole: Tensor
    parts: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, matrix: Tensor) -> "ExactFactor":
        """Prepare a factor once for many products."""
        return cls(matrix, _split(matrix) if _has_tf32(matrix) else None)

    def after(self, rows: Tensor) -> Tensor:
        """The product `rows` @ matrix, (m, d) by (d, n)."""
        if self.parts is None:
            return rows @ self.whole
        (high, low), (own_high, own_low) = _split(rows), self.parts
        with tensor_cores(rows.device):
            product = low @ own_high
            product.addmm_(high, own_low)
            return product.addmm_(high, own_high)


def _has_tf32(matrix: Tensor) -> bool:
    if matrix.device.type != "cuda" or matrix.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(matrix.device) >= (8, 0)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The high bits of each number, and what is left of it; both sum to it without rounding."""
    high = (matrix.contiguous().view(torch.int32) & _TF32_BITS).view(torch.float32)
    return high, matrix - high
