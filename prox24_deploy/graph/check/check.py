"""Prove on a file that its weights are 2:4 along the axis that their consumers reduce.

A weight is 2:4 when every group of four consecutive elements along its reduction axis holds at
most two non-zeros. Every constant that feeds a product is listed as 2:4, as not 2:4, or as not
proven with the reason. A file may declare which of its weights are meant to be 2:4, under the
metadata key `prox24.sparse_weights`: in ONNX a JSON list of module paths, in safetensors a JSON
object from tensor name to axis. `graph.judgement` says what is expected of which file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.judgement import CheckReport, judge, require_24
from prox24_deploy.graph.check.onnx_rows import scan_onnx
from prox24_deploy.graph.check.shards import require_index
from prox24_deploy.graph.check.tensor_files import open_tensor_file
from prox24_deploy.graph.check.tensor_rows import scan_safetensors

_READ = (".onnx", ".safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz")

__all__ = ["CheckReport", "check_onnx", "check_path", "check_safetensors", "require_24"]


def check_onnx(path: Path) -> tuple[TensorCheck, ...]:
    """Check every constant of one ONNX file that a node multiplies and sums over.

    The weight is followed from its consumer back to the stored tensors, and the axis with it
    (`graph.operands` has the axes). A tensor that is split gives a check for each part, a weight
    that is joined from several tensors, or chosen among them at run time, one for each of them.
    What cannot be followed or computed is not proven and says why. `module` is that of the first
    consumer.

    Raises:
        UsageError: the file or its external data is missing, damaged or outside its folder, or its
            graph breaks the standard.
    """
    return judge([scan_onnx(path)], ())


def check_safetensors(path: Path) -> tuple[TensorCheck, ...]:
    """Check the tensors of one safetensors file.

    Declared tensors are checked along the axis declared for them, every other tensor of rank two or
    more along the axis that the config.json beside the file tells (`graph.layouts`). Without one, a
    tensor is 2:4 only if it is along each axis that may be summed. Packed tensors are named and not
    read.

    Raises:
        UsageError: the file is missing, damaged or one that no loader opens.
    """
    return judge([scan_safetensors(path)], ())


def check_path(
    path: Path, ignore: Sequence[str] = (), axes: Mapping[str, int] | None = None
) -> CheckReport:
    """Check an ONNX file, a safetensors file, or a folder of either.

    Each ONNX file of a folder is judged on its own; its safetensors files are the shards of one
    model and declare for each other.

    Args:
        path: file, or folder that directly holds `*.onnx` or `*.safetensors` files.
        ignore: globs over tensor names and module paths that are not expected to be 2:4 where the
            file declares nothing.
        axes: globs over names of tensors in safetensors files, and the axis along which they are
            summed, for what neither the file nor its config.json tells.

    Raises:
        UsageError: nothing at `path` can be checked, or a file is damaged.
    """
    models = [[scan_onnx(file)] for file in _files(path, ".onnx")]
    files = _files(path, ".safetensors")
    shards = [scan_safetensors(file, axes) for file in files]
    if path.is_dir():
        require_index(path, {file: open_tensor_file(file).names for file in files})
    scans = [*models, shards] if shards else models
    tensors = tuple(check for group in scans for check in judge(group, ignore))
    if not tensors:
        raise UsageError(
            f"{path} holds no weight to check; pass a file with MatMul, Gemm or Conv weights, or "
            "a model folder with .safetensors or .onnx files."
        )
    declared = any(scan.declared is not None for group in scans for scan in group)
    return CheckReport(
        path=str(path),
        declared=declared,
        tensors=tensors,
        unread=_unread(path) if path.is_dir() else (),
    )


def _unread(folder: Path) -> tuple[str, ...]:
    """Files in or right below a folder that may hold weights of the model and are not read."""
    beside = [file for file in folder.glob("*") if file.suffix in _OTHER_WEIGHTS]
    below = [file for file in folder.glob("*/*") if file.suffix in (*_READ, *_OTHER_WEIGHTS)]
    return tuple(sorted(str(file.relative_to(folder)) for file in (*beside, *below)))


def _files(path: Path, suffix: str) -> list[Path]:
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; pass an .onnx or .safetensors file, or a folder of them."
        )
    if path.is_dir():
        return sorted(path.glob(f"*{suffix}"))
    if path.suffix not in _READ:
        raise UsageError(
            f"{path} has suffix {path.suffix!r}; pass an .onnx or .safetensors file, or a folder "
            "of them."
        )
    return [path] if path.suffix == suffix else []
