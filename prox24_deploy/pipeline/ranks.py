"""Pruning by several processes: those that torchrun started, or that a build starts by it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from pydantic import TypeAdapter

from prox24_deploy.config.options import BuildOptions
from prox24_deploy.core import errors
from prox24_deploy.core.errors import BackendMissingError, Prox24Error, RankError, UsageError
from prox24_deploy.core.types import Progress
from prox24_deploy.engines.child import end_child
from prox24_deploy.pipeline.context import RunContext, torch_device

if TYPE_CHECKING:
    from prox24_deploy.pruning.ranks import Ranks

OPTIONS = TypeAdapter(BuildOptions)
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
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
            f"--nproc-per-node={count}",
            sys.executable, "-m", "prox24_deploy.pipeline.ranks_job", str(file),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as child:
            try:
                found = _followed(child, progress)
            except BaseException:
                end_child(child)
                raise
        if child.returncode:
            raise found or RankError(
                f"Pruning by {count} processes ended with exit code {child.returncode} "
                f"({_last_line(log)}); solved blocks are kept, run the same command again."
            )


def _require_gpus(count: int, options: BuildOptions) -> None:
    import torch

    if torch_device(options.device).type != "cuda":
        return
    if count > (there := torch.cuda.device_count()):
        raise BackendMissingError(
            f"--gpus {count} asks for more GPUs than the {there} that torch finds; pass --gpus "
            f"{there} or look at CUDA_VISIBLE_DEVICES."
        )


def _followed(child: "subprocess.Popen[bytes]", progress: Progress) -> Prox24Error | None:
    """Hand on the progress of a job until it ends; the first error that it told."""
    found: Prox24Error | None = None
    for line in child.stdout or ():
        told = _parsed(line)
        if told.get("kind") == PROGRESS:
            progress(str(told["label"]), int(told["done"]), int(told["total"]))
        elif told.get("kind") == ERROR:
            kind = getattr(errors, str(told["type"]), Prox24Error)
            # Others say only that the one with an error of its own is gone.
            if found is None or isinstance(found, RankError):
                found = kind(str(told["message"]))
    child.wait()
    return found


def _parsed(line: bytes) -> dict[str, Any]:
    """One line of a job; libraries may write others."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = map(str.strip, log.read().decode(errors="replace").splitlines())
    # torchrun rules lines off.
    said = [line for line in lines if line.strip("=-")]
    return said[-1] if said else "nothing was said"
