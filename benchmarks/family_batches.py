"""The recipe of a tiny model of any family, and a batch that it takes."""

from dataclasses import replace

import torch
from tiny_families import FEATURES, PIXELS, VOCABULARY

from prox24_deploy.config.recipe import Recipe, parse_recipe, shipped_recipes
from prox24_deploy.core.modalities import IMAGES, RECORDINGS
from prox24_deploy.model.batch import IGNORED, Batch

RECIPES = [parse_recipe(text, family) for family, text in shipped_recipes().items()]


def recipe_of(model: torch.nn.Module) -> Recipe:
    kind = model.config.model_type  # type: ignore[union-attr]
    (recipe,) = [recipe for recipe in RECIPES if kind in recipe.model_types]
    return recipe.for_architecture(type(model).__name__)


def batch(recipe: Recipe) -> Batch:
    """Three rows of twelve tokens, the last padded on the right unless the model is causal.

    Three images where the model reads images, three recordings where it reads speech.
    """
    if recipe.modality is IMAGES:
        pixels = torch.randn(3, *PIXELS.values(), generator=torch.Generator().manual_seed(0))
        return Batch({"pixel_values": pixels}, torch.ones(3, dtype=torch.bool))
    if recipe.modality is RECORDINGS:
        shape = (3, FEATURES["mels"], FEATURES["frames"])
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return with_targets(Batch({"input_features": features}, torch.ones(3, dtype=torch.bool)))
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 12, dtype=torch.bool)
    if recipe.task != "text-generation":
        real[2, 7:] = False
    ids[~real] = 1
    known = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    names = [spec.name for spec in recipe.inputs]
    found = Batch({name: known[name] for name in names if name in known}, real)
    return found if recipe.decoder is None else with_targets(found)


def with_targets(found: Batch) -> Batch:
    """Nine tokens for a decoder to write, of the first row only four."""
    targets = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    targets[0, 4:] = IGNORED
    fed = torch.cat([torch.full((3, 1), 2), targets[:, :-1].clamp(min=1)], dim=1)
    return replace(found, inputs=found.inputs | {"decoder_input_ids": fed}, targets=targets)
