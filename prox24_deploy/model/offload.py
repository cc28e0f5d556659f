"""Models whose blocks stay in the checkpoint until they run: transformers and accelerate do it.

Whatever lies outside of the blocks is on the device; a block is read from its weight files, in
float32, when a forward pass reaches it, and given up again behind it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.host import free_memory
from prox24_deploy.model.batch import Batch

META = torch.device("meta")
# What a batch takes on its way through a model, as a share of the weights.
_WORK = 0.25


def block_map(model: nn.Module, blocks: Iterable[str], device: torch.device) -> dict[str, str]:
    """Where each part of a model goes, as `device_map` of transformers: its blocks to the disk.

    Args:
        model: of the structure in question, on any device.
        blocks: paths of the lists of blocks.
        device: for everything else.
    """
    lists = set(blocks)
    places = dict.fromkeys(lists, "disk")
    _place(model, "", lists, str(device), places)
    return places


def _place(
    module: nn.Module, path: str, lists: set[str], device: str, places: dict[str, str]
) -> None:
    """Add what lies below a module that holds blocks: the most that goes to the device as one."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places.update({f"{path}{name}": device for name, _ in own})
    for name, child in module.named_children():
        full = f"{path}{name}"
        if full in lists:
            continue
        if any(each.startswith(f"{full}.") for each in lists):
            _place(child, f"{full}.", lists, device, places)
        else:
            places[full] = device


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs, some of its blocks in memory or not."""
    return next(p.device for p in model.parameters() if p.device != META)


def float_bytes(module: nn.Module) -> int:
    """Bytes of its parameters in float32; one that two modules share counts once."""
    return 4 * sum(parameter.numel() for parameter in module.parameters())


def logits_bytes(structure: nn.Module, samples: Iterable[Batch]) -> int:
    """Bytes, in float32, of what a model with a vocabulary predicts for its largest batch; else 0.

    Args:
        structure: of the model, on any device.
        samples: batches.
    """
    of = getattr(structure, "get_output_embeddings", None)
    head = of() if of else None
    if head is None:
        return 0
    return 4 * len(head.weight) * max((batch.positions for batch in samples), default=0)


def free_on(device: torch.device, limit: int | None) -> int:
    """Bytes that are free on a device, and no more than `limit`."""
    free = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return free if limit is None else min(free, limit)


def fits(
    structure: nn.Module,
    count: float,
    device: torch.device,
    limit: int | None,
    *,
    samples: Iterable[Batch] = (),
) -> bool:
    """Whether so many models of a structure, and the work of one, fit into memory as a whole.

    Each then predicts for the same batch, of which `samples` are all, at a time.
    """
    whole = (count + _WORK) * float_bytes(structure)
    return whole + count * logits_bytes(structure, samples) <= free_on(device, limit)


def is_offloaded(model: nn.Module) -> bool:
    """Whether blocks of a model are read when they run."""
    return any(parameter.device == META for parameter in model.parameters())


def bring(block: nn.Module, device: torch.device) -> None:
    """Read the weights of one block and keep them, float32 on `device`, until `drop`.

    Changed or not, they never reach the files that they were read from.
    """
    from accelerate.utils import set_module_tensor_to_device

    for module in block.modules():
        for name, value in _offloaded(module):
            # A tensor read from a file may be a view of the file.
            set_module_tensor_to_device(
                module, name, device, value=value.to(device, torch.float32, copy=True)
            )
        _unhook(module)
    block.requires_grad_(requires_grad=False)


def keep_by(model: nn.Module, keep: Callable[[str, Tensor], Tensor]) -> None:
    """Read the weights of a model one by one, and have it hold what `keep` makes of each.

    That is called with the name of a parameter and its value in the dtype that the model holds it
    in, for those outside of its blocks too; one that modules share comes once. Buffers are read as
    they are.
    """
    # With what each was, so that no other has its identity meanwhile.
    known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, module in model.named_modules():
        values = dict(_offloaded(module))
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if id(parameter) not in known:
                value = values.get(name, parameter).to(parameter.dtype)
                value = keep(f"{path}.{name}" if path else name, value)
                known[id(parameter)] = parameter, nn.Parameter(value, requires_grad=False)
            setattr(module, name, known[id(parameter)][1])
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if name in values:
                setattr(module, name, values[name].to(buffer.dtype, copy=True))
        _unhook(module)


def read(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, from the checkpoint where it is not in memory."""
    return dict(_offloaded(module)).get(name, module.get_parameter(name))


def drop(block: nn.Module) -> None:
    """Give up the weights of a block that was brought and will not run again."""
    block.to(META)


def _unhook(module: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    # It leaves the method of the class as one of the module.
    own = vars(module).get("forward")
    if getattr(own, "__func__", None) is type(module).forward:
        del module.forward


def _offloaded(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of one module that are not in memory, with their values."""
    values: Mapping[str, Tensor] | None = _weights_map(getattr(module, "_hf_hook", None))
    own: Iterable[tuple[str, Any]] = (
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    )
    for name, tensor in own:
        if tensor.device == META and values is not None:
            yield name, values[name]


def _weights_map(hook: object) -> Mapping[str, Tensor] | None:
    """What the hook of accelerate reads from; several hooks of one module are a sequence."""
    if hook is None:
        return None
    for each in getattr(hook, "hooks", (hook,)):
        if (found := getattr(each, "weights_map", None)) is not None:
            return found  # type: ignore[no-any-return]
    return None
