"""config.json of a model: read it, and take from it only what is of the type that it must be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prox24_deploy.core.documents import Document, read_json, reason_of
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.tasks import TASKS

CONFIG_FILE = "config.json"
# What the configurations of different families call the number of positions.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions")
# Of the number of a class; Python refuses to read thousands, and torch those beyond 64 bits.
_MOST_DIGITS = 9


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of the model directory `path`.

    Raises:
        ModelDirError: there is none that can be read, or it does not say what model it is of.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ModelDirError(
            f"Model directory {path} has no {CONFIG_FILE}; pass a directory as written by "
            "save_pretrained."
        )
    # transformers itself writes infinity into some.
    config = read_json(file, Document(str(file), ModelDirError, "restore it"), finite=False)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelDirError(f"{file} names no model_type, so its family is unknown; add it.")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelDirError(
            f"{file} has architectures {names!r}, expected a list of names of classes; restore it."
        )
    return config


def has_one_score(task: str, config: Mapping[str, Any]) -> bool:
    """Whether a model of a task gives one score, as a reranker does, and so has no classes."""
    if TASKS[task].judged_by != "classes":
        return False
    names = config.get("id2label")
    return len(names) == 1 if isinstance(names, Mapping) else config.get("num_labels") == 1


def blame_config(path: Path, reason: str) -> None:
    """Do nothing, unless what failed is the configuration, which tokenizers open first.

    Raises:
        ModelDirError: transformers fails on the configuration of `path` for the same reason.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as fault:
        # A wrong value surfaces as whatever the code of its family runs into.
        if reason_of(fault) == reason:
            raise ModelDirError(
                f"{path / CONFIG_FILE} holds a value that cannot be used ({reason}); restore it."
            ) from fault


def whole_number(config: Mapping[str, Any], key: str, default: int) -> int:
    """A number of the configuration, from 1 on; the default where it says none or zero.

    Raises:
        ModelDirError: it says something else.
    """
    value = config.get(key)
    if not value:
        return default
    if type(value) is not int or value < 1:
        raise ModelDirError(
            f"{CONFIG_FILE} has {key} {value!r}, expected a whole number from 1 on; restore it."
        )
    return value


def labels_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Number of each class that a model tells apart, by its name; empty where none is named.

    Raises:
        ModelDirError: `id2label` is no object from numbers to names.
    """
    named = config.get("id2label")
    named = {} if named is None else named
    if not isinstance(named, dict) or not all(_is_label(*entry) for entry in named.items()):
        raise ModelDirError(
            f"{CONFIG_FILE} has id2label {named!r}, expected an object from numbers of classes to "
            "their names; restore it."
        )
    return {str(name): int(number) for number, name in named.items()}


def _is_label(number: str, name: object) -> bool:
    digits = number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS
    return digits and isinstance(name, str | int)


def longest_of(config: Mapping[str, Any], otherwise: int) -> int:
    """Tokens that the model accepts at most; `otherwise` where it does not say."""
    said = next((key for key in _POSITION_KEYS if config.get(key)), _POSITION_KEYS[0])
    return whole_number(config, said, otherwise)
