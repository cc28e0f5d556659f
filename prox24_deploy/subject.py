"""The model to build and the text to build it with, read and checked before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.errors import BundleError
from prox24_deploy.options import BuildOptions
from prox24_deploy.recipe import Recipe, select_recipe

if TYPE_CHECKING:
    from prox24_deploy.model.calibration import Samples
    from prox24_deploy.model.directory import ModelDir

# What the configurations of different families call the number of positions.
_POSITION_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to build, the recipe that fits its architecture, and its text."""

    directory: "ModelDir"
    recipe: Recipe
    recipe_text: str
    calibration: "Samples"
    held_out: "Samples"


def read_subject(model_dir: Path, out: Path, options: BuildOptions) -> Subject:
    """Read and check everything that can be wrong with the input; writes nothing.

    Raises:
        ModelDirError, RecipeError, CalibrationError: the input cannot be used.
        BundleError: `out` lies in the model directory.
    """
    from prox24_deploy.model.calibration import make_samples, read_texts
    from prox24_deploy.model.directory import load_tokenizer, open_model_dir
    from prox24_deploy.model.evaluate import pooling_of
    from prox24_deploy.model.skeleton import advise

    directory = open_model_dir(model_dir)
    if out.resolve().is_relative_to(model_dir.resolve()):
        raise BundleError(f"Output {out} lies in the model directory {model_dir}; pass another -o.")
    recipe, recipe_text = select_recipe(
        model_dir, directory.model_type, options.recipe, lambda: advise(directory)
    )
    recipe = recipe.for_architecture(directory.architecture)
    text = options.text
    texts = read_texts(text.calibration, text.evaluation, text.seed)
    tokenizer = load_tokenizer(directory)
    if recipe.task in {"feature-extraction", "text-encoding"}:
        pooling_of(model_dir, recipe.embedding)
    budgets = (text.calibration_tokens, text.evaluation_tokens)
    longest = min(recipe.sequence_length, longest_of(directory.config, recipe))
    calibration, held_out = (
        make_samples(part, tokenizer, recipe, tokens=tokens, max_length=longest)
        for part, tokens in zip(texts, budgets, strict=True)
    )
    return Subject(directory, recipe, recipe_text, calibration, held_out)


def longest_of(config: dict[str, Any], recipe: Recipe) -> int:
    """Tokens that the model accepts at most; the recipe's length where it does not say."""
    known = (config.get(key) for key in _POSITION_KEYS)
    return int(next(filter(None, known), recipe.sequence_length))
