"""The model to build and what to build it with, read and checked before any work."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.config.options import BuildOptions, DeviceChoice, EngineOptions
from prox24_deploy.config.recipe import Recipe, parse_recipe, select_recipe
from prox24_deploy.core.errors import BackendMissingError, BundleError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.types import Progress
from prox24_deploy.model.config_file import longest_of, read_config, whole_number
from prox24_deploy.packaging.naming import source_name

if TYPE_CHECKING:
    import torch

    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir


def _silent(_label: str, _done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to build, the recipe that fits it, what it reads or hears, and its name."""

    directory: "ModelDir"
    recipe: Recipe
    recipe_text: str
    calibration: "Samples"
    held_out: "Samples"
    name: str


def read_subject(
    model_dir: Path, out: Path, options: BuildOptions, progress: Progress = _silent
) -> Subject:
    """Read and check everything that can be wrong with the input; writes nothing.

    A model of speech first listens to its recordings, of which `progress` is told.

    Raises:
        ModelDirError, RecipeError, CalibrationError: the input cannot be used.
        UsageError: the name that was asked for is none.
        BundleError: `out` lies in the model directory.
    """
    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.model.recipe_template import advise

    name = source_name(model_dir, options.name)
    directory = open_model_dir(model_dir)
    if out.resolve().is_relative_to(model_dir.resolve()):
        raise BundleError(f"Output {out} lies in the model directory {model_dir}; pass another -o.")
    recipe, recipe_text = select_recipe(
        model_dir, directory.model_type, options.recipe, lambda: advise(directory)
    )
    recipe = fitted_recipe(recipe, directory.architecture, directory.path)
    calibration, held_out = _read_samples(directory, recipe, options, progress)
    return Subject(directory, recipe, recipe_text, calibration, held_out, name)


def fitted_recipe(recipe: Recipe, architecture: str, model_dir: Path) -> Recipe:
    """The recipe for a class of models, with the sizes of what it reads of images and speech."""
    from prox24_deploy.data.modality import fitted_sizes
    from prox24_deploy.model.sentence import fitted_to_sentences

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
    """The options with no sequence longer than the model accepts; engines are built for these."""
    longest = longest_of(config, recipe.sequence_length)
    return replace(options, sequences=tuple(min(length, longest) for length in options.sequences))


def model_of(bundle: Bundle) -> ModelInfo:
    """The model that a bundle was made from.

    Raises:
        BundleError: it names none.
    """
    if bundle.manifest.model is None:
        raise BundleError(f"Bundle {bundle.root} names no model; run prune first.")
    return bundle.manifest.model


def source_of(bundle: Bundle) -> "ModelDir":
    """The model directory that a bundle was pruned from, opened anew.

    Raises:
        ModelDirError: it cannot be opened.
        BundleError: it is not what it was, or the bundle has not been pruned.
    """
    from prox24_deploy.model.directory import open_model_dir

    path = Path(model_of(bundle).path)
    source = open_model_dir(path)
    entry = bundle.manifest.stages.get("prune")
    if entry is None or source.fingerprint() != entry.inputs["source"]:
        raise BundleError(
            f"Model directory {path} has changed since {bundle.root} was pruned; run prune again."
        )
    return source


def recipe_of(bundle: Bundle) -> Recipe:
    """The recipe that fits the model of a bundle."""
    whole = parse_recipe(bundle.manifest.recipe, f"of {bundle.root}")
    return fitted_recipe(whole, model_of(bundle).architecture, bundle.root / "pruned")


def config_of(bundle: Bundle) -> dict[str, Any]:
    """config.json of the pruned model."""
    return read_config(bundle.root / "pruned")


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
