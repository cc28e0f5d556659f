"""Open a Hugging Face model directory safely: nothing unpickled, no remote code, no network."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prox24_deploy.config.recipe import RECIPE_FILE, SENTENCE_MODULES, Recipe
from prox24_deploy.core.documents import files_below, reason_of
from prox24_deploy.core.errors import ModelDirError, RecipeError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.rotation import ROTATION_FILE
from prox24_deploy.core.snapshot import Snapshot, take_snapshot
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.model.capacity import no_larger, require_counts, require_size
from prox24_deploy.model.config_file import read_config
from prox24_deploy.model.experts import FUSED, experts_apart, loaded_apart
from prox24_deploy.model.offload import META, block_map
from prox24_deploy.model.refusals import (
    require_fixed_rope,
    require_no_adapter,
    require_not_quantized,
    require_plain_weights,
)
from prox24_deploy.model.sentence import module_weights, read_pipeline
from prox24_deploy.model.sentence_modules import attach_sentence_modules
from prox24_deploy.model.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    check_index,
    find_shards,
    is_single,
    sound_tensors,
    tensors_of,
)

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
# Files of a model directory that say nothing of what the model computes: its card, how it was made,
# and a recipe, whose meaning counts wherever it comes from.
_NOT_THE_MODEL = frozenset({CARD_FILE, RECIPE_FILE, ROTATION_FILE})
# What else belongs to a model directory: configuration, tokenizer, documentation. Never code.
_COMPANIONS = {
    ".json", ".txt", ".model", ".md", ".jinja", ".toml", ".vocab", ".spm", ".codes", ".bpe",
    ".tiktoken", ".tokenizer",
}  # fmt: skip
# A licence that a card links to, and a vocabulary; without an ending.
_NAMED_COMPANIONS = {"LICENSE", "NOTICE", "vocab"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDir:
    """A model directory whose weight files have been read once and found sound.

    Attributes:
        path: the directory.
        config: parsed config.json.
        shards: weight files, in name order.
        tensors: tensor name to what and where it is.
        snapshot: weights and companions as they were when they were hashed.
        renamed: parameter of the built model to the tensor that it came from, where the model
            class has other names than the checkpoint.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    snapshot: Snapshot
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Over names and contents of what the model computes with: not of Markdown or a recipe."""
        digest = hashlib.sha256()
        for name, state in self.snapshot.files.items():
            if name not in _NOT_THE_MODEL and not name.endswith(".md"):
                digest.update(name.encode())
                digest.update(bytes.fromhex(state.sha256))
        return digest.hexdigest()

    def fingerprint(self) -> dict[str, str]:
        """Hash of every file but the card and the recipe; where the directory lies is not said."""
        files = self.snapshot.files
        return {name: files[name].sha256 for name in files if name not in _NOT_THE_MODEL}

    def require_untouched(self) -> None:
        """Refuse a directory that was written since it was opened; reads no content.

        Raises:
            ModelDirError: names the first file that came, went or was written.
        """
        self._require(self.snapshot.touched())

    def require_unchanged(self) -> None:
        """Refuse a directory that was written since it was opened, after its last use.

        Raises:
            ModelDirError: names the first file that came, went, was written or has other content.
        """
        self._require(self.snapshot.changed())

    def _require(self, name: str | None) -> None:
        if name is not None:
            raise ModelDirError(
                f"Model directory {self.path} was changed while it was read: {name} is not what it "
                "was; nothing made of it is kept. Run the same command again once nobody writes "
                "there."
            )

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        """The class that the model was saved from, "unknown" where config.json does not say."""
        return str((self.config.get("architectures") or ["unknown"])[0])


def open_model_dir(path: Path) -> ModelDir:
    """Read and check a model directory without building the model.

    Raises:
        ModelDirError: a file is missing, damaged or unsafe, a weight is NaN or infinite, or the
            checkpoint is of a kind that cannot be built: quantised, an adapter, with rotary
            embeddings that depend on what is read, or with modules of sentence-transformers that
            are not known here.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ModelDirError(f"Model directory {path} {kind}; pass a directory with config.json.")
    # Before the weights are hashed, which takes long.
    _require_supported(path)
    shards = find_shards(path)
    _require_utf8(path, companion_files(path))
    names = [shard.name for shard in shards] + ([] if is_single(shards) else [INDEX_FILE])
    snapshot = take_snapshot(path, partial(_model_files, names=names))
    config = read_config(path)
    tensors = tensors_of(shards)
    for file in module_weights(path):
        sound_tensors(file)
    require_plain_weights(path, {name: tensor.dtype for name, tensor in tensors.items()})
    check_index(path, shards, tensors)
    require_counts(path, config, tensors)
    if not any(tensor.dtype.is_floating_point for tensor in tensors.values()):
        raise ModelDirError(
            f"Model directory {path} holds no floating-point weights in {shards[0].name}; pass a "
            "complete checkpoint."
        )
    directory = ModelDir(
        path=path, config=config, shards=shards, tensors=tensors, snapshot=snapshot
    )
    directory.require_untouched()
    return directory


def _require_supported(path: Path) -> None:
    require_no_adapter(path)
    read_pipeline(path)
    config = read_config(path)
    require_not_quantized(path, config)
    require_fixed_rope(path, config)


def companion_files(path: Path) -> list[Path]:
    """Files beside the weights that a copy of the model needs, sorted; no code, no pickles."""
    shown = (p for p in files_below(path) if not p.name.startswith(".") and p.name != INDEX_FILE)
    found = (p for p in shown if p.suffix in _COMPANIONS or p.name in _NAMED_COMPANIONS)
    return sorted({*(p for p in found if p.is_file()), *module_weights(path)})


def load_model(
    directory: ModelDir, recipe: Recipe, device: torch.device, *, offload: Path | None = None
) -> nn.Module:
    """Build the model of `recipe.task` in float32 evaluation mode on `device`.

    One that embeds texts has the modules for it under the name `SENTENCE_MODULES`.

    Args:
        directory: the checkpoint.
        recipe: of its family.
        device: where it computes.
        offload: if given, its blocks are read from the checkpoint each time that they run; a
            folder for those whose tensors are stored otherwise than the model holds them.

    Raises:
        ModelDirError: transformers refuses the directory, or weights are missing from it.
    """
    return load_with_rest(directory, recipe, device, offload=offload)[0]


def load_with_rest(
    directory: ModelDir,
    recipe: Recipe,
    device: torch.device,
    *,
    offload: Path | None = None,
    structure: nn.Module | None = None,
) -> tuple[nn.Module, list[str]]:
    """As `load_model`; also the tensors of the checkpoint that the model has no place for.

    A `structure_of` the model that is there already is not built again.
    """
    with (
        _opening(directory, recipe) as auto,
        experts_apart(recipe.experts),
        loaded_apart(directory.model_type, recipe.experts),
        warnings.catch_warnings(),
    ):
        # Tensors that belong to no module below the model have a place of their own.
        warnings.filterwarnings("ignore", message="The following device_map keys do not match")
        model, info = auto.from_pretrained(
            directory.path,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            # Reported below by name; the library's own message names nothing.
            ignore_mismatched_sizes=True,
            attn_implementation=None if recipe.attention == "default" else recipe.attention,
            output_loading_info=True,
            **({} if offload is None else _on_disk(directory, recipe, device, offload, structure)),
        )
    _check_loading(directory, recipe, info)
    attach_sentence_modules(model, directory.path, recipe)
    directory.require_untouched()
    built: nn.Module = model.eval().requires_grad_(requires_grad=False)
    if offload is None:
        built = built.to(device)
    elif hasattr(built, SENTENCE_MODULES):
        built.get_submodule(SENTENCE_MODULES).to(device)
    return built, sorted(directory.tensors.keys() & info["unexpected_keys"])


@contextmanager
def _opening(directory: ModelDir, recipe: Recipe) -> Iterator[Any]:
    """The class that opens a model; whatever it runs into is a fault of the directory."""
    auto = _class_of(recipe)
    sizes = {name: tensor.numel for name, tensor in directory.tensors.items()}
    require_size(directory.path, directory.config, sizes, auto)
    try:
        with no_larger(directory.path, directory.config, sizes):
            yield auto
    except (MemoryError, ModelDirError):
        raise
    except Exception as error:
        # A wrong value in config.json surfaces as whatever the model's own code runs into.
        raise ModelDirError(
            f"Model directory {directory.path} does not open as {recipe.task}: {reason_of(error)}."
        ) from error


def structure_of(directory: ModelDir, recipe: Recipe) -> nn.Module:
    """The model that `load_model` opens, without any weight: its tensors are on the meta device.

    Raises:
        ModelDirError: transformers refuses the directory.
    """
    with _opening(directory, recipe):
        return build_untrained(directory.path, recipe, META, sentence=False)


def _on_disk(
    directory: ModelDir,
    recipe: Recipe,
    device: torch.device,
    folder: Path,
    structure: nn.Module | None,
) -> dict[str, Any]:
    """What has transformers leave the blocks in the checkpoint."""
    # Its advice is for those who did not ask for it.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    if structure is None:
        structure = build_untrained(directory.path, recipe, META, sentence=False)
    blocks = [part.blocks for part in recipe.parts]
    return {"device_map": block_map(structure, blocks, device), "offload_folder": folder}


def build_untrained(
    path: Path, recipe: Recipe, device: torch.device, *, sentence: bool = True
) -> nn.Module:
    """The module that `load_model` gives for the directory, with random weights on `device`.

    Without `sentence` it has no modules for the embedding of a text.

    For whoever needs no more than its structure; nothing is checked that `open_model_dir` checks.
    """
    auto = _class_of(recipe)
    configured = getattr(auto, "config_class", None) or quiet_transformers().AutoConfig
    config = configured.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    asked = None if recipe.attention == "default" else recipe.attention
    # A class that chooses among models names it otherwise than the models themselves.
    build = getattr(auto, "from_config", None) or auto._from_config
    with device, experts_apart(recipe.experts):
        model = build(config, dtype=torch.float32, attn_implementation=asked)
    if sentence:
        attach_sentence_modules(model, path, recipe)
    built: nn.Module = model.eval().requires_grad_(requires_grad=False).to(device)
    return built


def auto_class(task: str) -> Any:
    """The class of transformers that opens a model for a task."""
    return getattr(quiet_transformers(), TASKS[task].auto_class)


def _class_of(recipe: Recipe) -> Any:
    if recipe.model_class is None:
        return auto_class(recipe.task)
    found = getattr(quiet_transformers(), recipe.model_class, None)
    if not hasattr(found, "from_pretrained"):
        raise RecipeError(
            f"Recipe {recipe.family} names model_class {recipe.model_class!r}, which transformers "
            "does not have; correct it or leave it out."
        )
    return found


def quiet_transformers() -> Any:
    """Import transformers with its own progress bars and advice switched off."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # What it says goes where everything else goes, and not to stderr past it.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    return transformers


def model_info(directory: ModelDir, recipe: Recipe, *, name: str = "") -> ModelInfo:
    """Describe the model of this name for the report; parameters are counted in the checkpoint."""
    floats = [t for t in directory.tensors.values() if t.dtype.is_floating_point]
    by_dtype = Counter(dict.fromkeys({t.dtype for t in floats}, 0))
    for tensor in floats:
        by_dtype[tensor.dtype] += tensor.numel
    return ModelInfo(
        path=str(directory.path.resolve()),
        sha256=directory.sha256,
        model_type=directory.model_type,
        architecture=directory.architecture,
        family=recipe.family,
        task=recipe.task,
        parameters=by_dtype.total(),
        source_dtype=str(by_dtype.most_common(1)[0][0]).removeprefix("torch."),
        name=name,
    )


def _check_loading(directory: ModelDir, recipe: Recipe, info: dict[str, Any]) -> None:
    merged = [name for name in directory.tensors if name.endswith(tuple(f".{n}" for n in FUSED))]
    if recipe.experts and merged:
        raise ModelDirError(
            f"Model directory {directory.path} holds {merged[0]}{_and_more(merged)} with several "
            "experts in one tensor, expected one for each layer of each expert; open it with "
            "transformers and save it again with save_pretrained()."
        )
    optional: Sequence[str] = recipe.optional_weights
    missing = sorted(
        name for name in info["missing_keys"] if not any(fnmatch(name, glob) for glob in optional)
    )
    if missing:
        raise ModelDirError(
            f"Model directory {directory.path} lacks weight {missing[0]}"
            f"{_and_more(missing)}, which {recipe.task} needs; pass a complete checkpoint."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelDirError(
            f"Model directory {directory.path} holds {name}{_and_more(mismatched)} in shape "
            f"{tuple(stored)}, but config.json asks for {tuple(expected)}; restore the matching "
            "config.json."
        )


def _require_utf8(path: Path, files: Sequence[Path]) -> None:
    """Refuse names that no document can hold, such as the manifest that lists copies of these."""
    for file in (path.resolve(), *files):
        try:
            str(file).encode()
        except UnicodeEncodeError as error:
            raise ModelDirError(f"The name of {file} is not UTF-8; rename it.") from error


def _model_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Weights and companions; a single file that appears beside shards would be loaded instead."""
    weights = {path / name for name in (*names, SINGLE_FILE)}
    return sorted({*(p for p in weights if p.is_file()), *companion_files(path)})


def _and_more(names: Sequence[object]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
