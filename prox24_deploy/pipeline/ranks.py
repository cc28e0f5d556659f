"""Pruning by several processes: those that torchrun started, or that a build starts by it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core import errors
from prox24_deploy.core.child import end_child
from prox24_deploy.core.errors import BackendMissingError, Prox24Error, RankError, UsageError
from prox24_deploy.core.types import Progress
from prox24_deploy.pipeline.context import RunContext, torch_device

if TYPE_CHECKING:
    from prox24_deploy.pruning.ranks import Ranks

OPTIONS = TypeAdapter(BuildOptions)
# What torchrun says in the end of the process that failed first.
_ROOT_CAUSE = re.compile(
    r"Root Cause.*?^\s*rank\s*: (?P<rank>\d+).*?^\s*exitcode\s*: (?P<code>-?\d+)", re.DOTALL | re.M
)
# The last line of a traceback; behind the number of a process where torch writes it.
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]+(?:Error|Exception)\b.*\S)$", re.M)
# A line of a job on its output: progress, or the error that it ended with.
PROGRESS, ERROR = "progress", "error"


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or what does as it does, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_helper() -> bool:
    """Whether this process is one of several, and not the one that writes the bundle."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


def require_leader() -> None:
    """Refuse to build in a process that can only help.

    Raises:
        UsageError: this is not process 0.
    """
    if is_helper():
        raise UsageError(
            f"Process {os.environ['RANK']} of a run by torchrun cannot write the bundle; start "
            "torchrun with the command line, `torchrun ... -m prox24_deploy build MODEL_DIR`."
        )


def require_text_for_all(context: RunContext, options: BuildOptions) -> None:
    """Refuse more processes than there are batches of the user's text, before any starts or joins.

    Text that the model writes itself is there only later, and is then held to the same.

    Raises:
        CalibrationError: says how many there are of both.
    """
    # Brings torch, as the samples did.
    from prox24_deploy.pruning.ranks import require_batch_each

    count = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else options.gpus
    if options.text.calibration:
        require_batch_each(count, len(context.calibration.batches))


@contextmanager
def shared(options: BuildOptions) -> "Iterator[Ranks | None]":
    """The processes that share a run; None where there is one alone."""
    if not started_by_torchrun():
        yield None
        return
    from prox24_deploy.pruning.ranks import joined

    with joined(torch_device(options.device)) as ranks:
        yield ranks


def prune_by_processes(
    count: int,
    model_dir: Path,
    out: Path,
    options: BuildOptions,
    *,
    fresh: bool,
    progress: Progress,
) -> None:
    """Run the pruning stage into `out` by so many processes of this machine, one on each GPU.

    Raises:
        BackendMissingError: there are fewer GPUs.
        Prox24Error: whatever ended a process.
    """
    _require_gpus(count, options)
    job = {
        "model_dir": str(model_dir),
        "out": str(out),
        "fresh": fresh,
        "options": OPTIONS.dump_python(options, mode="json"),
    }
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        told = _Told()
        with subprocess.Popen(
            _command(count, file), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as child:
            try:
                _follow(child, told, progress)
            except BaseException:
                end_child(child)
                raise
        if child.returncode:
            log.seek(0)
            why = _reason(child.returncode, log.read().decode(errors="replace"))
            raise told.error or RankError(
                f"Pruning by {count} processes ended {told.where}: {why}; solved blocks are kept, "
                "run the same command again."
            )


def _command(count: int, file: Path) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
        f"--nproc-per-node={count}",
        sys.executable, "-m", "prox24_deploy.pipeline.ranks_job", str(file),
    ]  # fmt: skip


def _require_gpus(count: int, options: BuildOptions) -> None:
    import torch

    if torch_device(options.device).type != "cuda":
        return
    if count > (there := torch.cuda.device_count()):
        raise BackendMissingError(
            f"--gpus {count} asks for more GPUs than the {there} that torch finds; pass --gpus "
            f"{there} or look at CUDA_VISIBLE_DEVICES."
        )


@dataclass(slots=True)
class _Told:
    """What a job has told: its last progress, and the error that says most."""

    label: str = ""
    done: int = 0
    total: int = 0
    error: Prox24Error | None = None

    @property
    def where(self) -> str:
        """How far it came."""
        if not self.label:
            return "before the first block"
        if self.label == "prune" and self.done < self.total:
            return f"while block {self.done + 1} of {self.total} was pruned"
        return f"after {self.label} {self.done}/{self.total}"


def _follow(child: "subprocess.Popen[bytes]", found: _Told, progress: Progress) -> None:
    """Hand on the progress of a job until it ends, and keep what it told."""
    for line in child.stdout or ():
        told = _parsed(line)
        if told.get("kind") == PROGRESS:
            found.label = str(told["label"])
            found.done, found.total = int(told["done"]), int(told["total"])
            progress(found.label, found.done, found.total)
        elif told.get("kind") == ERROR:
            kind = getattr(errors, str(told["type"]), Prox24Error)
            # Others say only that the one with an error of its own is gone.
            if found.error is None or isinstance(found.error, RankError):
                found.error = kind(str(told["message"]))
    child.wait()


def _parsed(line: bytes) -> dict[str, Any]:
    """One line of a job; libraries may write others."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _reason(code: int, log: str) -> str:
    """Why a job ended with an exit code, by what torchrun and its processes said."""
    if code < 0:
        return f"torchrun was ended by {_signal(-code)}"
    cause = _ROOT_CAUSE.search(log)
    if cause and (of := int(cause["code"])) < 0:
        return f"process {cause['rank']} was ended by {_signal(-of)}"
    raised = [line for line in _RAISED.findall(log) if "ChildFailedError" not in line]
    if raised:
        return str(raised[-1])
    if cause:
        return f"process {cause['rank']} ended with exit code {cause['code']}"
    return f"torchrun ended with exit code {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
