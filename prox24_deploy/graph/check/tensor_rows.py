"""Read the tensors of one safetensors file and say of each whether it is 2:4."""

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.eligibility import WeightShape, obstacles
from prox24_deploy.graph.check.inspection import Finding, inspect_groups
from prox24_deploy.graph.check.judgement import Candidate, Scan
from prox24_deploy.graph.check.layouts import Layout, NotSummed, Summed, Unknown, read_layout
from prox24_deploy.graph.check.packed import packed_formats, scaled_weight
from prox24_deploy.graph.check.strided import Strided
from prox24_deploy.graph.check.tensor_files import TensorEntry, TensorFile, open_tensor_file

_UNPACK = "check the checkpoint from which it was packed, or ignore the tensor"


def scan_safetensors(path: Path, axes: Mapping[str, int] | None = None) -> Scan:
    """Every tensor of rank two or more, and those that the file declares as 2:4.

    Args:
        path: of the file; a config.json beside it tells the layout.
        axes: globs over names, and the axis along which such tensors are summed.

    Raises:
        UsageError: the file is missing, damaged or one that no loader opens, or a declared axis is
            not one of the tensor.
    """
    file = open_tensor_file(path)
    layout = read_layout(path.parent)
    return _Reader(file, layout, axes or {}).scan()


class _Reader:
    """Reads one file whose layout is known or not."""

    def __init__(self, file: TensorFile, layout: Layout, axes: Mapping[str, int]) -> None:
        self._file = file
        self._layout = layout
        self._axes = axes
        self._declared = file.sparse_axes
        self._packed = packed_formats(file.tensors)
        self._shapes = {entry.name: entry.shape for entry in file.tensors}

    def scan(self) -> Scan:
        """Rows for all that may be weights."""
        declared = self._declared or {}
        rows = [
            self._row(entry)
            for entry in self._file.tensors
            if len(entry.shape) > 1 or entry.name in declared
        ]
        names = None if self._declared is None else frozenset(declared)
        return Scan(names, tuple(rows), declares_tensors=True)

    def _row(self, entry: TensorEntry) -> Candidate:
        packed = self._packed.get(entry.name)
        if packed is not None:
            return _unproven(entry, f"it is packed ({packed}), and not read", _UNPACK)
        if not entry.is_readable:
            return _unproven(entry, f"the check does not read its type {entry.dtype}", _UNPACK)
        declared = self._declared_axis(entry)
        if declared is not None:
            return self._along(entry, declared)
        weight = scaled_weight(entry, self._file.tensors)
        if weight:
            return _unproven(entry, f"it holds the scales of {weight!r}", "", never=True)
        told = self._told_axis(entry)
        if told is not None:
            return self._along(entry, told)
        if not entry.is_float:
            reason = f"it holds integers ({entry.dtype}): indices, or packed weights, not read"
            return _unproven(entry, reason, _UNPACK)
        role = self._layout.role(entry.name, entry.shape, self._shapes)
        match role:
            case Summed(axis, outputs):
                return self._along(entry, axis, outputs)
            case NotSummed(what):
                return _unproven(entry, f"it is {what}", "", never=True)
            case Unknown():
                return self._undecided(entry, role)

    def _declared_axis(self, entry: TensorEntry) -> int | None:
        axis = (self._declared or {}).get(entry.name)
        return self._within(entry, axis, f"{self._file.path} declares", "write the file again")

    def _told_axis(self, entry: TensorEntry) -> int | None:
        """Axis that the caller tells; the first glob that matches decides."""
        told = [axis for glob, axis in self._axes.items() if fnmatchcase(entry.name, glob)]
        return self._within(entry, told[0] if told else None, "--axis tells", "pass it again")

    def _within(self, entry: TensorEntry, axis: int | None, who: str, remedy: str) -> int | None:
        if axis is not None and not 0 <= axis < len(entry.shape):
            raise UsageError(
                f"{who} axis {axis} for tensor {entry.name!r} of shape {entry.shape}; "
                f"{remedy} with an axis from 0 to {len(entry.shape) - 1}."
            )
        return axis

    def _along(self, entry: TensorEntry, axis: int, outputs: int = -1) -> Candidate:
        """A tensor whose reduction axis is known."""
        finding = self._inspected(entry, axis)
        count = math.prod(entry.shape[:axis] or entry.shape[1:2])
        gemm = WeightShape(n=count if outputs < 0 else entry.shape[outputs], k=entry.shape[axis])
        return _candidate(entry, finding, axis, gemm)

    def _undecided(self, entry: TensorEntry, role: Unknown) -> Candidate:
        """A tensor that is 2:4 if it is along every axis that may be summed.

        One that is 2:4 along none of them is not 2:4, if it is a weight at all.
        """
        findings = {axis: self._inspected(entry, axis) for axis in role.axes}
        sparse = [axis for axis, finding in findings.items() if not finding.reason]
        if len(sparse) == len(findings):
            return _candidate(entry, findings[sparse[0]], -1, None)
        if not sparse and role.is_weight:
            last = max(findings)
            return _candidate(entry, findings[last], last, None)
        if sparse:
            along = " and ".join(map(str, sparse))
            reason = (
                f"it is 2:4 along axis {along} only, and along which axis it is summed is unknown"
            )
        else:
            reason = "whether it is a weight, and along which axis it is summed, is unknown"
        density = findings[max(findings)].density
        return _unproven(entry, reason, role.remedy, density=density)

    def _inspected(self, entry: TensorEntry, axis: int) -> Finding:
        if not entry.size:
            return Finding(density=0.0, first=None, reason="", part="", shape=entry.shape)
        array = self._file.read(entry)
        return inspect_groups(array, Strided.of(entry.shape), axis, axis, 0, "")


def _candidate(
    entry: TensorEntry, finding: Finding, axis: int, gemm: WeightShape | None
) -> Candidate:
    """A tensor that was read along an axis, or along several, which is -1."""
    rules = obstacles("", "", entry.type_name, gemm)
    problems = ["it is not proven 2:4", *rules] if finding.reason else rules
    check = TensorCheck(
        tensor=entry.name,
        module=entry.name.removesuffix(".weight"),
        node="",
        op_type="",
        dtype=entry.type_name,
        shape=entry.shape,
        axis=axis,
        density=finding.density,
        is_24=not finding.reason,
        expected=False,
        first_violation=finding.first,
        reason=finding.reason,
        eligible=not problems,
        ineligible_reason="; ".join(problems),
    )
    return Candidate(check=check, keys=frozenset({entry.name}))


def _unproven(
    entry: TensorEntry, reason: str, remedy: str, *, never: bool = False, density: float = 0.0
) -> Candidate:
    """A tensor that nothing is proven of; one that is `never` expected is no weight."""
    made = _candidate(
        entry,
        Finding(density=density, first=None, reason=reason, part="", shape=entry.shape),
        -1,
        None,
    )
    check = replace(made.check, unproven=True, remedy=remedy)
    return replace(made, check=check, never=never)
