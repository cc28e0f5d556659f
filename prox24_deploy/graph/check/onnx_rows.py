"""Read the weights of one ONNX file and say of each whether it is 2:4."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from prox24_deploy.core.errors import Prox24Error, UsageError
from prox24_deploy.core.records import TensorCheck
from prox24_deploy.graph.check.constants import constant_of, read_tensor, release, sizes_of
from prox24_deploy.graph.check.eligibility import obstacles, refusal, wide_output
from prox24_deploy.graph.check.evaluation import Budget, NotComputedError
from prox24_deploy.graph.check.folding import nodes_of, stored_elements
from prox24_deploy.graph.check.inspection import Finding, inspect_groups, unread
from prox24_deploy.graph.check.judgement import Candidate, Scan
from prox24_deploy.graph.check.model_file import SPARSE_META, load_onnx
from prox24_deploy.graph.check.modules import declared_modules, module_of
from prox24_deploy.graph.check.weights import ConstantWeight, find_weights

# A weight is made of itself, a mask and a scale or two.
_MOST_NAMES = 8
_REPLACEABLE = "it is the default of an input of the graph, which a caller can replace"
_SET_APART = "remove its name from the inputs of the graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What a weight holds along `axis`; `unproven` says that its finding proves neither."""

    finding: Finding
    axis: int
    unproven: bool = False
    remedy: str = ""


def scan_onnx(path: Path) -> Scan:
    """Every weight of one ONNX file, and the modules that it declares as 2:4.

    Raises:
        UsageError: the file or its external data is missing, damaged or outside its folder, or its
            graph breaks the standard.
    """
    try:
        return _scan(path)
    except (Prox24Error, MemoryError):
        raise
    except Exception as error:  # a file made to break readers can break any line of this one
        said = next(iter(str(error).splitlines()), "")[:200]
        raise UsageError(
            f"{path} breaks the standard of ONNX in a way that the check does not expect "
            f"({type(error).__name__}: {said}); export it again."
        ) from error


def _scan(path: Path) -> Scan:
    model = load_onnx(path)
    declared = declared_modules(model, path)
    budget = Budget.of(stored_elements(model))
    refused = refusal(nodes_of(model), path, model.meta.get(SPARSE_META, ""))
    rows = [
        _candidate(weight, path, budget, refused) for weight in find_weights(model, path, budget)
    ]
    return Scan(declared, tuple(rows), declares_tensors=False)


def _candidate(weight: ConstantWeight, path: Path, budget: Budget, refused: str) -> Candidate:
    verdict = _verdict(weight, path, budget)
    node, finding = weight.nodes[0], verdict.finding
    multiplied = weight.exact or weight
    dtype = "" if multiplied.dtype is None else _type_name(multiplied.dtype)
    rules = obstacles(node.op_type, node.domain, dtype, multiplied.gemm)
    if dtype == "int8" and (wide := next(filter(None, map(wide_output, weight.nodes)), "")):
        rules.append(wide)
    problems = ["it is not proven 2:4"] if finding.reason else []
    problems += [refused] if refused else []
    problems += rules
    stored = constant_of(weight.value) or weight.tensor
    check = TensorCheck(
        tensor=weight.value.name or "",
        module=module_of(node),
        node=node.name or "",
        op_type=node.op_type,
        dtype=_type_name(stored.dtype),
        shape=finding.shape,
        axis=verdict.axis,
        density=finding.density,
        is_24=not finding.reason,
        expected=False,
        first_violation=finding.first,
        reason=finding.reason,
        part=finding.part or _made_of(weight),
        eligible=not problems,
        ineligible_reason="; ".join(problems),
        unproven=verdict.unproven,
        remedy=verdict.remedy if verdict.unproven else "",
    )
    modules = frozenset(module_of(node) for node in weight.nodes) - {""}
    return Candidate(check=check, keys=modules, made_of=weight.made_of)


def _verdict(weight: ConstantWeight, path: Path, budget: Budget) -> _Verdict:
    """Look at the stored tensor, and where that does not settle it, at what is multiplied."""
    try:
        budget.spend(weight.view.size)
        finding = _inspected(weight, path)
    except NotComputedError as error:
        finding = unread(str(error), sizes_of(weight.tensor))
        return _Verdict(finding=finding, axis=weight.axis, unproven=True, remedy=weight.remedy)
    doubt = weight.reason or (weight.doubt if finding.reason else "")
    if doubt:
        return _settled(weight, path, finding, doubt)
    if not finding.reason and weight.replaceable:
        finding = replace(finding, reason=_REPLACEABLE)
        return _Verdict(finding=finding, axis=weight.axis, unproven=True, remedy=_SET_APART)
    return _Verdict(finding=finding, axis=-1 if weight.moved else weight.axis)


def _settled(weight: ConstantWeight, path: Path, finding: Finding, doubt: str) -> _Verdict:
    """Look at the weight as it is multiplied, if that can be computed.

    Where its elements have other places then, it keeps the shape and density that are stored.
    """
    exact = weight.exact
    finding = replace(finding, first=None, reason=doubt)
    unproven = _Verdict(finding=finding, axis=weight.axis, unproven=True, remedy=weight.remedy)
    if exact is None or exact.reason:
        return unproven
    try:
        found = _inspected(exact, path)
    except NotComputedError:
        return unproven
    if exact.moved:
        return _Verdict(finding=replace(finding, reason=found.reason), axis=-1)
    return _Verdict(finding=found, axis=exact.axis)


def _inspected(weight: ConstantWeight, path: Path) -> Finding:
    array = read_tensor(weight.tensor, weight.value.name or "", path)
    finding = inspect_groups(
        array, weight.view, weight.reduction, weight.axis, weight.zero, weight.reason
    )
    if weight.moved:
        reason = finding.reason and f"as it is multiplied, {finding.reason}"
        finding = replace(finding, first=None, reason=reason)
    del array
    # Pages of a large model would pile up in memory if every weight stayed mapped.
    release(weight.tensor)
    return finding


def _made_of(weight: ConstantWeight) -> str:
    """The tensors that a computed weight is made of, where they are several."""
    names = weight.made_of[:_MOST_NAMES]
    return f" (computed from {', '.join(names)})" if len(names) > 1 else ""


def _type_name(dtype: ir.DataType) -> str:
    try:
        return str(dtype.numpy().name)
    except TypeError:  # a type that NumPy lacks
        return dtype.name.lower()
