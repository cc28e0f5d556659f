"""Small bundles of decoders, sealed without the stages that vLLM needs nothing of."""

from pathlib import Path

import torch
from opened import open_tiny
from pydantic import TypeAdapter

from prox24_deploy.bundle.layout import MANIFEST_FILE, PRUNED, QUANTIZED_TENSORS, record_of
from prox24_deploy.bundle.manifest import (
    Manifest,
    hash_file,
    list_files,
    read_manifest,
    write_manifest,
)
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.checkpoint import write_pruned
from prox24_deploy.model.directory import model_info
from prox24_deploy.model.layers import is_layer, layer_at, reduction_axis
from prox24_deploy.quantization.quantize import quantize_directory
from prox24_deploy.sparsity.pattern import project_24


def write_bundle(
    model: Path,
    prose: Path,
    out: Path,
    form: QuantizedFormat | None = None,
    *,
    dense: tuple[str, ...] = (),
) -> Path:
    """Prune a decoder by magnitude, all layers but those that end so, and quantise it."""
    opened = open_tiny(model, prose, tokens=2048)
    names = [
        name
        for name, module in opened.model.named_modules()
        if is_layer(module) and name != "lm_head" and not name.endswith(dense or "?")
    ]
    axes = {name: reduction_axis(layer_at(opened.model, name)) for name in names}
    weights = {
        f"{name}.weight": project_24(layer_at(opened.model, name).weight, axes[name])
        for name in names
    }
    stored = opened.directory.tensors
    dtype = next(iter(stored.values())).dtype
    write_pruned(
        opened.directory,
        {name: weight.to(dtype) for name, weight in weights.items()},
        out / PRUNED,
        axes={f"{name}.weight": axis for name, axis in axes.items()},
    )
    if form is not None:
        _quantize(out, prose, form, names)
    seal(out, model=model_info(opened.directory, opened.recipe, name="me/tiny"))
    return out


def seal(bundle: Path, **fields: object) -> None:
    """Write the manifest of a bundle that passed, with these fields, over all files in it."""
    files = {n: hash_file(bundle / n) for n in list_files(bundle) if n != MANIFEST_FILE}
    given = read_manifest(bundle) if (bundle / MANIFEST_FILE).is_file() else Manifest()
    sealed = {"complete": True, "verdict": "pass", "files": files}
    write_manifest(bundle, given.model_copy(update=sealed | fields))


def _quantize(bundle: Path, prose: Path, form: QuantizedFormat, sparse: list[str]) -> None:
    opened = open_tiny(bundle / PRUNED, prose, tokens=2048)
    source = TextSource(kind="file", paths=(), sha256="", samples=16, tokens=2048)
    result = quantize_directory(
        opened.directory, opened.recipe, Samples(batches=opened.batches, source=source), form,
        sparse=sparse, device=torch.device("cpu"), out=bundle / QUANTIZED_TENSORS,
        progress=lambda *_: None,
    )  # fmt: skip
    record = bundle / record_of("quantize")
    record.parent.mkdir()
    record.write_bytes(TypeAdapter(QuantizeResult).dump_json(result))
