"""Whether one model can be the teacher of another: what was pruned from it computes alike."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import safe_open

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.modalities import TEXT
from prox24_deploy.model.config_file import whole_number
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.processors import load_tokenizer
from prox24_deploy.pruning.masks import is_akin

log = logging.getLogger(__name__)

# Keys of a configuration that say nothing of what is computed: who wrote it and how it is stored,
# names of classes, and what generation begins and ends with.
_NOT_COMPUTED = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "id2label", "label2id", "finetuning_task", "problem_type", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "return_dict",
    "output_attentions", "output_hidden_states", "pretraining_tp", "auto_map",
})  # fmt: skip
# What is in the names of those that count in training alone.
_IN_TRAINING = ("drop", "initializer", "init_std", "gradient_checkpointing", "aux_loss")


def require_pair(dense: ModelDir, pruned: ModelDir, recipe: Recipe) -> None:
    """Refuse a model that was not pruned from another, and warn of one with unlike weights.

    Raises:
        ModelDirError: they differ in architecture, vocabulary, the size of a tensor, or in what
            their configurations say of what is computed.
    """
    remedy = "pass the model that it was pruned from as --teacher."
    if dense.architecture != pruned.architecture:
        raise ModelDirError(
            f"The teacher {dense.path} is a {dense.architecture}, and {pruned.path} a "
            f"{pruned.architecture}; {remedy}"
        )
    sizes = [whole_number(each.config, "vocab_size", 0) for each in (dense, pruned)]
    if sizes[0] != sizes[1]:
        raise ModelDirError(
            f"The teacher {dense.path} has a vocabulary of {sizes[0]} tokens, and {pruned.path} of "
            f"{sizes[1]}; {remedy}"
        )
    if recipe.modality is TEXT and _vocabulary(dense) != _vocabulary(pruned):
        raise ModelDirError(
            f"The tokenizers of {dense.path} and {pruned.path} have other tokens; {remedy}"
        )
    for name in sorted(dense.tensors.keys() | pruned.tensors.keys()):
        sizes = [_values(each, name) for each in (dense, pruned)]
        if sizes[0] != sizes[1]:
            raise ModelDirError(
                f"Tensor {name} has {sizes[0]} values in the teacher {dense.path} and {sizes[1]} "
                f"in {pruned.path}; {remedy}"
            )
    _require_same_settings(dense, pruned, remedy)
    if not _is_akin(dense, pruned):
        log.warning(
            "The weights of %s have nothing to do with those of the teacher %s. Unless one of them "
            "was rotated, %s", pruned.path, dense.path, remedy,
        )  # fmt: skip


def _is_akin(dense: ModelDir, pruned: ModelDir) -> bool:
    """Whether some matrix of one model is that of the other, pruned or trained further.

    Some others may be in another order of channels. Of models that are akin the first is enough.
    """
    strangers = False
    for name in sorted(dense.tensors.keys() & pruned.tensors.keys()):
        with (
            safe_open(dense.tensors[name].shard, framework="pt") as ours,
            safe_open(pruned.tensors[name].shard, framework="pt") as theirs,
        ):
            # Vectors are much alike in all models.
            if len(theirs.get_slice(name).get_shape()) < 2:
                continue
            weight, given = ours.get_tensor(name), theirs.get_tensor(name)
        if weight.shape != given.shape or is_akin(given, weight):
            return True
        strangers = True
    return not strangers


def _require_same_settings(dense: ModelDir, pruned: ModelDir, remedy: str) -> None:
    ours, theirs = (_settings(each) for each in (pruned, dense))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ModelDirError(
                f"The teacher {dense.path} has {key} {theirs.get(key)!r}, and {pruned.path} "
                f"{ours.get(key)!r}; {remedy}"
            )


def _settings(directory: ModelDir) -> dict[str, object]:
    """What a configuration says of what is computed, defaults filled in, by dotted key."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            directory.path, local_files_only=True, trust_remote_code=False
        )
    except ValueError:
        # A class of models that only its recipe names has no defaults to fill in.
        return dict(_flat(directory.config))
    return dict(_flat(found.to_dict()))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if key in _NOT_COMPUTED or any(part in key for part in _IN_TRAINING):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _values(directory: ModelDir, name: str) -> int:
    return directory.tensors[name].numel if name in directory.tensors else 0


def _vocabulary(directory: ModelDir) -> dict[str, int]:
    found: dict[str, int] = load_tokenizer(directory).get_vocab()
    return found
