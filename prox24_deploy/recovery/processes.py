"""Several processes that train one model together, each on a share of every batch.

The process group and the device of each process are accelerate's. A step adds up the gradients of
all, so that every process takes the same step from the same weights. Batches, their order and the
state on disk are those of one process: how many there are changes rounding, and for losses that are
no sum over tokens the weights of samples within a batch.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from prox24_deploy.core.child import end_after
from prox24_deploy.core.errors import EngineError, Prox24Error, UsageError
from prox24_deploy.core.types import PATIENCE, Progress
from prox24_deploy.model.batch import Batch, rows_of

_START = "forkserver"
# Seconds between looks at what they told.
_LOOK_EVERY = 0.05
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "DefaultCPUAllocator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The processes that train together, seen from one of them; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def shares(self, batches: Sequence[Batch]) -> list[Batch]:
        """Every batch whose turn it is, and of those that do not come out even every such row.

        Turns of rows go on from batch to batch, so that batches of one row go round.
        """
        even = len(batches) // self.size * self.size
        found, before = list(batches[self.rank : even : self.size]), 0
        for batch in batches[even:]:
            mine = slice((self.rank - before) % self.size, None, self.size)
            found.append(rows_of(batch, mine))
            before += len(batch.real)
        return [part for part in found if len(part.real)]

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place: that of accelerate copies it twice."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def sums(self, *numbers: float) -> list[float]:
        """Sums of numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.add_up(summed)
        found: list[float] = summed.tolist()
        return found

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The first process goes ahead; the others follow once it is done, and find its files."""
        if self.size == 1:
            yield
            return
        from accelerate import PartialState

        with PartialState().main_process_first():
            yield


def require_processes(processes: int, device: torch.device) -> None:
    """Refuse more processes than can run, before any work.

    Raises:
        UsageError: there are fewer GPUs, or the number is below 1.
    """
    if processes < 1:
        raise UsageError(f"Recovery takes 1 process or more, got {processes}.")
    if processes == 1:
        return
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UsageError(
            f"--recover-processes {processes} takes a GPU each, and torch finds "
            f"{torch.cuda.device_count()}; pass that number, or --device cpu."
        )


def run_together(
    task: Callable[[Crew, torch.device, Progress], None],
    processes: int,
    device: torch.device,
    progress: Progress,
) -> None:
    """Run a task in several new processes, and wait for all.

    Args:
        task: what each does; must be importable, as must its parts, for it is sent there.
        processes: how many.
        device: "cuda" for a GPU each, or the CPU.
        progress: told what the first process tells.

    Raises:
        EngineError: a process ended without a word.
        torch.OutOfMemoryError: one ran out of memory.
        Prox24Error: whatever the first of them raised.
    """
    # A server that has imported all forks them; it has never used a GPU, which a fork cannot.
    context = mp.get_context(_START)
    context.set_forkserver_preload(["prox24_deploy.recovery.recover", "accelerate"])
    told: SimpleQueue[Any] = context.SimpleQueue()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # As bytes: a tensor that is shared is a file descriptor, and no more than some 250 can be sent.
    packed, level = pickle.dumps(task), logging.getLogger("prox24_deploy").level
    arguments = (packed, processes, device.type, place, told, level)
    running = start_processes(_work, arguments, processes, join=False, start_method=_START)
    try:
        done = False
        while not done:
            done = running.join(timeout=_LOOK_EVERY)
            _tell(told, progress)
    except ProcessRaisedException as error:
        _tell(told, progress)
        if any(word in str(error) for word in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
    except ProcessExitedException as error:
        raise EngineError(
            f"A process of the recovery ended without a word ({error}); the model is as it was, "
            "and the same command goes on from the last check."
        ) from error
    finally:
        _end(running.processes)


class _Sender(logging.Handler):
    """Sends lines of the log at once, so that a process that is ended has sent them."""

    def __init__(self, told: "SimpleQueue[Any]") -> None:
        super().__init__()
        self.told = told

    def emit(self, record: logging.LogRecord) -> None:
        """Put it into a queue without a thread of its own, its text made."""
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.told.put(record)


def _end(processes: Sequence[Any]) -> None:
    for each in processes:
        if each.is_alive():
            each.terminate()
        each.join()


def _tell(told: "SimpleQueue[Any]", progress: Progress) -> None:
    """Hand on what the processes sent: progress, lines of the log, and errors of our own."""
    while not told.empty():
        found = told.get()
        if isinstance(found, logging.LogRecord):
            logging.getLogger(found.name).handle(found)
        elif isinstance(found, Prox24Error):
            raise found
        else:
            progress(*found)


def _work(
    rank: int,
    packed: bytes,
    size: int,
    kind: str,
    place: dict[str, str],
    told: "SimpleQueue[Any]",
    level: int,
) -> None:
    """What each process runs; says what went wrong, if it was foreseen."""
    from accelerate import PartialState

    # The server that forked this process outlives what started both.
    if (starter := parent_process()) is not None:
        end_after(starter.join)
    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    log = logging.getLogger("prox24_deploy")
    log.setLevel(level)
    # The others would say the same.
    log.addHandler(_Sender(told) if rank == 0 else logging.NullHandler())
    state = PartialState(cpu=kind != "cuda", timeout=PATIENCE)

    def progress(label: str, done: int, total: int) -> None:
        if rank == 0:
            told.put((label, done, total))

    task: Callable[[Crew, torch.device, Progress], None] = pickle.loads(packed)
    try:
        task(Crew(rank=rank, size=size), state.device, progress)
    except Prox24Error as error:
        told.put(error)
        raise
    finally:
        state.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
