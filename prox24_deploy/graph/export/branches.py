"""Branches of a model on the values of its activations, which no graph can have."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AllFinite(TorchFunctionMode):
    """Within it, Python takes `torch.isfinite(x).all()` for true; the tensors are what they were.

    Models of the kin of BART clamp float16 activations that have overflowed, and ask for it in
    Python, where tracing needs an answer. What is traced with this one never clamps; `range_guard`
    refuses a model that would have needed it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Held, so that identity means something.
        self._answers: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = bool(args) and any(args[0] is answer for answer in self._answers)
        if func is Tensor.__bool__ and known:
            return True
        result = func(*args, **(kwargs or {}))
        if func is torch.isfinite or (func is Tensor.all and known):
            self._answers.append(result)
        return result
