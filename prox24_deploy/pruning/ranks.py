"""The processes that share one pruning run, by torch.distributed: started by torchrun, one a GPU.

Each takes some of the samples through the blocks; second moments are summed over all of them. The
rows of a layer do not depend on each other, so that each process solves some of the rows.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prox24_deploy.core.errors import CalibrationError, RankError, RankGoneError
from prox24_deploy.core.types import PATIENCE

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of one run.

    Attributes:
        number: of this process; 0 reads and writes the bundle.
        count: of processes.
        device: of what is exchanged: the GPU of this process with NCCL, the CPU with Gloo.
        here: how many of the processes are on this machine.
    """

    number: int
    count: int
    device: torch.device
    here: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that reads and writes the bundle."""
        return self.number == 0

    def share(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """Those of some items that are this process's: every `count`-th."""
        return tuple(items[self.number :: self.count])

    def rows(self, count: int) -> slice:
        """Which of so many rows this process solves."""
        each = -(-count // self.count)
        return slice(min(self.number * each, count), min((self.number + 1) * each, count))

    def sum_in_place(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes."""
        for tensor in tensors:
            self._exchange(partial(dist.all_reduce, tensor))

    def total(self, value: float) -> float:
        """Sum a number over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.sum_in_place(tensor)
        return float(tensor)

    def gathered(self, part: Tensor, count: int) -> Tensor:
        """All `count` rows, of which each process has its `rows`."""
        if self.count == 1:
            return part
        each = -(-count // self.count)
        padded = part.new_zeros(each, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(self.count, *padded.shape)
        # What gathers into one tensor is called differently from torch 2.13 on.
        self._exchange(partial(dist.all_gather, list(whole), padded))
        return whole.flatten(0, 1)[:count]

    def owner(self, item: int) -> int:
        """Which process has an item, by its place among all."""
        return item % self.count

    def from_owner(self, item: int, tensors: Sequence[Tensor]) -> None:
        """Give all processes the tensors of the one that has an item."""
        for tensor in tensors if self.count > 1 else ():
            self._exchange(partial(dist.broadcast, tensor, self.owner(item)))

    def told(self, value: Item) -> Item:
        """The value that process 0 has."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        self._exchange(partial(dist.broadcast_object_list, box, device=self.device))
        told: Item = box[0]
        return told

    def of_all(self, value: Item) -> list[Item]:
        """The value of each process, by its number."""
        found: list[Any] = [value] * self.count
        self._exchange(partial(dist.all_gather_object, found, value))
        return found

    def _exchange(self, call: Callable[[], Result]) -> Result | None:
        if self.count == 1:
            return None
        try:
            return call()
        except RuntimeError as error:
            # The library's own words are for those who wrote it.
            log.info("torch.distributed says: %s", error)
            raise RankGoneError(
                "Another process of this run is gone; see what it said, and run the same command "
                "again."
            ) from error


ALONE = Ranks(0, 1, torch.device("cpu"))


def first_unlike(found: Sequence[object]) -> int | None:
    """The first process whose value is not that of process 0."""
    return next((number for number, value in enumerate(found) if value != found[0]), None)


def unlike(number: int, what: str) -> RankError:
    """The refusal of a process that is not like process 0, for it has `what`."""
    return RankError(
        f"Process {number} of this run has {what}; start all with the same command, the same files "
        "and the same versions of everything installed."
    )


def require_batch_each(processes: int, batches: int) -> None:
    """Refuse calibration text that leaves a process without a batch.

    Raises:
        CalibrationError: says how many there are of both.
    """
    if not batches:
        raise CalibrationError("There is no calibration batch; pass more text.")
    if batches < processes:
        raise CalibrationError(
            f"{processes} processes need a batch of calibration text each, got {batches}; pass "
            "more text or start fewer processes."
        )


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that torchrun started, by NCCL on GPUs and Gloo on CPUs.

    Raises:
        RankError: there are fewer GPUs than processes on this machine.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RankError(
                f"Process {local} of this machine finds {torch.cuda.device_count()} GPUs, expected "
                "one for each process; start fewer, or pass --device cpu."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        count = dist.get_world_size()
        # torchrun says it; what does not, starts all on one machine.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
        yield Ranks(dist.get_rank(), count, device, here)
    finally:
        dist.destroy_process_group()


@contextmanager
def during(block: str, ranks: Ranks) -> Iterator[None]:
    """Say in which block another process was lost, or this one ended because another was.

    Raises:
        RankError: names the block.
    """
    try:
        yield
    except RankGoneError as error:
        raise RankError(
            f"Another process of this run is gone, which showed while block {block} was pruned; "
            f"{_AGAIN}"
        ) from error
    except BaseException as ending:
        if isinstance(ending, Exception) or ranks.count == 1:
            raise
        raise RankError(
            f"This process was told to end while block {block} was pruned, as when another is "
            f"gone; {_AGAIN}"
        ) from ending


def watched(steps: Iterator[Item], blocks: Iterable[str], ranks: Ranks) -> Iterator[Item]:
    """One step for each block, and what leads to it counts as `during` it, too."""
    for block in blocks:
        with during(block, ranks):
            step = next(steps)
        yield step
    # They clear up behind the last.
    next(steps, None)


_AGAIN = (
    "the blocks before it are kept, run the same command again, with as many processes as you like."
)
