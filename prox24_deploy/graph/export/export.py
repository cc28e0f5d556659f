"""Export a Hugging Face module to an ONNX file and prove its 2:4 weights on that file."""

import hashlib
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import ml_dtypes  # noqa: F401 - makes "bfloat16" a dtype that numpy knows
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from prox24_deploy.config.recipe import Recipe, TensorSpec, dynamic_names, shape_of
from prox24_deploy.core.atomic import make_folder, writing
from prox24_deploy.core.errors import BundleError, ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.check.check import check_path
from prox24_deploy.graph.check.judgement import require_expected
from prox24_deploy.graph.check.modules import MODULE_KEY
from prox24_deploy.graph.export.annotate import annotate, settle_signature
from prox24_deploy.graph.export.branches import AllFinite
from prox24_deploy.graph.export.module import (
    TORCH_DTYPES,
    Convert,
    Keep,
    RecipeModule,
    copy_with,
    kept_by,
    to_dtype,
)
from prox24_deploy.graph.export.quantize import own_layers, quantise_graph
from prox24_deploy.graph.export.stored import require_stored
from prox24_deploy.quantization.tensors import QuantizedModel, RoundedInput

_SUFFIX, _DATA_SUFFIX = ".onnx", ".onnx.data"

# Names of the graphs that an export writes.
_GRAPHS = ("model", "encoder", "decoder")

_logger = logging.getLogger(__name__)

# Tracing sizes of the first dynamic axes; different from each other and from 0 and 1, which the
# exporter would take for constants.
_TRACE_SIZES = (2, 7, 3, 5)
_HASH_CHUNK = 1 << 24


def export_onnx(
    model: nn.Module,
    recipe: Recipe,
    out: Path,
    *,
    dtype: DType,
    sparse: Sequence[str] = (),
    quantized: QuantizedModel | None = None,
) -> Path:
    """Write the one graph of a recipe as `out/model.onnx`; see `export_graphs`."""
    (path,) = export_graphs(model, recipe, out, dtype=dtype, sparse=sparse, quantized=quantized)
    return path


def export_graphs(
    model: nn.Module,
    recipe: Recipe,
    out: Path,
    *,
    dtype: DType,
    sparse: Sequence[str] = (),
    quantized: QuantizedModel | None = None,
    keep: Keep | None = None,
) -> tuple[Path, ...]:
    """Write every graph of a recipe with its external data; the same input, same bytes.

    That is `out/model.onnx` with `out/model.onnx.data`, or for an encoder-decoder `encoder.onnx`
    and `decoder.onnx`, each with its data. Inputs, outputs and dynamic axes are those of the
    recipe. Nodes carry their module path under the metadata key `prox24.module`; `sparse` is
    written to the file as its 2:4 declaration and proven on the file before `out` appears, all at
    once, by a rename. So are the numbers and scales of quantised layers (`graph.export.quantize`).

    Args:
        model: float32 module in eval mode, as opened for `recipe.task`; it is not changed.
        recipe: names, axes and opset of the graph.
        out: folder to create; an earlier export there is replaced.
        dtype: of weights and activations; float32 shares the weights of `model`, the other two
            hold one converted copy while exporting.
        sparse: module paths in `model` whose weights must be 2:4 along their reduction axis.
        quantized: layers that are to compute in 8 bits; `model` has the values of `apply_weights`.
        keep: where to have that copy; None for memory.

    Returns:
        The paths of the graphs, in the order of `recipe.parts`.

    Raises:
        ExportError: the model cannot be exported, does not fit the recipe, overflows `dtype`, or
            the graph has not all of the quantised layers.
        SparsityLostError: a weight named in `sparse` is not 2:4 in the file.
        SparsityUnprovenError: a weight named in `sparse` is not there, or cannot be followed.
        BundleError: `out` holds something other than an earlier export.
        OSError: the file cannot be written, for example because the disk is full.
    """
    _require_usable(model, recipe, sparse, quantized, out)
    converted = _converted(model, kept_by(keep, to_dtype(dtype)))
    graphs = {
        part.graph: _graph_of(converted, model, part, dtype, sparse, quantized)
        for part in recipe.parts
    }
    proof = _Proof(out=out, model=model, recipe=recipe, sparse=sparse, quantized=quantized)
    try:
        return _publish(graphs, out, proof)
    finally:
        _drop_weights(converted, graphs.values())


def _converted(model: nn.Module, convert: Convert) -> nn.Module:
    """A copy of a model with parameters of its own, though their values may be those of `model`."""
    return copy_with(model, lambda name, tensor: convert(name, tensor).detach())


def _drop_weights(converted: nn.Module, graphs: Iterable[ir.Model]) -> None:
    """Give up what was exported: the rules that the exporter rewrites by remember the last graph.

    That has the parameters among what once were its inputs.
    """
    for graph in graphs:
        for value in graph.graph.initializers.values():
            value.const_value = None
    for parameter in converted.parameters():
        parameter.data = parameter.data.new_empty(0)


def hash_onnx(path: Path) -> tuple[str, int]:
    """Hash an exported graph: SHA-256 over it then its external data, and their size in bytes."""
    digest = hashlib.sha256()
    size = 0
    for file in (path, path.with_suffix(_DATA_SUFFIX)):
        if file != path and not file.exists():
            continue
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    return digest.hexdigest(), size


def _graph_of(
    converted: nn.Module,
    model: nn.Module,
    recipe: Recipe,
    dtype: DType,
    sparse: Sequence[str],
    quantized: QuantizedModel | None,
) -> ir.Model:
    """The graph of a recipe, or of one part of it, with the 2:4 weights among its own blocks."""
    module = RecipeModule(converted, recipe).eval()
    graph = _to_onnx(module, recipe, dtype)
    settle_signature(graph.graph, module.signature)
    # A half of which nothing is pruned says so: a file that says nothing must be 2:4 throughout.
    annotate(graph, model, own_modules(recipe, sparse) if sparse or quantized else None)
    _require_one_dtype(graph, dtype)
    if quantized:
        own = own_modules(recipe, list(quantized.layers))
        quantise_graph(graph, model, own_layers(quantized, own))
    return graph


def own_modules(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The module paths that concern a graph: all of a single one, else those in its blocks."""
    whole = recipe.graph == "model"
    return [name for name in names if whole or name.startswith(f"{recipe.blocks}.")]


def _require_usable(
    model: nn.Module,
    recipe: Recipe,
    sparse: Sequence[str],
    quantized: QuantizedModel | None,
    out: Path,
) -> None:
    _require_modules(model, recipe, sparse, "2:4")
    _require_modules(model, recipe, list(quantized.layers) if quantized else (), "quantised")
    _require_unrounded(model)
    _require_replaceable(out)


def _require_modules(model: nn.Module, recipe: Recipe, names: Sequence[str], what: str) -> None:
    parts = recipe.parts
    known = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise ExportError(
                f"The model has no module {name!r}, whose weight should be {what}; pass module "
                "paths of the model as it was pruned."
            )
        if not any(own_modules(part, [name]) for part in parts):
            raise ExportError(
                f"Module {name!r}, whose weight should be {what}, lies in no graph of recipe "
                f"{recipe.family}, whose blocks are {' and '.join(p.blocks for p in parts)}; "
                "correct the recipe."
            )


def _require_unrounded(model: nn.Module) -> None:
    """Refuse a model that rounds inputs itself, which the graph would do a second time."""
    for name, module in model.named_modules():
        if any(isinstance(hook, RoundedInput) for hook in module._forward_pre_hooks.values()):
            raise ExportError(
                f"Module {name!r} rounds its inputs already; export the model with the values of "
                "its quantised weights alone, and pass what was quantised."
            )


def _require_replaceable(out: Path) -> None:
    if not out.exists():
        return
    strange = {out.name} if not out.is_dir() else {entry.name for entry in out.iterdir()}
    if out.is_dir():
        strange -= {n + end for n in _GRAPHS for end in (_SUFFIX, _DATA_SUFFIX)}
    if strange:
        raise BundleError(
            f"{out} holds {min(strange)!r}, which no export wrote; choose another folder or empty "
            "this one."
        )


def _to_onnx(module: RecipeModule, recipe: Recipe, dtype: DType) -> ir.Model:
    signature = module.signature
    names = dynamic_names(signature.inputs)
    sizes = dict(zip(names, _trace_sizes(len(names)), strict=True))
    dims = {name: torch.export.Dim(name) for name in names}
    device = next(module.parameters()).device
    examples = tuple(
        torch.ones(
            shape_of(spec, sizes),
            dtype=torch.int64 if spec.dtype == "int64" else TORCH_DTYPES[dtype],
            device=device,
        )
        for spec in signature.inputs
    )
    # One more tuple, since `forward` takes its inputs as one variadic parameter.
    shapes = (tuple(_dynamic_axes(spec, dims) for spec in signature.inputs),)
    try:
        with _quiet(), AllFinite():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                verbose=False,
                opset_version=recipe.opset,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=shapes,
            )
    except OSError:
        raise
    except Exception as error:  # the exporter raises types of many kinds
        raise ExportError(_failure(error, recipe)) from error
    if program is None:
        raise ExportError(
            f"torch.onnx.export returned nothing for family {recipe.family!r}; try another opset."
        )
    return program.model


def _require_one_dtype(graph: ir.Model, dtype: DType) -> None:
    """Refuse a convolution whose weight has another type than its input, which no runtime loads.

    The exporter makes them in bfloat16, where it folds a batch norm into float32 weights.
    """
    wanted = ir.DataType.from_numpy(np.dtype(dtype))
    for node in graph.graph.all_nodes():
        found = node.inputs[1].dtype if node.op_type == "Conv" and node.inputs[1] else None
        if found not in {None, wanted}:
            raise ExportError(
                f"The exporter folded a batch norm into {found.name.lower()} weights of "
                f"convolution {node.metadata_props.get(MODULE_KEY, node.name)}, whose input is "
                f"{dtype}; "
                "export with --dtype float16 or float32."
            )


def _dynamic_axes(
    spec: TensorSpec, dims: dict[str, torch.export.Dim]
) -> dict[int, torch.export.Dim | str]:
    """The exporter's dimensions by axis; it finds out itself what a sum is equal to."""
    return {i: dims.get(axis, axis) for i, axis in enumerate(spec.axes) if isinstance(axis, str)}


def _trace_sizes(count: int) -> list[int]:
    extra = max(0, count - len(_TRACE_SIZES))
    return [*_TRACE_SIZES[:count], *range(11, 11 + extra)]


class _OtherThreads:
    """A standard stream that drops what the current thread writes.

    torch.export prints the graph that it could not finish; a progress bar, drawn by another thread,
    must stay visible meanwhile.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._muted = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._muted else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about its own internals; nothing a user can act on."""
    chatty = logging.getLogger("torch.onnx")
    level = chatty.level
    with (
        warnings.catch_warnings(),
        redirect_stdout(_OtherThreads(sys.stdout)),
        redirect_stderr(_OtherThreads(sys.stderr)),
    ):
        warnings.simplefilter("ignore")
        chatty.setLevel(logging.ERROR)
        try:
            yield
        finally:
            chatty.setLevel(level)


def _failure(error: BaseException, recipe: Recipe) -> str:
    """One sentence with the first line of the root cause."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, ExportError):
        return str(root)
    lines = str(root).strip().splitlines()
    detail = f"{type(root).__name__}: {lines[0].strip()}" if lines else type(root).__name__
    return (
        f"torch.onnx.export failed for family {recipe.family!r} at opset {recipe.opset} "
        f"({detail}); check the inputs and axes of the recipe, or try another opset."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """What is proven on every file of an export before it appears in `out`."""

    out: Path
    model: nn.Module
    recipe: Recipe
    sparse: Sequence[str]
    quantized: QuantizedModel | None

    def __call__(self, file: Path) -> None:
        """Read one file back; raises what `export_graphs` says."""
        if self.sparse:
            require_expected(replace(check_path(file), path=str(self.out / file.name)))
        if self.quantized:
            (part,) = (part for part in self.recipe.parts if part.graph == file.stem)
            names = own_modules(part, list(self.quantized.layers))
            require_stored(file, self.model, self.quantized, names)


def _publish(
    graphs: Mapping[str, ir.Model], out: Path, prove: Callable[[Path], None]
) -> tuple[Path, ...]:
    """Write beside `out`, prove what was written, then rename."""
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        make_folder(partial)
        for name, graph in graphs.items():
            file = partial / f"{name}{_SUFFIX}"
            with writing(file):
                ir.save(graph, file, external_data=f"{name}{_DATA_SUFFIX}")
            prove(file)
        with writing(out):
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    paths = tuple(out / f"{name}{_SUFFIX}" for name in graphs)
    _logger.info("wrote %s", ", ".join(map(str, paths)))
    return paths
