"""Which target layers are pruned, and by which options: globs of the user and of the recipe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from torch import nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import RecipeError, UsageError
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.layers import Layer, layer_at, obstacle
from prox24_deploy.pruning.activations import BlockPair


def left_dense(recipe: Recipe, model: nn.Module, options: PruneOptions) -> dict[str, str]:
    """Map the full path of each target that is not to be pruned to the reason.

    That is what the user's globs or plan say, and a weight that another module has too.

    Raises:
        UsageError: a glob matches no target, or the plan knows other layers.
    """
    paths = list(_paths(recipe, model))
    planned = dict(options.planned_dense)
    if strangers := planned.keys() - {".".join(path) for path in paths}:
        raise UsageError(
            f"The plan names layer {min(strangers)}, which is no target of recipe {recipe.family} "
            "in this model; plan this model again."
        )
    for option, globs in (("--include", options.include), ("--exclude", options.exclude)):
        for glob in globs:
            if (example := _unmatched(glob, paths)) is not None:
                raise UsageError(
                    f"{option} {glob!r} matches no target layer of recipe {recipe.family}; they "
                    f"are named like {'.'.join(example)} or {example[1]}."
                )
    dense = planned | sharing(recipe, model)
    for prefix, name in paths:
        excluding = [glob for glob in options.exclude if concerns(glob, prefix, name)]
        if excluding:
            dense[f"{prefix}.{name}"] = f"excluded by --exclude {excluding[0]}"
        elif options.include and not any(concerns(g, prefix, name) for g in options.include):
            dense[f"{prefix}.{name}"] = "not matched by --include"
    return dense


def prunable(
    twin: BlockPair, recipe: Recipe, dense: Mapping[str, str]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Targets of one block that can be pruned, by path in it, and the reasons against the others.

    Args:
        twin: the block.
        recipe: says which layers are targets.
        dense: full path of each target to leave dense, with the reason.
    """
    layers = target_layers(twin.pruned, recipe)
    reasons = {
        name: dense.get(f"{twin.prefix}.{name}", "") or obstacle(layer)
        for name, layer in layers.items()
    }
    obstacles = {name: reason for name, reason in reasons.items() if reason}
    return {name: layers[name] for name in layers if name not in obstacles}, obstacles


def require_matches(recipe: Recipe, model: nn.Module) -> None:
    """Refuse a target that matches no layer, and an override that concerns no target.

    Raises:
        RecipeError: names the glob and how layers are named.
    """
    paths = list(_paths(recipe, model))
    for override in recipe.overrides:
        if (example := _unmatched(override.layers, paths)) is not None:
            raise RecipeError(
                f"Recipe {recipe.family} overrides {override.layers!r}, which matches no target "
                f"layer; they are named like {'.'.join(example)} or {example[1]}."
            )


def by_options(
    prefix: str, group: Sequence[str], recipe: Recipe, options: PruneOptions
) -> list[tuple[list[str], PruneOptions]]:
    """Split layers of one block by what the recipe's overrides make of the options for each."""
    parts: dict[PruneOptions, list[str]] = {}
    for name in group:
        own = options
        for override in recipe.overrides:
            if concerns(override.layers, prefix, name):
                own = replace(own, **override.model_dump(exclude={"layers"}, exclude_none=True))
        parts.setdefault(own, []).append(name)
    return [(names, own) for own, names in parts.items()]


def target_paths(recipe: Recipe, model: nn.Module) -> list[str]:
    """The full path of every target, in the order of the blocks."""
    return [".".join(path) for path in _paths(recipe, model)]


def concerns(glob: str, prefix: str, name: str) -> bool:
    """Whether a glob matches a layer by its path in the block or in the model."""
    return any(fnmatch(path, glob) for path in (name, f"{prefix}.{name}"))


def sharing(recipe: Recipe, model: nn.Module) -> dict[str, str]:
    """Targets whose weight is that of another module too, which pruning for one would change."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    found = {}
    for path in (".".join(parts) for parts in _paths(recipe, model)):
        weight = layer_at(model, path).weight
        if others := [name for name in owners[id(weight)] if name != path]:
            found[path] = f"shares its weight with {others[0]}"
    return found


def _unmatched(glob: str, paths: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """An example of a target's prefix and name if the glob matches none, else None."""
    return None if any(concerns(glob, *path) for path in paths) else paths[0]


def _paths(recipe: Recipe, model: nn.Module) -> Iterator[tuple[str, str]]:
    for part in recipe.parts:
        for index, block in enumerate(find_blocks(model, part)):
            for name in target_layers(block, part):
                yield f"{part.blocks}.{index}", name
