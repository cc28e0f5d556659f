"""Hidden states between two blocks, batch by batch, kept where there is room for them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prox24_deploy.core.atomic import writing
from prox24_deploy.model.checkpoint import disk_errors

Place = Literal["device", "host", "disk"]


class HiddenStates(Protocol):
    """A tensor (batch, sequence, hidden) per batch, on the device once it is asked for.

    Wherever they are kept, what comes back has the bits that were given.
    """

    def __getitem__(self, batch: int) -> Tensor:
        """The states of one batch."""
        ...

    def __setitem__(self, batch: int, states: Tensor) -> None:
        """Replace the states of one batch."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """The states of every batch in turn."""
        ...


class OnHost:
    """In the memory of the host; asked for, they go to the device that they came from.

    Those of a GPU are in page-locked memory, from which it copies several times as fast. All copies
    are in the order of its stream, so that none waits for another.
    """

    def __init__(self, states: Iterable[Tensor]) -> None:
        self._kept: list[Tensor] = []
        for each in states:
            self._device = each.device
            self._kept.append(_on_host(each))

    def __getitem__(self, batch: int) -> Tensor:
        """The states of one batch."""
        return self._kept[batch].to(self._device, non_blocking=True)

    def __setitem__(self, batch: int, states: Tensor) -> None:
        """Replace the states of one batch."""
        kept = self._kept[batch]
        if (kept.shape, kept.dtype) == (states.shape, states.dtype):
            kept.copy_(states, non_blocking=True)
        else:
            self._kept[batch] = _on_host(states)

    def __iter__(self) -> Iterator[Tensor]:
        """The states of every batch in turn."""
        return (self[batch] for batch in range(len(self._kept)))


def _on_host(states: Tensor) -> Tensor:
    kept = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
    return kept.copy_(states, non_blocking=True)


class OnDisk:
    """In a file per batch, in a folder of its own."""

    def __init__(self, states: Iterable[Tensor], folder: Path) -> None:
        with writing(folder):
            folder.mkdir(parents=True)
        self._folder, self._count = folder, 0
        for batch, each in enumerate(states):
            self._device, self._count = each.device, batch + 1
            self[batch] = each

    def __getitem__(self, batch: int) -> Tensor:
        """The states of one batch."""
        return load_file(self._file(batch), device=str(self._device))["states"]

    def __setitem__(self, batch: int, states: Tensor) -> None:
        """Replace the states of one batch."""
        file = self._file(batch)
        with writing(file), disk_errors(file):
            save_file({"states": states.contiguous()}, file)

    def __iter__(self) -> Iterator[Tensor]:
        """The states of every batch in turn."""
        return (self[batch] for batch in range(self._count))

    def _file(self, batch: int) -> Path:
        return self._folder / f"{batch:05d}.safetensors"


Keep = Callable[[str, Iterable[Tensor]], HiddenStates]


def keep_on_device(_: str, states: Iterable[Tensor]) -> HiddenStates:
    """Keep the states of a stream where they are."""
    return list(states)


def keeper(place: Place, folder: Path) -> Keep:
    """How to keep streams in a place: called with a name, different for each, and the states.

    Args:
        place: of the states.
        folder: for `disk`; each stream makes a folder in it.
    """

    def keep(name: str, states: Iterable[Tensor]) -> HiddenStates:
        match place:
            case "device":
                return list(states)
            case "host":
                return OnHost(states)
            case "disk":
                return OnDisk(states, folder / name)

    return keep
