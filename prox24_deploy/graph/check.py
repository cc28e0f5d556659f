"""Prove on a file that its weights are 2:4 along the axis that their consumers reduce.

A weight is 2:4 when every group of four consecutive elements along its reduction axis holds at
most two non-zeros. A file may declare which of its weights are meant to be 2:4, under the metadata
key `prox24.sparse_weights`: in ONNX a JSON list of module paths, in safetensors a JSON object from
tensor name to axis. Then exactly those are expected to be 2:4, and one that is missing violates.
A file that declares nothing is expected to be 2:4 in every weight that the caller does not ignore,
so a dense model does not pass by saying nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from prox24_deploy.artifacts import TensorCheck
from prox24_deploy.documents import Document, read_json
from prox24_deploy.errors import SparsityLostError, UsageError
from prox24_deploy.graph.constants import read_tensor, release
from prox24_deploy.graph.eligibility import GemmShape, obstacles
from prox24_deploy.graph.groups import Array
from prox24_deploy.graph.inspection import Finding, inspect_groups
from prox24_deploy.graph.strided import Strided
from prox24_deploy.graph.tensor_files import TensorEntry, TensorFile, open_tensor_file
from prox24_deploy.graph.weights import (
    ConstantWeight,
    declared_modules,
    find_weights,
    load_model,
    module_of,
    zero_point_of,
)

_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """2:4 check of a file or folder; `declared` says that it names its own 2:4 weights."""

    path: str
    declared: bool
    tensors: tuple[TensorCheck, ...]

    @property
    def violations(self) -> tuple[TensorCheck, ...]:
        """The weights that are expected to be 2:4 and are not."""
        return tuple(check for check in self.tensors if check.expected and not check.is_24)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A checked weight and the names under which a declaration may mean it."""

    check: TensorCheck
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Scan:
    """What one file holds and declares: names of tensors (safetensors) or of modules (ONNX)."""

    declared: frozenset[str] | None
    weights: tuple[_Weight, ...]
    declares_tensors: bool


def check_onnx(path: Path) -> tuple[TensorCheck, ...]:
    """Check every constant of one ONNX file that a node multiplies and sums over.

    The weight is followed from its consumer back to the stored tensors, and the axis with it
    (`graph.operands` has the axes). A tensor that is split gives a check for each part, a weight
    that is joined from several tensors one for each of them. What cannot be followed or read is
    never 2:4 and says why. `module` is that of the first consumer.

    Raises:
        UsageError: the file or its external data is missing, damaged or outside its folder.
    """
    return _judge([_scan_onnx(path)], ())


def check_safetensors(path: Path) -> tuple[TensorCheck, ...]:
    """Check the weights of one safetensors file.

    Declared tensors are checked along the axis declared for them; every other tensor of rank two or
    more whose name ends in "weight" along axis 1, and expected to be 2:4 only if the file declares
    nothing.

    Raises:
        UsageError: the file is missing or damaged.
    """
    return _judge([_scan_safetensors(path)], ())


def check_path(path: Path, ignore: Sequence[str] = ()) -> CheckReport:
    """Check an ONNX file, a safetensors file, or a folder of either.

    Each ONNX file of a folder is judged on its own; its safetensors files are the shards of one
    model and declare for each other.

    Args:
        path: file, or folder that directly holds `*.onnx` or `*.safetensors` files.
        ignore: globs over tensor names and module paths that are not expected to be 2:4 where the
            file declares nothing.

    Raises:
        UsageError: nothing at `path` can be checked, or a file is damaged.
    """
    models = [[_scan_onnx(file)] for file in _files(path, ".onnx")]
    shards = [_scan_safetensors(file) for file in _files(path, ".safetensors")]
    scans = [*models, shards] if shards else models
    tensors = tuple(check for group in scans for check in _judge(group, ignore))
    if not tensors:
        raise UsageError(
            f"{path} holds no weight to check; pass a file with MatMul, Gemm or Conv weights, or "
            "a model folder with .safetensors or .onnx files."
        )
    declared = any(scan.declared is not None for group in scans for scan in group)
    return CheckReport(str(path), declared, tensors)


def require_24(report: CheckReport) -> None:
    """Do nothing if every expected weight is 2:4.

    Raises:
        SparsityLostError: names the first weight that is not, where, and how many others.
    """
    violations = report.violations
    if not violations:
        return
    worst = violations[0]
    what = f"tensor {worst.tensor!r}" if worst.tensor else "the weight"
    module = f" of module {worst.module!r}" if worst.module else ""
    where = f" along axis {worst.axis}" if worst.axis >= 0 else ""
    rest = len(violations) - 1
    others = f" ({rest} other weight{'s' if rest > 1 else ''} too)" if rest else ""
    remedy = (
        "write the file again from the pruned weights"
        if report.declared
        else "prune the model first, or ignore the weights that are meant to stay dense"
    )
    raise SparsityLostError(
        f"In {report.path}, {what}{module} is not 2:4{where}: {worst.reason}{others}; {remedy}."
    )


def _files(path: Path, suffix: str) -> list[Path]:
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; pass an .onnx or .safetensors file, or a folder of them."
        )
    if path.is_dir():
        found = sorted(path.glob(f"*{suffix}"))
        if suffix == ".safetensors":
            _require_all_shards(path, found)
        return found
    if path.suffix not in (".onnx", ".safetensors"):
        raise UsageError(
            f"{path} has suffix {path.suffix!r}; pass an .onnx or .safetensors file, or a folder "
            "of them."
        )
    return [path] if path.suffix == suffix else []


def _require_all_shards(folder: Path, found: list[Path]) -> None:
    index = folder / _INDEX_FILE
    if not index.is_file():
        return
    document = Document(str(index), UsageError, "copy it again")
    found_in = read_json(index, document)
    try:
        shards = set(found_in["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise document.refused("is damaged") from error
    missing = sorted(shards - {file.name for file in found})
    if missing:
        raise UsageError(f"{folder} lacks {missing[0]}, which {_INDEX_FILE} lists; copy it again.")


def _judge(scans: Sequence[_Scan], ignore: Sequence[str]) -> tuple[TensorCheck, ...]:
    """Decide which weights of one model are expected, and add the declared ones it lacks."""
    declarations = [scan.declared for scan in scans if scan.declared is not None]
    weights = [weight for scan in scans for weight in scan.weights]
    if not declarations:
        return tuple(
            replace(weight.check, expected=not _matches(weight, ignore)) for weight in weights
        )
    declared = frozenset[str]().union(*declarations)
    checks = [replace(weight.check, expected=bool(weight.keys & declared)) for weight in weights]
    found = frozenset[str]().union(*(weight.keys for weight in weights))
    return (*checks, *(_missing(name, scans[0]) for name in sorted(declared - found)))


def _matches(weight: _Weight, globs: Iterable[str]) -> bool:
    names = {weight.check.tensor, weight.check.module} - {""}
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _missing(name: str, scan: _Scan) -> TensorCheck:
    """Stand-in for a declared weight that is not in the file; `name` is what was declared."""
    return TensorCheck(
        tensor=name if scan.declares_tensors else "",
        module=name.removesuffix(".weight") if scan.declares_tensors else name,
        node="",
        op_type="",
        dtype="",
        shape=(),
        axis=-1,
        density=0.0,
        is_24=False,
        expected=True,
        first_violation=None,
        reason="it is declared as 2:4 but the file has no such weight",
    )


def _scan_onnx(path: Path) -> _Scan:
    model = load_model(path)
    declared = declared_modules(model, path)
    weights = tuple(_onnx_weight(weight, path) for weight in find_weights(model, path))
    return _Scan(declared, weights, declares_tensors=False)


def _onnx_weight(weight: ConstantWeight, path: Path) -> _Weight:
    name = weight.value.name or ""
    node = weight.nodes[0]
    array = read_tensor(weight.tensor, name, path)
    zero = zero_point_of(weight, path)
    if not weight.reason and zero is None:
        weight.reason = "its zero points are not one known constant"
    finding = inspect_groups(
        array, weight.view, weight.reduction, weight.axis, zero or 0, weight.reason
    )
    dtype = weight.dtype.numpy().name if weight.dtype is not None else ""
    rules = obstacles(node.op_type, node.domain, dtype, weight.gemm)
    check = _row(finding, array, weight.axis, rules)
    check = replace(
        check, tensor=name, module=module_of(node), node=node.name or "", op_type=node.op_type
    )
    del array
    # Pages of a large model would pile up in memory if every weight stayed mapped.
    release(weight.tensor)
    return _Weight(check, frozenset(module_of(node) for node in weight.nodes) - {""})


def _scan_safetensors(path: Path) -> _Scan:
    file = open_tensor_file(path)
    declared = file.sparse_axes
    axes = {
        entry.name: 1
        for entry in file.tensors
        if len(entry.shape) >= 2 and entry.name.endswith("weight")
    }
    axes.update(declared or {})
    weights = tuple(
        _stored_weight(file, entry, axes[entry.name])
        for entry in file.tensors
        if entry.name in axes
    )
    names = None if declared is None else frozenset(declared)
    return _Scan(names, weights, declares_tensors=True)


def _stored_weight(file: TensorFile, entry: TensorEntry, axis: int) -> _Weight:
    if not 0 <= axis < len(entry.shape):
        raise UsageError(
            f"{file.path} declares axis {axis} for tensor {entry.name!r} of shape {entry.shape}; "
            f"write the file again with an axis from 0 to {len(entry.shape) - 1}."
        )
    array = file.read(entry)
    finding = inspect_groups(array, Strided.of(entry.shape), axis, axis, 0, "")
    outputs = entry.shape[:axis] or entry.shape[1:2]
    gemm = GemmShape(math.prod(outputs), entry.shape[axis])
    check = _row(finding, array, axis, obstacles("", "", array.dtype.name, gemm))
    module = entry.name.removesuffix(".weight")
    check = replace(check, tensor=entry.name, module=module)
    return _Weight(check, frozenset({entry.name}))


def _row(finding: Finding, array: Array, axis: int, rules: Sequence[str]) -> TensorCheck:
    """Check of one stored tensor, still without the names of what reads it."""
    problems = ["it is not proven 2:4", *rules] if finding.reason else rules
    return TensorCheck(
        tensor="",
        module="",
        node="",
        op_type="",
        dtype=array.dtype.name,
        shape=finding.shape,
        axis=axis,
        density=finding.density,
        is_24=not finding.reason,
        expected=False,
        first_violation=finding.first,
        reason=finding.reason,
        part=finding.part,
        eligible=not problems,
        ineligible_reason="; ".join(problems),
    )
