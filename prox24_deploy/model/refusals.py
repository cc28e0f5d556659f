"""Checkpoints that nothing here can prune or export, told before any weight is read.

What decides is in the configuration, in the files beside it, or in the names and types of the
tensors; the weights themselves are not needed.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prox24_deploy.core.documents import Document, read_json
from prox24_deploy.core.errors import ModelDirError

_ADAPTER_FILE = "adapter_config.json"
# Keys under which the configuration of a model, or of a part of it, says how it was quantised.
_QUANTIZERS = ("quantization_config", "compression_config", "quantization", "hf_quantizer")
# Files in which older tools say it instead: AutoGPTQ, AutoAWQ, Model Optimizer.
_QUANTIZER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_METHODS = ("quant_method", "quant_algo", "quant_type", "format")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
_ROPE_TYPES = ("rope_type", "type")
# Both names of one type; "su" is that of the first models which had it.
_LONGROPE = ("longrope", "su")
# From here on transformers selects the frequencies of longrope in a way that can be traced.
_TRACEABLE_LONGROPE = (5, 21)


def require_no_adapter(path: Path) -> None:
    """Refuse a directory with an adapter, which says little without the model that it belongs to.

    Raises:
        ModelDirError: names that model, where the configuration of the adapter does.
    """
    file = path / _ADAPTER_FILE
    if not file.is_file():
        return
    try:
        adapter = read_json(file, Document(str(file), ModelDirError, "restore it"))
    except ModelDirError:
        adapter = None
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise ModelDirError(
        f"Model directory {path} holds an adapter{of} ({_ADAPTER_FILE}), expected a whole model: "
        "merge it first, as with merge_and_unload() of PEFT, and pass what was saved then."
    )


def require_not_quantized(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that says of itself that it is quantised or compressed.

    Raises:
        ModelDirError: names where it says so, and the method.
    """
    for where, key, value in _entries(config):
        if key in _QUANTIZERS and value:
            raise _quantized(path, f"{where} of config.json", _method(value))
    for name in _QUANTIZER_FILES:
        if (path / name).is_file():
            raise _quantized(path, name, "")


def require_plain_weights(path: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse weights that are packed or scaled although no configuration says so, and adapters.

    Raises:
        ModelDirError: names the first such tensor.
    """
    scaled = any("scale" in name for name in dtypes)
    for name, dtype in dtypes.items():
        if ".lora_" in name or name.startswith("lora_"):
            raise ModelDirError(
                f"Model directory {path} holds tensor {name} of an adapter that was not merged "
                "into its model; merge it first, as with merge_and_unload() of PEFT."
            )
        packed = name.endswith(".weight") and not dtype.is_floating_point
        packed |= dtype == torch.float4_e2m1fn_x2
        if packed or (scaled and dtype.is_floating_point and dtype.itemsize == 1):
            raise _quantized(path, f"tensor {name}", str(dtype).removeprefix("torch."))


def require_fixed_rope(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings whose frequencies a model computes anew from what it reads.

    Raises:
        ModelDirError: names the type and where the configuration has it.
    """
    for where, key, value in _entries(config):
        if key not in _ROPE_KEYS or not isinstance(value, Mapping):
            continue
        for inner, name, kind in [*_entries(value)]:
            if name in _ROPE_TYPES and isinstance(kind, str):
                _require_static(path, f"{where}.{inner}", kind)


def _require_static(path: Path, where: str, kind: str) -> None:
    if "dynamic" in kind:
        raise ModelDirError(
            f"Model directory {path} has RoPE of type {kind!r} ({where} of config.json), whose "
            "frequencies depend on the length of what is read, so that no graph can hold them; "
            "remove it, which changes nothing up to max_position_embeddings positions, or pass a "
            "model with a fixed type such as 'yarn' or 'llama3'."
        )
    if kind in _LONGROPE and not _traces_longrope():
        raise ModelDirError(
            f"Model directory {path} has RoPE of type {kind!r} ({where} of config.json), whose "
            "frequencies transformers "
            f"{importlib.metadata.version('transformers')} selects in a way that cannot be "
            f"exported; install transformers {'.'.join(map(str, _TRACEABLE_LONGROPE))} or newer."
        )


def _traces_longrope() -> bool:
    parts = importlib.metadata.version("transformers").split(".")[:2]
    return tuple(int(part) for part in parts) >= _TRACEABLE_LONGROPE


def _quantized(path: Path, where: str, method: str) -> ModelDirError:
    told = f"{where}: {method}" if method else where
    return ModelDirError(
        f"Model directory {path} is quantised or compressed ({told}), expected the plain weights; "
        "pass the checkpoint that it was made from."
    )


def _method(value: object) -> str:
    """What a quantiser's configuration calls its method; "" where it does not say."""
    if not isinstance(value, Mapping):
        return str(value)[:40]
    named = next((value[key] for key in _METHODS if value.get(key)), "")
    return str(named or next((key for key in value if str(key).startswith("load_in")), ""))


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Dotted place, key and value of every entry of a configuration, also of its parts."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        place, value = waiting.pop()
        items = value.items() if isinstance(value, Mapping) else ()
        for key, inner in items:
            where = f"{place}.{key}" if place else str(key)
            yield where, str(key), inner
            waiting.append((where, inner))
        if isinstance(value, list):
            waiting += [(f"{place}.{i}", inner) for i, inner in enumerate(value)]
