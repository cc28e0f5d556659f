"""The model to build and what to build it with, read and checked before any work."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.config.options import BuildOptions, DeviceChoice, EngineOptions, TextOptions
from prox24_deploy.config.recipe import Recipe, parse_recipe, select_recipe
from prox24_deploy.core.errors import BackendMissingError, BundleError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.core.types import Progress
from prox24_deploy.model.config_file import labels_of, read_config, whole_number
from prox24_deploy.packaging.naming import source_name

if TYPE_CHECKING:
    import torch

    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir


# What the configurations of different families call the number of positions.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions")


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
    from prox24_deploy.model.sentence import fitted_to_sentences

    recipe = fitted_to_sentences(recipe, architecture, model_dir)
    if recipe.reads_speech:
        from prox24_deploy.data.speech import feature_sizes

        return recipe.with_sizes(feature_sizes(read_config(model_dir)))
    if not recipe.reads_images:
        return recipe
    from prox24_deploy.data.images import pixel_sizes
    from prox24_deploy.model.processors import load_image_processor

    return recipe.with_sizes(pixel_sizes(load_image_processor(model_dir)))


def _read_samples(
    directory: "ModelDir", recipe: Recipe, options: BuildOptions, progress: Progress
) -> tuple["Samples", "Samples"]:
    if recipe.reads_speech:
        return _read_speech(directory, recipe, options, progress)
    read = _read_images if recipe.reads_images else _read_text
    return read(directory, recipe, options.text)


def _read_text(
    directory: "ModelDir", recipe: Recipe, text: TextOptions
) -> tuple["Samples", "Samples"]:
    from prox24_deploy.data.pairs import make_pairs, start_token
    from prox24_deploy.data.text import make_samples, read_texts
    from prox24_deploy.model.processors import load_tokenizer
    from prox24_deploy.model.sentence import settled
    from prox24_deploy.model.vocabulary import require_embedded, require_special_tokens

    texts = read_texts(text.calibration, text.evaluation, text.seed)
    tokenizer = load_tokenizer(directory)
    require_special_tokens(directory, tokenizer)
    budgets = (text.calibration_tokens, text.evaluation_tokens)
    longest = min(recipe.sequence_length, longest_of(directory.config, recipe))
    if (pipeline := settled(directory.path, recipe)) is not None:
        longest = min(longest, int(tokenizer.model_max_length))
        texts = (texts[0].behind(pipeline.prompt), texts[1].behind(pipeline.prompt))
    if recipe.decoder is None:
        make = partial(make_samples, tokenizer=tokenizer, recipe=recipe, max_length=longest)
    else:
        start = start_token(directory)
        make = partial(
            make_pairs, tokenizer=tokenizer, recipe=recipe, max_length=longest, start=start
        )
    calibration, held_out = (
        make(part, tokens=tokens) for part, tokens in zip(texts, budgets, strict=True)
    )
    require_embedded(directory, tokenizer, (*calibration.batches, *held_out.batches))
    return calibration, held_out


def _read_images(
    directory: "ModelDir", _: Recipe, options: TextOptions
) -> tuple["Samples", "Samples"]:
    from prox24_deploy.data.images import make_image_samples, read_images
    from prox24_deploy.model.processors import load_image_processor

    images = read_images(options.calibration, options.evaluation, options.seed)
    processor = load_image_processor(directory.path)
    labels = labels_of(directory.config)
    calibration, held_out = (
        make_image_samples(part, processor, labels, limit=options.images) for part in images
    )
    return calibration, held_out


def _read_speech(
    directory: "ModelDir", recipe: Recipe, options: BuildOptions, progress: Progress
) -> tuple["Samples", "Samples"]:
    from prox24_deploy.data.recordings import read_recordings
    from prox24_deploy.data.speech import Listener, make_speech_samples
    from prox24_deploy.model.directory import load_model
    from prox24_deploy.model.processors import load_feature_extractor, load_tokenizer
    from prox24_deploy.model.vocabulary import require_embedded, require_special_tokens

    text = options.text
    recordings = read_recordings(text.calibration, text.evaluation, text.seed)
    extractor, tokenizer = load_feature_extractor(directory.path), load_tokenizer(directory)
    require_special_tokens(directory, tokenizer)
    model = load_model(directory, recipe, torch_device(options.device))
    listener = Listener(directory=directory, model=model, extractor=extractor, tokenizer=tokenizer)
    calibration, held_out = (
        make_speech_samples(part, listener, limit=text.recordings, progress=progress)
        for part in recordings
    )
    require_embedded(directory, tokenizer, (*calibration.batches, *held_out.batches))
    return calibration, held_out


def fitted_shapes(options: EngineOptions, config: dict[str, Any], recipe: Recipe) -> EngineOptions:
    """The options with no sequence longer than the model accepts; engines are built for these."""
    longest = longest_of(config, recipe)
    return replace(options, sequences=tuple(min(length, longest) for length in options.sequences))


def longest_of(config: dict[str, Any], recipe: Recipe) -> int:
    """Tokens that the model accepts at most; the recipe's length where it does not say."""
    said = next((key for key in _POSITION_KEYS if config.get(key)), _POSITION_KEYS[0])
    return whole_number(config, said, recipe.sequence_length)


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
