"""Open a tiny model directory with its recipe and some batches of text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prox24_deploy.config.recipe import Recipe, select_recipe
from prox24_deploy.data.text import make_samples, read_texts
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.model.processors import load_tokenizer


@dataclass(frozen=True, slots=True)
class Opened:
    """A model directory, the model of its recipe and batches of the given text."""

    directory: ModelDir
    recipe: Recipe
    recipe_text: str
    model: nn.Module
    batches: tuple[Batch, ...]


def open_tiny(path: Path, text: Path, tokens: int = 7000, length: int = 64) -> Opened:
    """Every call builds a new model, so that one may be changed."""
    directory = open_model_dir(path)
    recipe, recipe_text = select_recipe(path, directory.model_type, None)
    recipe = recipe.for_architecture(directory.architecture)
    texts, _ = read_texts([text], [text], 0)
    tokenizer = load_tokenizer(directory)
    samples = make_samples(texts, tokenizer, recipe, tokens=tokens, max_length=length)
    model = load_model(directory, recipe, torch.device("cpu"))
    return Opened(directory, recipe, recipe_text, model, samples.batches)
