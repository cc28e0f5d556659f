"""The modules of tiny sentence-transformers directories, written as that library writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN = 32
_PACKAGES = {
    "Transformer": "sentence_transformers.base.modules.transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
    "Dense": "sentence_transformers.base.modules.dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm",
    "Normalize": "sentence_transformers.base.modules.normalize",
    "Dropout": "sentence_transformers.sentence_transformer.modules.dropout",
}
Module = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def pooling(*modes: str) -> Module:
    return "Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": list(modes)}, {}


def dense(
    width: int, out: int, *, bias: bool = True, activation: str = "Tanh", residual: bool = False
) -> Module:
    draw = torch.Generator().manual_seed(width + out)
    weights = {"linear.weight": torch.randn(out, width, generator=draw) / width**0.5}
    if bias:
        weights["linear.bias"] = torch.randn(out, generator=draw)
    options = {
        "in_features": width,
        "out_features": out,
        "bias": bias,
        "activation_function": f"torch.nn.modules.activation.{activation}",
    }
    if residual:
        options["use_residual"] = True
        if out != width:
            weights["residual.weight"] = torch.randn(out, width, generator=draw) / width**0.5
    return "Dense", options, weights


def layer_norm(width: int) -> Module:
    draw = torch.Generator().manual_seed(width)
    weights = {
        "norm.weight": torch.rand(width, generator=draw),
        "norm.bias": torch.rand(width, generator=draw),
    }
    return "LayerNorm", {"dimension": width}, weights


NORMALIZE: Module = ("Normalize", {}, {})
DROPOUT: Module = ("Dropout", {"dropout": 0.5}, {})


def write_modules(path: Path, *modules: Module, **text: Any) -> Path:
    """Add a list of modules to a model directory; `text` is said of the Transformer."""
    listed = [("Transformer", "")]
    for number, (kind, options, weights) in enumerate(modules, start=1):
        folder = f"{number}_{kind}"
        listed.append((kind, folder))
        (path / folder).mkdir()
        write_json(path / folder / "config.json", options)
        if weights:
            save_file(weights, path / folder / "model.safetensors")
    write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": folder, "type": f"{_PACKAGES[kind]}.{kind}"}
            for i, (kind, folder) in enumerate(listed)
        ],
    )
    write_json(path / "sentence_bert_config.json", text)
    return path


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
