"""The model to build and what to build it with, read and checked before any work."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.layout import MANIFEST_FILE, PRUNED
from prox24_deploy.config.options import BuildOptions, DeviceChoice, EngineOptions
from prox24_deploy.config.recipe import Recipe, parse_recipe, select_recipe
from prox24_deploy.core.errors import (
    BackendMissingError,
    BundleError,
    ModelDirError,
    UsageError,
)
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.types import Progress, silent
from prox24_deploy.model.config_file import longest_of, read_config, whole_number
from prox24_deploy.model.sentence import fitted_to_sentences
from prox24_deploy.packaging.naming import source_name

if TYPE_CHECKING:
    import torch

    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir
    from prox24_deploy.pruning.masks import MaskFiles

log = logging.getLogger(__name__)

# Of what a stage may take of memory, which is therefore in the key of none.
MEMORY_LIMIT = unkeyed("says where weights are kept, not what they are")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContext:
    """A model as stages on exported graphs know it: directory, hash, recipe, configuration."""

    path: Path
    sha256: str
    recipe: Recipe
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run opens once: the model, the recipe that fits it, its samples and its name."""

    source: "ModelDir"
    recipe: Recipe
    recipe_text: str
    calibration: "Samples"
    held_out: "Samples"
    name: str
    masks: "MaskFiles | None" = None

    @property
    def model(self) -> ModelContext:
        """The model without its samples."""
        source = self.source
        return ModelContext(
            path=source.path, sha256=source.sha256, recipe=self.recipe, config=source.config
        )


def read_context(
    model_dir: Path, out: Path | None, options: BuildOptions, progress: Progress = silent
) -> RunContext:
    """Read and check everything that can be wrong with the input; writes nothing.

    `out` is where a bundle will be, if anywhere. A model of speech first listens to its recordings,
    of which `progress` is told.

    Raises:
        ModelDirError, RecipeError, CalibrationError: the input cannot be used.
        UsageError: the name that was asked for is none.
        BundleError: `out` lies in the model directory, or in another folder that is read.
    """
    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.model.recipe_template import advise

    name = source_name(model_dir, options.name)
    source = open_model_dir(model_dir)
    if out:
        require_apart(out, model_dir, "the model directory")
        for path in (*options.text.calibration, *options.text.evaluation):
            require_apart(out, path, "the folder of samples")
        if options.prune.mask is not None:
            require_apart(out, options.prune.mask, "the folder of masks")
    recipe, recipe_text = select_recipe(
        model_dir, source.model_type, options.recipe, lambda: advise(source)
    )
    recipe = fitted_recipe(recipe, source.architecture, source.path)
    masks = _masks(source, recipe, options)
    calibration, held_out = _read_samples(source, recipe, options, progress)
    return RunContext(
        source=source,
        recipe=recipe,
        recipe_text=recipe_text,
        calibration=calibration,
        held_out=held_out,
        name=name,
        masks=masks,
    )


def require_apart(out: Path, folder: Path, what: str) -> None:
    """Refuse an output inside of what is read, which would not be what it was, and the reverse.

    Raises:
        BundleError: names both.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"Output {out} lies in {what} {folder}; pass another -o.")
    if folder.resolve().is_relative_to(out.resolve()):
        # What a stage left there is removed before it runs again.
        raise BundleError(f"Input {folder} lies in output {out}; pass another -o.")


def _masks(source: "ModelDir", recipe: Recipe, options: BuildOptions) -> "MaskFiles | None":
    """Masks that were made elsewhere, held to the structure of the model."""
    if options.prune.mask is None:
        return None
    mask = options.prune.mask
    if (mask / MANIFEST_FILE).is_file():
        raise UsageError(f"--mask {mask} is a bundle; pass the model in it, {mask / PRUNED}.")
    import torch

    from prox24_deploy.model.checkpoint import renamed_tensors
    from prox24_deploy.model.directory import build_untrained
    from prox24_deploy.pruning.masks import open_masks, read_masks

    found = open_masks(options.prune)
    if found is not None:
        model = build_untrained(source.path, recipe, torch.device("meta"))
        named = replace(source, renamed=renamed_tensors(source, model, recipe))
        read_masks(found, model, named, recipe, options.prune)
    return found


def fitted_recipe(recipe: Recipe, architecture: str, model_dir: Path) -> Recipe:
    """The recipe for a class of models, with the sizes of what it reads of images and speech."""
    from prox24_deploy.data.modality import fitted_sizes

    return fitted_sizes(fitted_to_sentences(recipe, architecture, model_dir), model_dir)


def _read_samples(
    directory: "ModelDir", recipe: Recipe, options: BuildOptions, progress: Progress
) -> tuple["Samples", "Samples"]:
    from prox24_deploy.data.modality import Wanted, read_samples

    return read_samples(
        Wanted(
            directory=directory,
            recipe=recipe,
            options=options.text,
            device=lambda: torch_device(options.device),
            progress=progress,
        )
    )


def fitted_shapes(options: EngineOptions, config: dict[str, Any], recipe: Recipe) -> EngineOptions:
    """The options with no sequence longer than the model accepts; engines are built for these.

    Raises:
        UsageError: the model has no cache for a past, or no position for a token behind it.
    """
    _require_past(options, config, recipe)
    longest = longest_of(config, recipe.sequence_length)
    return replace(options, sequences=tuple(min(length, longest) for length in options.sequences))


def warn_of_lengths(options: EngineOptions, model: ModelContext) -> None:
    """Say which lengths that were asked for are not those that are run."""
    if options.sequences == EngineOptions().sequences:
        return
    if not model.recipe.modality.has_length:
        log.warning(
            "--shapes sequence has no effect on a model of %ss.", model.recipe.modality.unit
        )
        return
    longest = longest_of(model.config, model.recipe.sequence_length)
    if longer := [length for length in options.sequences if length > longest]:
        log.warning(
            "--shapes sequence=%s is longer than the %d tokens that the model accepts, which are "
            "taken in its place.", ",".join(map(str, longer)), longest,
        )  # fmt: skip


def _require_past(options: EngineOptions, config: dict[str, Any], recipe: Recipe) -> None:
    if not options.pasts:
        return
    past = max(options.pasts)
    if not any(part.cache for part in recipe.parts):
        raise UsageError(
            f"--shapes past={past} asks for decoding with a cache, and models of recipe "
            f"{recipe.family} for {recipe.task} keep none; leave past out."
        )
    positions = longest_of(config, 0)
    if 0 < positions <= past:
        raise UsageError(
            f"--shapes past={past} leaves no position for a new token, the model has {positions}; "
            f"pass past={positions - 1} or less."
        )


def model_of(bundle: Bundle) -> ModelInfo:
    """The model that a bundle was made from.

    Raises:
        BundleError: it names none.
    """
    if bundle.manifest.model is None:
        raise BundleError(f"Bundle {bundle.root} names no model; run prune first.")
    return bundle.manifest.model


def source_of(bundle: Bundle, moved: Path | None = None) -> "ModelDir":
    """The model directory that a bundle was pruned from, opened anew, or where it lies now.

    Raises:
        ModelDirError: it cannot be opened.
        BundleError: it is not what it was, or the bundle has not been pruned.
    """
    from prox24_deploy.model.directory import open_model_dir

    path = moved or Path(model_of(bundle).path)
    if moved is None and not path.exists():
        raise ModelDirError(
            f"The model {path}, which {bundle.root} was pruned from, is not there; put it back, or "
            "pass --model DIR to evaluate and report."
        )
    source = open_model_dir(path)
    entry = bundle.manifest.stages.get("prune")
    if entry is None or source.fingerprint() != entry.inputs["source"]:
        what = f"has changed since {bundle.root} was pruned; run prune again"
        if moved is not None:
            what = f"is not the model that {bundle.root} was pruned from; pass that as --model"
        raise BundleError(f"Model directory {path} {what}.")
    return source


def open_model(bundle: Bundle) -> ModelContext:
    """The model of a bundle, with the recipe and the configuration that lie in it.

    Raises:
        BundleError: it names none.
        ModelDirError, RecipeError: what it holds of them cannot be read.
    """
    info, pruned = model_of(bundle), bundle.root / PRUNED
    whole = parse_recipe(bundle.manifest.recipe, f"of {bundle.root}")
    return ModelContext(
        path=Path(info.path),
        sha256=info.sha256,
        recipe=fitted_recipe(whole, info.architecture, pruned),
        config=read_config(pruned),
    )


def vocabulary_of(config: dict[str, Any]) -> int:
    """Number of tokens; 1 for a model that reads none."""
    return whole_number(config, "vocab_size", 1)


def torch_device(choice: DeviceChoice) -> "torch.device":
    """The device that `--device` asks for.

    Raises:
        BackendMissingError: torch finds no CUDA device.
    """
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise BackendMissingError(
            "Device 'cuda' was asked for, but torch finds no CUDA device; pass --device cpu or "
            "install a CUDA build of torch."
        )
    use_cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
