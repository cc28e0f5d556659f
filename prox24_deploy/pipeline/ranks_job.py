"""One of several processes that prune: torchrun starts `python -m` this module with a file."""

import json
import sys
from pathlib import Path
from typing import Any

from prox24_deploy.core.child import end_on_termination, end_with_starter
from prox24_deploy.core.errors import (
    BackendMissingError,
    Prox24Error,
    RankGoneError,
    UsageError,
    explained,
)
from prox24_deploy.pipeline import run
from prox24_deploy.pipeline.ranks import ERROR, OPTIONS, PROGRESS, is_helper

# What is raised in the place of an error that is not ours, by the exit code that it asks for.
_OF_CODE = {kind.exit_code: kind for kind in (Prox24Error, UsageError, BackendMissingError)}


def main(file: str) -> None:
    """Prune as the file says; progress and an error go to stdout, a JSON object a line.

    Raises:
        Exception: what pruning raises, once it is told, for torchrun to see that it failed.
    """
    end_on_termination()
    end_with_starter()
    job = json.loads(Path(file).read_text())
    options = OPTIONS.validate_python(job["options"])
    model_dir = Path(job["model_dir"])
    try:
        if is_helper():
            run.help_to_prune(model_dir, options)
        else:
            run.prune(
                model_dir, Path(job["out"]), options, fresh=job["fresh"], progress=_tell_progress
            )
    except RankGoneError:
        # What started this knows how far all came, and from torchrun which process is gone.
        raise
    except Exception as error:
        message, code = explained(error)
        kind = type(error) if isinstance(error, Prox24Error) else _OF_CODE[code]
        _tell(kind=ERROR, type=kind.__name__, message=message)
        raise


def _tell_progress(label: str, done: int, total: int) -> None:
    _tell(kind=PROGRESS, label=label, done=done, total=total)


def _tell(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
