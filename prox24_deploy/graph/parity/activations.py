"""What each module of a model gives on its way, and whether a narrower dtype could hold it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.module import TORCH_DTYPES

See = Callable[[str, torch.Tensor], None]


@contextmanager
def watched(model: nn.Module, see: See) -> Iterator[None]:
    """Call `see(path, output)` for every floating output of each module, in order of completion.

    The model itself, whose path is "", is left out.
    """

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            for each in output if isinstance(output, tuple) else (output,):
                if isinstance(each, torch.Tensor) and each.is_floating_point():
                    see(name, each.detach())

        return hook

    handles = [
        module.register_forward_hook(hook_for(name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def range_guard(dtype: DType) -> See:
    """Refuse an activation that `dtype` cannot hold; to be passed to `watched`.

    It sees what modules give, not what happens inside one, such as attention scores. It raises
    ExportError, naming the module, and never for float32 and bfloat16, which span the same range.
    """
    limit = torch.finfo(TORCH_DTYPES[dtype]).max

    def see(name: str, output: torch.Tensor) -> None:
        if dtype != "float16" or not output.numel():
            return
        largest = float(output.abs().max())
        if largest > limit:
            raise ExportError(
                f"Module {name} gives values up to {largest:g}, which do not fit {dtype}, whose "
                f"limit is {limit:g}; export with --dtype bfloat16 or float32."
            )

    return see
