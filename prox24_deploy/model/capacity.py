"""Refuse a config.json that describes a far larger model than the checkpoint beside it holds.

A model is built from counts and sizes of config.json, which may be of another model or of nobody's:
what they ask for would take all time or memory there is, long before any weight is missed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.config_file import CONFIG_FILE

# Keys of what a model is built of, one after the other.
_PARTS = re.compile(r"(?:^|_)(?:layers?|blocks?|experts|depths?|stages)$")
# A block may be called many times, as those of ALBERT are.
_CALLS_PER_BLOCK, _CALLS = 16, 1000
# Of classes, heads, channels and the like: beyond every model, and within every memory.
_MOST = 10**6
# While a model is built, what is to be shared with an embedding is still there several times.
_SHARED, _SPARE, _SPARE_WEIGHTS = 8, 1000, 10**6
# A built model has no more weights than its checkpoint, but for heads that may be missing.
_LARGER = 2

Sizes = Mapping[str, int]


class _TooLargeError(Exception):
    """Ends the construction of a model."""


def require_counts(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare counts of the configuration with the blocks of the checkpoint, before any is used.

    Args:
        path: the model directory, for errors.
        config: parsed config.json.
        names: of the tensors of the checkpoint.

    Raises:
        ModelDirError: names the count that no model of this checkpoint can have.
    """
    blocks = count_blocks(names)
    for key, value in _numbers(config):
        most = _CALLS + _CALLS_PER_BLOCK * blocks if _PARTS.search(key) else _MOST
        if value > most and (_PARTS.search(key) or key.startswith("num_")):
            raise ModelDirError(
                f"{path / CONFIG_FILE} asks for {key} {value}, expected at most {most} for a "
                f"checkpoint of {blocks} blocks; restore the {CONFIG_FILE} that belongs to it."
            )


def count_blocks(names: Iterable[str]) -> int:
    """Length of the longest list of modules that names of tensors tell of."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:i]), set()).add(part)
    return max(map(len, found.values()), default=0)


def require_size(path: Path, config: Mapping[str, Any], sizes: Sizes, auto: Any) -> None:
    """Build a model without memory for weights, and compare its weights with the checkpoint.

    Args:
        path: the model directory, for errors.
        config: parsed config.json.
        sizes: elements of each tensor of the checkpoint.
        auto: class of transformers that opens the model.

    Raises:
        ModelDirError: the model has far more weights than the checkpoint.
    """
    try:
        with bounded(sizes):
            model = _from_config(path, auto)
        built = sum(parameter.numel() for parameter in model.parameters())
        if built <= _LARGER * sum(sizes.values()) + _SPARE_WEIGHTS:
            return
    except _TooLargeError:
        pass
    except Exception:
        # Opening the model in earnest says what is wrong, within the same bounds.
        return
    raise _far_larger(path, config, sizes)


@contextmanager
def no_larger(path: Path, config: Mapping[str, Any], sizes: Sizes) -> Iterator[None]:
    """Open a model in earnest, and end it before it takes memory for far more than `sizes` has.

    Raises:
        ModelDirError: as for `require_size`, whose arguments these are.
    """
    try:
        with _counted(sizes):
            yield
    except _TooLargeError as error:
        raise _far_larger(path, config, sizes) from error


def _far_larger(path: Path, config: Mapping[str, Any], sizes: Sizes) -> ModelDirError:
    blocks = count_blocks(sizes)
    more = [f"{key} is {value}" for key, value in _parts(config) if value > blocks]
    hint = f"; {', '.join(more)}, but the checkpoint holds {blocks} blocks" if more else ""
    return ModelDirError(
        f"Model directory {path} holds {sum(sizes.values()):,} weights in {len(sizes)} tensors, "
        f"but {CONFIG_FILE} describes a far larger model{hint}; restore the {CONFIG_FILE} that "
        "belongs to it."
    )


@contextmanager
def bounded(sizes: Sizes) -> Iterator[None]:
    """Build on the meta device, and end it once there are far more weights than `sizes` has.

    Raises:
        Exception: there are.
    """
    with _counted(sizes), torch.device("meta"):
        yield


@contextmanager
def _counted(sizes: Sizes) -> Iterator[None]:
    most = _SHARED * len(sizes) + _SPARE
    most_weights = _SHARED * sum(sizes.values()) + _SPARE_WEIGHTS
    count = weights = 0

    def note(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, weights
        count += 1
        weights += 0 if parameter is None else parameter.numel()
        if count > most or weights > most_weights:
            raise _TooLargeError

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _from_config(path: Path, auto: Any) -> nn.Module:
    from transformers import AutoConfig

    own = getattr(auto, "config_class", None) or AutoConfig
    config = own.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # A class of models is called where one that chooses among them has a method.
    model: nn.Module = getattr(auto, "from_config", auto)(config)
    return model


def _parts(config: Mapping[str, Any]) -> Sequence[tuple[str, int]]:
    return [(key, value) for key, value in _numbers(config) if _PARTS.search(key)]


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration and of those inside it, with its key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for item in value if isinstance(value, list) else [value]:
            if type(item) is int:
                yield key, item
