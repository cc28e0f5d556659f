"""Refuse an ONNX file of which two readers may take different tensors for the same weight.

Where a name, an attribute or a storage field is given twice, the readers of ONNX keep the first or
the last one: ONNX Runtime multiplies by the first of two initializers of one name, onnx_ir keeps
the last. A proof of one of them says nothing about the other, so such a file is refused.
"""

from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import onnx

from prox24_deploy.core.errors import UsageError

# More axes than NumPy can index.
_MOST_AXES = 64
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_STORAGE = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
_TYPES = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
_REMEDY = "export the file again"

_Scopes = tuple[Set[str], ...]


def require_sound(model: onnx.ModelProto, path: Path) -> None:
    """Check names, attributes and shapes of a whole model, subgraphs and functions included.

    Raises:
        UsageError: names the first thing that is given twice or cannot be stored.
    """
    _require_single(
        (entry.domain or "ai.onnx" for entry in model.opset_import), "operator set", path
    )
    _require_single((entry.key for entry in model.metadata_props), "metadata key", path)
    _require_text((entry.value for entry in model.metadata_props), "metadata", path)
    functions = (f"{f.domain}::{f.name}:{f.overload}" for f in model.functions)
    _require_single(functions, "local function", path)
    _require_sound_graphs(model.graph, path)
    for function in model.functions:
        _require_text((function.name, *function.input, *function.output), "local function", path)
        own = _named(function.input) | _outputs(function.node)
        for node in function.node:
            _require_sound_node(node, path)
            for graph in _graphs_of(node):
                _require_sound_graphs(graph, path, (own,))


def _require_sound_graphs(graph: onnx.GraphProto, path: Path, outside: _Scopes = ()) -> None:
    """Walk a graph and all graphs inside it; `outside` are the scopes whose names it can see."""
    pending = [(graph, outside)]
    while pending:
        graph, outside = pending.pop()
        named = (value.name for value in graph.output)
        told = (text for entry in graph.metadata_props for text in (entry.key, entry.value))
        _require_text((graph.name, *named, *told), "graph", path)
        own = _require_own_names(graph, path)
        scopes = (own, *outside)
        _require_own_outputs(graph, scopes, path)
        # A name that an input hides is no fault: every runtime takes the input.
        made = own - _named(value.name for value in graph.input)
        hidden = next((name for name in sorted(made) if _is_in(name, outside)), None)
        if hidden is not None:
            raise UsageError(
                f"{path} gives the name {hidden!r} to a value of subgraph {graph.name!r} and to "
                f"one outside of it, which runtimes resolve differently; {_REMEDY} with names "
                "that are unique."
            )
        for node in graph.node:
            _require_sound_node(node, path)
            pending.extend((inner, scopes) for inner in _graphs_of(node))


def _require_own_names(graph: onnx.GraphProto, path: Path) -> Set[str]:
    """Names that a graph defines, each of them once."""
    stored = [tensor.name for tensor in graph.initializer]
    stored += [tensor.values.name for tensor in graph.sparse_initializer]
    _require_single(stored, "initializer", path)
    made = [name for node in graph.node for name in node.output]
    _require_single([*made, *stored], "value", path)
    inputs = [value.name for value in graph.input]
    _require_single([*made, *inputs], "value", path)
    for tensor in (*graph.initializer, *_halves(graph.sparse_initializer)):
        _require_sound_tensor(tensor, path)
    return _named([*stored, *made, *inputs])


def _require_own_outputs(graph: onnx.GraphProto, scopes: _Scopes, path: Path) -> None:
    """A subgraph returns what it makes: what it only passes on would be lost by its readers."""
    own, *outside = scopes
    for value in graph.output:
        if value.name not in own and _is_in(value.name, tuple(outside)):
            raise UsageError(
                f"Subgraph {graph.name!r} of {path} returns {value.name!r}, which is made outside "
                f"of it; {_REMEDY} with an Identity for what is only passed on."
            )


def _is_in(name: str, scopes: _Scopes) -> bool:
    return any(name in scope for scope in scopes)


def _require_sound_node(node: onnx.NodeProto, path: Path) -> None:
    what = f"attribute of node {node.name!r} ({node.op_type})"
    told = (text for entry in node.metadata_props for text in (entry.key, entry.value))
    named = (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
    _require_text((*named, *told), f"node {node.name!r} ({node.op_type})", path)
    _require_single((attribute.name for attribute in node.attribute), what, path)
    _require_countable(node, path)
    for attribute in node.attribute:
        claimed = attribute.type == onnx.AttributeProto.TENSOR
        held = [attribute.t] if claimed or attribute.HasField("t") else []
        sparse = _halves([attribute.sparse_tensor, *attribute.sparse_tensors])
        for tensor in (*held, *attribute.tensors, *(t for t in sparse if t.ByteSize())):
            _require_sound_tensor(tensor, path)


def _halves(tensors: Iterable[onnx.SparseTensorProto]) -> list[onnx.TensorProto]:
    """Values and places of sparse tensors."""
    return [half for tensor in tensors for half in (tensor.values, tensor.indices)]


def _require_countable(node: onnx.NodeProto, path: Path) -> None:
    """What the standard forbids, and ONNX's own inference of shapes crashes or hangs on."""
    if node.domain not in _KNOWN_DOMAINS:
        # The attributes of an operator of one's own may mean anything.
        return
    numbers = {each.name: each.i for each in node.attribute if each.HasField("i")}
    axis, batch = numbers.get("axis", 0), numbers.get("batch_dims", 0)
    if not -_MOST_AXES <= axis <= _MOST_AXES or not 0 <= batch <= _MOST_AXES:
        raise UsageError(
            f"Node {node.name!r} ({node.op_type}) of {path} has axis {axis} and batch_dims {batch},"
            f" expected at most {_MOST_AXES} axes; {_REMEDY}."
        )
    parts = numbers.get("num_outputs", len(node.output))
    if node.op_type == "Split" and parts != len(node.output):
        raise UsageError(
            f"Node {node.name!r} (Split) of {path} has num_outputs {parts}, expected "
            f"{len(node.output)}, for so many it has; {_REMEDY}."
        )


def _require_sound_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    name = tensor.name
    if len(tensor.dims) > _MOST_AXES or min(tensor.dims, default=0) < 0:
        raise UsageError(
            f"Tensor {name!r} of {path} has the shape {tuple(tensor.dims)[:8]}; expected at most "
            f"{_MOST_AXES} lengths, none below 0; {_REMEDY}."
        )
    if tensor.data_type not in _TYPES:
        raise UsageError(
            f"Tensor {name!r} of {path} has type {tensor.data_type}, which is no type of ONNX; "
            f"{_REMEDY}."
        )
    stored = [field for field in _STORAGE if len(getattr(tensor, field))]
    # Asking for the length of raw data would copy it.
    stored += ["raw_data"] if tensor.HasField("raw_data") else []
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        stored.append("external_data")
        what = f"external data key of tensor {name!r}"
        _require_single((entry.key for entry in tensor.external_data), what, path)
    if len(stored) > 1 or tensor.HasField("segment"):
        raise UsageError(
            f"Tensor {name!r} of {path} is stored in {' and '.join(stored) or 'segments'}; expected"
            f" its values in one place; {_REMEDY}."
        )


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _outputs(nodes: Iterable[onnx.NodeProto]) -> Set[str]:
    return _named(name for node in nodes for name in node.output)


def _named(names: Iterable[str]) -> Set[str]:
    return frozenset(names) - {""}


def _require_single(names: Iterable[str], what: str, path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        _require_text((name,), what, path)
        if name and name in seen:
            raise UsageError(
                f"{path} has the {what} {name!r} twice, of which runtimes take one or the other; "
                f"{_REMEDY} with each name once."
            )
        seen.add(name)


def _require_text(texts: Iterable[object], what: str, path: Path) -> None:
    for text in texts:
        # Where a text is no UTF-8, protobuf gives its bytes.
        if not isinstance(text, str):
            raise UsageError(f"The {what} {text!r} of {path} is no UTF-8 text; {_REMEDY}.")
