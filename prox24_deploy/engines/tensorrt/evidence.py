"""Which layers run on sparse kernels, from what the builder of an engine said and recorded.

The builder's log tells what it found eligible and what it chose, in two wordings: that of today
(TensorRT 10 and 11) and the one of its developer guide until 2024. The inspector's JSON tells the
kernel of each layer. `HasSparseWeights` in it speaks of weights and not of kernels (issue 4694 of
github.com/NVIDIA/TensorRT), so only the name of the kernel counts.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence

from prox24_deploy.core.records import (
    BuilderSparsity,
    EngineEvidence,
    Kernel,
    LayerEvidence,
    TensorCheck,
)

# Below this many channels sparse kernels seldom win (issue 3849).
SMALL = 256

_SPARSE_KERNEL = re.compile(r"sparse_gemm|sparse_conv|spmma|spgemm|sptensor")
# How graph/eligibility.py words the rule for types.
_TYPE_RULE = re.compile(r"(?:^|; )\w+ has no sparse kernels(?:;|$)")
# Kernels that multiply matrices at all. Of what was fused around one, and of the stub that stands
# in TensorRT-RTX for a kernel chosen on the GPU, nothing follows.
_MATRIX_KERNEL = re.compile(r"gemm|conv|mma|sptensor", re.IGNORECASE)
_FOUND = re.compile(
    r"\(Sparsity\) (?:Found ([0-9]{1,9}) layer\(s\) eligible to use sparse tactics"
    r"|Layers eligible for sparse math):?"
)
_CHOSE = re.compile(
    r"\(Sparsity\) (?:Chose ([0-9]{1,9}) layer\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers):?"
)
# Where another thread's line begins in the middle of one.
_NEXT_RECORD = re.compile(r"\[[0-9]{2}/[0-9]{2}/[0-9]{4}-|\[TRT\]|\[[A-Z!]\] |\(Sparsity\)|\r?\n")
# What separates the nodes that one layer was fused from.
_BETWEEN_NODES = re.compile(r"[\s,\[\]{}\x1e]+|\|\||\+")
_FUSION_SUFFIX = re.compile(r"_myl[0-9]+_[0-9]+$")

Names = tuple[str, ...]


def parse_builder(log: str, layers_json: str = "") -> BuilderSparsity:
    """Read the last word of a builder on sparse layers; never raises.

    A log has a pair of lines for each pass over the tactics, of which the last one speaks of the
    engine. Whatever is missing, cut off or torn apart by another thread's line is None or left
    out, so that fewer names than the number says mean an incomplete list.

    Args:
        log: everything that the builder printed.
        layers_json: the inspector's JSON; "" where there is none.
    """
    found = list(_FOUND.finditer(log))
    chose = list(_CHOSE.finditer(log))
    if found:
        # A choice before the last search belongs to an earlier pass.
        chose = [match for match in chose if match.start() > found[-1].start()]
    eligible, eligible_layers = _list_after(log, found[-1]) if found else (None, ())
    chosen, chosen_layers = _list_after(log, chose[-1]) if chose else (None, ())
    return BuilderSparsity(
        eligible=eligible,
        chosen=chosen,
        eligible_layers=eligible_layers,
        chosen_layers=chosen_layers,
        kernels=parse_layers(layers_json),
    )


def parse_layers(layers_json: str) -> tuple[Kernel, ...]:
    """The layers of an inspector's JSON, of TensorRT 10 or 11, with their kernels; never raises.

    Layers of an engine that was built without details are bare names and tell no kernel.
    """
    try:
        document = json.loads(layers_json)
    except (ValueError, RecursionError):
        return ()
    layers = document.get("Layers") if isinstance(document, dict) else None
    return tuple(
        Kernel(
            layer=str(layer.get("Name") or ""),
            nodes=str(layer.get("Metadata") or ""),
            tactic=str(layer.get("TacticName") or ""),
        )
        for layer in (layers if isinstance(layers, list) else ())
        if isinstance(layer, dict)
    )


def is_sparse_kernel(tactic: str) -> bool:
    """Whether a kernel of this name multiplies 2:4 matrices."""
    return _SPARSE_KERNEL.search(tactic) is not None


def engine_evidence(
    backend: str,
    device: str,
    said: BuilderSparsity | None,
    sparsity: Sequence[TensorCheck],
    unknown: str,
) -> EngineEvidence:
    """Combine what the builder said with the proof on the file, layer by layer.

    The builder's word goes before our rules for shapes and types. A layer that it does not list
    counts as not eligible, or not chosen, only where its list is complete and each of its names
    was found in the file.

    Args:
        backend: name of the backend.
        device: in words.
        said: by the builder of the sparse engine; None where it could say nothing.
        sparsity: every weight of the sparse file.
        unknown: why nothing is known, for a builder that said nothing.
    """
    said = said or BuilderSparsity(eligible=None, chosen=None)
    expected = [check for check in sparsity if check.expected]
    known = {name for check in sparsity for name in _names(check)}
    layers = tuple(_judged(check, said, known, unknown) for check in expected)
    sparse = [kernel for kernel in said.kernels if is_sparse_kernel(kernel.tactic)]
    chosen = len(sparse) if said.chosen is None and _tells_kernels(said) else said.chosen
    return EngineEvidence(
        backend=backend,
        device=device,
        eligible=said.eligible,
        chosen=chosen,
        summary=_summary(said, chosen, sparse, unknown),
        layers=layers,
    )


def _list_after(log: str, match: re.Match[str]) -> tuple[int | None, Names]:
    """The number that a line gives and the names behind it."""
    end = _NEXT_RECORD.search(log, match.end())
    text = log[match.end() : end.start() if end else len(log)]
    names = tuple(name.strip() for name in _split(text) if name.strip())
    if match[1] is not None:
        return int(match[1]), names
    # The older wording gives no number: only a line with its end tells all names.
    whole = end is not None and end[0] in ("\n", "\r\n")
    return (len(names) if whole else None), names


def _split(text: str) -> list[str]:
    """The names of a list; a fused one may have commas within brackets, as `PWN(a, b)`."""
    names: list[str] = []
    open_brackets = 0
    for part in text.split(", "):
        if open_brackets > 0:
            names[-1] += f", {part}"
        else:
            names.append(part)
        open_brackets += part.count("(") - part.count(")")
    return names


def _names(check: TensorCheck) -> set[str]:
    """What a layer of the engine may call the layer of this weight."""
    return {name for name in (check.node, check.module) if name}


def _nodes(layer: str) -> set[str]:
    """The nodes that a layer's name or metadata lists; none for a region told by its ends."""
    if "ForeignNode" in layer:
        return set()
    parts = _BETWEEN_NODES.split(layer.replace("ONNX Layer:", " "))
    return {_FUSION_SUFFIX.sub("", part) for part in parts if part}


def _listed(check: TensorCheck, count: int | None, layers: Names, known: set[str]) -> bool | None:
    """Whether a list of the builder has this layer; None where it does not tell."""
    if any(_nodes(layer) & _names(check) for layer in layers):
        return True
    mapped = all(_nodes(layer) & known for layer in layers)
    return False if count == len(layers) and mapped else None


def _kernels(check: TensorCheck, kernels: Iterable[Kernel]) -> list[str]:
    """Matrix kernels of the layers that this one became part of."""
    return [
        kernel.tactic
        for kernel in kernels
        if _MATRIX_KERNEL.search(kernel.tactic)
        and (_nodes(kernel.layer) | _nodes(kernel.nodes)) & _names(check)
    ]


def _judged(
    check: TensorCheck, said: BuilderSparsity, known: set[str], unknown: str
) -> LayerEvidence:
    obstacle = _obstacle(check)
    eligible = _listed(check, said.eligible, said.eligible_layers, known)
    if eligible is None and obstacle:
        eligible = False
    kernels = _kernels(check, said.kernels)
    sparse = [tactic for tactic in kernels if is_sparse_kernel(tactic)]
    chosen = _listed(check, said.chosen, said.chosen_layers, known)
    if sparse:
        chosen = True
    elif chosen is None and (kernels or eligible is False):
        chosen = False
    module = check.module or check.tensor
    if chosen:
        return LayerEvidence(
            module=module,
            eligible=True,
            chosen=True,
            reason=f"kernel {sparse[0]}" if sparse else "",
        )
    return LayerEvidence(
        module=module,
        eligible=eligible,
        chosen=chosen,
        reason=_why_not(
            check, eligible=eligible, chosen=chosen, obstacle=obstacle, unknown=unknown
        ),
    )


def _why_not(
    check: TensorCheck, *, eligible: bool | None, chosen: bool | None, obstacle: str, unknown: str
) -> str:
    if eligible is False:
        return obstacle or "unknown: TensorRT does not list it as eligible and gives no reason"
    if chosen is None:
        return f"unknown: {unknown}"
    if eligible is None:
        return "unknown: TensorRT does not name the layers that it found eligible"
    k = check.shape[check.axis] if 0 <= check.axis < len(check.shape) else 0
    n = math.prod(check.shape) // max(k, 1)
    if 0 < min(n, k) <= SMALL:
        return f"too small: N = {n}, K = {k}, and sparse kernels seldom win below {SMALL}"
    return "timed slower: TensorRT timed sparse kernels and took a dense one"


def _obstacle(check: TensorCheck) -> str:
    """The rule that keeps sparse kernels from this weight, "" if none does."""
    if not check.is_24:
        return f"not 2:4: {check.reason}"
    if check.eligible or not check.ineligible_reason:
        return ""
    kind = "dtype" if _TYPE_RULE.search(check.ineligible_reason) else "shape rule"
    return f"{kind}: {check.ineligible_reason}"


def _tells_kernels(said: BuilderSparsity) -> bool:
    return any(_MATRIX_KERNEL.search(kernel.tactic) for kernel in said.kernels)


def _summary(
    said: BuilderSparsity, chosen: int | None, sparse: Sequence[Kernel], unknown: str
) -> str:
    if said.eligible is None and chosen is None:
        return f"sparse kernels: unknown, {unknown}"
    found = "an unknown number of" if said.eligible is None else str(said.eligible)
    took = "it is unknown for how many" if chosen is None else f"sparse ones for {chosen}"
    text = f"the builder found {found} layers eligible for sparse kernels and chose {took}"
    if _tells_kernels(said) and said.chosen is not None and said.chosen != len(sparse):
        text += f"; the inspector shows {len(sparse)} sparse kernels"
    return text
