"""A model repository of the Triton Inference Server: its configuration and its files.

The configuration is protobuf text of `inference.ModelConfig`, as model_config.proto of Triton
defines it. Data types are those that its two backends know, read in onnxruntime_utils.cc of
triton-inference-server/onnxruntime_backend: bfloat16 is not among those of ONNX Runtime.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prox24_deploy.bundle.manifest import FileEntry, hash_file
from prox24_deploy.config.recipe import GraphTensor
from prox24_deploy.core.atomic import copy_file, make_folder, write_atomic, writing
from prox24_deploy.core.errors import BundleError, UsageError
from prox24_deploy.core.types import Twin

ServingBackend = Literal["onnxruntime", "tensorrt"]

CONFIG_FILE = "config.pbtxt"
MODEL_FILES: dict[ServingBackend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
BATCH = "batch"

_DATA_TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "DOUBLE": "TYPE_FP64",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonOptions:
    """What is served, and how.

    Attributes:
        name: of the model; that of the source model where it is None.
        twin: which of the two models.
        backend: of Triton.
        max_batch: requests that Triton may join; 0 leaves the batch axis to the client, None
            means the largest batch that the bundle was built for.
        instances: copies on every device; None leaves it to Triton.
    """

    name: str | None = None
    twin: Twin = "sparse"
    backend: ServingBackend = "onnxruntime"
    max_batch: int | None = None
    instances: int | None = None


def model_config(
    name: str,
    backend: ServingBackend,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    *,
    max_batch: int,
    instances: int | None,
    comments: Sequence[str],
) -> str:
    """Text of config.pbtxt.

    With `max_batch` above 0 the first axis of every tensor is Triton's own and is left out of its
    dims; any other axis that may vary, such as the length of a cache, is -1. Requests are joined
    only where all their other axes agree, which Triton sees to.

    Raises:
        UsageError: a tensor has no such axis, or a type that the backend does not serve.
    """
    lines = [f"# {' '.join(comment.split())}" for comment in comments]
    lines += [
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend)}",
        f"default_model_filename: {_quoted(MODEL_FILES[backend])}",
        f"max_batch_size: {max_batch}",
    ]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            lines += [f"{kind} {{", *_tensor(tensor, backend, batched=max_batch > 0), "}"]
    lines.append("version_policy { latest { num_versions: 1 } }")
    if max_batch > 1:
        lines.append("dynamic_batching { }")
    if instances is not None:
        lines.append(f"instance_group {{ count: {instances} }}")
    return "\n".join(lines) + "\n"


def batches(tensors: Sequence[GraphTensor]) -> bool:
    """Whether every tensor begins with the axis of the batch, so that Triton can join requests."""
    return all(tensor.axes[:1] == (BATCH,) for tensor in tensors)


def model_name(wanted: str | None, title: str) -> str:
    """Name of a model and of its folder; without another that of the source, less its owner.

    Raises:
        UsageError: it cannot be the name of a folder.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(title).name) if wanted is None else wanted
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"Model name {name!r} cannot be used, expected letters, digits, '_', '-' and '.', "
            "beginning with none of the last two; pass another --name."
        )
    return name


def write_repository(
    out: Path, name: str, config: str, files: Mapping[str, tuple[Path, FileEntry]]
) -> Path:
    """Write OUT/NAME with its configuration and version 1 of the model; it appears at once.

    Args:
        out: the model repository; other models in it stay as they are.
        name: of the model.
        config: text of config.pbtxt.
        files: name within version 1 to the file and what its content must be.

    Returns:
        OUT/NAME.

    Raises:
        BundleError: there is such a model already, or a file changed while it was copied.
    """
    target = out / name
    if target.exists():
        raise BundleError(f"Model {target} exists already; remove it, or pass another --name.")
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    version = partial / "1"
    try:
        make_folder(version)
        for file, (source, expected) in files.items():
            copy_file(source, version / file)
            if hash_file(version / file) != expected:
                raise BundleError(
                    f"File {source} changed while it was copied to {target}; verify the bundle."
                )
        write_atomic(partial / CONFIG_FILE, config.encode())
        with writing(target):
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _tensor(tensor: GraphTensor, backend: ServingBackend, *, batched: bool) -> list[str]:
    axes = tensor.axes
    if batched and axes[:1] != (BATCH,):
        raise UsageError(
            f"Tensor {tensor.name!r} has axes {list(axes)}, of which the first is not {BATCH!r}, "
            "so that Triton cannot join requests; pass --max-batch 0."
        )
    dims = [axis if isinstance(axis, int) else -1 for axis in axes[batched:]]
    lines = [
        f"  name: {_quoted(tensor.name)}",
        f"  data_type: {_data_type(tensor, backend)}",
        f"  dims: [ {', '.join(map(str, dims or [1]))} ]",
    ]
    # Triton knows no tensor without axes; this says that the model's has none.
    return lines if dims else [*lines, "  reshape { shape: [ ] }"]


def _data_type(tensor: GraphTensor, backend: ServingBackend) -> str:
    known = _DATA_TYPES.get(tensor.dtype)
    if known is None or (backend == "onnxruntime" and tensor.dtype == "BFLOAT16"):
        raise UsageError(
            f"Tensor {tensor.name!r} is of type {tensor.dtype}, which Triton's backend {backend} "
            "does not serve; build the bundle with another --dtype."
        )
    return known


def _quoted(text: str) -> str:
    """A string of protobuf text, in which bytes outside of printable ASCII are octal."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{"".join(plain)}"'
