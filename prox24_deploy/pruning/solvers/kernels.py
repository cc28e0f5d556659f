"""Where kernels that are written in Triton can run."""

import importlib.util

from torch import Tensor


def has_triton(tensor: Tensor) -> bool:
    """Whether they can where a tensor is; torch for CUDA comes with Triton."""
    return tensor.device.type == "cuda" and importlib.util.find_spec("triton") is not None
