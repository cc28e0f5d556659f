"""How an engine was built, in a file beside it: what opens it or serves it has to know."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.records import Engine, OnnxModel
from prox24_deploy.engines.tensorrt.job import Job

RECORD_FILE = "engine.json"

_AGAIN = "compile the model again"


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """Flags that an engine was built with, and per input the least and the largest batch."""

    flags: list[str]
    batches: dict[str, tuple[int, int]]


def write_build_record(plan: Path, made: Mapping[str, str], model: OnnxModel, job: Job) -> None:
    """Write how an engine was built beside it; `made` names the backend, its version and device."""
    record = {
        **made,
        "onnx": model.path,
        "onnx_sha256": model.sha256,
        "flags": job.flags,
        "profile": job.ranges,
        "compatibility": job.compatibility,
        "workspace_gib": job.workspace_gib,
        "builder_level": job.builder_level,
    }
    write_atomic(plan.with_name(RECORD_FILE), (json.dumps(record, indent=2) + "\n").encode())


def read_build_record(plan: Path, engine: Engine) -> BuildRecord:
    """How an engine was built, from the record beside it.

    Raises:
        EngineError: the record is damaged or of another model.
    """
    path = plan.with_name(RECORD_FILE)
    try:
        record = read_json(path, Document(f"Engine record {path}", EngineError, _AGAIN))
        flags, sha256 = list(record["flags"]), record["onnx_sha256"]
        batches = {
            name: (int(least[0]), int(most[0]))
            for name, (least, _, most) in record.get("profile", {}).items()
            if least
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EngineError(f"Engine record {path} cannot be read ({error}); {_AGAIN}.") from error
    if sha256 != engine.onnx_sha256:
        raise EngineError(
            f"Engine record {path} is of an ONNX file with hash {sha256}, expected "
            f"{engine.onnx_sha256}; {_AGAIN}."
        )
    return BuildRecord(flags, batches)
