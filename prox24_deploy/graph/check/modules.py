"""Which module of the source model a node comes from, and which modules a file declares."""

import ast
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from prox24_deploy.core.documents import decode_json
from prox24_deploy.core.errors import UsageError
from prox24_deploy.sparsity.declaration import SPARSE_KEY

MODULE_KEY = "prox24.module"
SCOPES_KEY = "pkg.torch.onnx.name_scopes"

# Scopes of a model a hundred modules deep take some kB; what is longer is no module path.
_MOST_SCOPE_CHARACTERS = 1 << 16


def module_of(node: ir.Node) -> str:
    """Module path of a node, "" where the file does not tell it.

    Sources, first that tells: our own metadata, the name scopes of torch's exporter, and names that
    are paths, as torch's TorchScript exporter and the builders that imitate it write them
    (`/encoder/layer.0/dense/MatMul`).
    """
    if MODULE_KEY in node.metadata_props:
        return node.metadata_props[MODULE_KEY]
    root, *scopes = (node.name or "").rpartition("/")[0].split("/")
    return scoped_module(node.metadata_props) or (".".join(scopes) if not root else "")


def scoped_module(metadata: Mapping[str, str]) -> str:
    """Innermost module path in the `pkg.torch.onnx.name_scopes` that torch's exporter writes.

    The value is the text of a list that runs from the root "" to the innermost module and ends in
    the name of the operator instance, which is dropped.
    """
    text = metadata.get(SCOPES_KEY, "[]")
    try:
        scopes = ast.literal_eval(text) if len(text) <= _MOST_SCOPE_CHARACTERS else []
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return ""
    if len(scopes) > 1 and scopes[-2] and scopes[-1].startswith(f"{scopes[-2]}."):
        return str(scopes[-1])
    return str(scopes[-2]) if len(scopes) > 1 else ""


def declared_modules(model: ir.Model, path: Path) -> frozenset[str] | None:
    """Module paths that the file itself declares as 2:4, or None if it declares nothing.

    Raises:
        UsageError: the declaration is not a JSON list of strings.
    """
    text = model.metadata_props.get(SPARSE_KEY)
    if text is None:
        return None
    try:
        names = decode_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"Metadata {SPARSE_KEY} of {path} must be a JSON list of module paths, got "
            f"{text[:80]!r}; export the file again."
        )
    return frozenset(names)
