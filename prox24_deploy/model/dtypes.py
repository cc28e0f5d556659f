"""In which dtype a model is exported: the user's, else its checkpoint's own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import get_args

from torch import nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.modalities import IMAGES
from prox24_deploy.core.types import DType
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.recipe_template import without_weights
from prox24_deploy.model.shards import StoredTensor


def settled_dtype(directory: ModelDir, recipe: Recipe, asked: DType | None) -> DType:
    """The dtype to export in, known before any work.

    Where none is asked for, that is the one in which the checkpoint stores most parameters of the
    layers that the recipe prunes; of all its parameters, where its names tell nothing of layers.

    Raises:
        ModelDirError: nothing is exported in the checkpoint's own dtype, or this model is not
            exported in the settled one; says what to ask for.
    """
    stored = _most_common(target_weights(directory, recipe)) or _most_common(
        directory.tensors.values()
    )
    found = asked or next((dtype for dtype in get_args(DType) if dtype == stored), None)
    if found is None:
        raise ModelDirError(
            f"Model directory {directory.path} stores its weights in {stored}, in which nothing is "
            "exported; pass --dtype float32, float16 or bfloat16."
        )
    if found == "bfloat16" and _has_batch_norm(directory, recipe):
        origin = "" if asked else f", in which {directory.path} is stored"
        raise ModelDirError(
            f"{directory.architecture} cannot be exported in bfloat16{origin}, because its "
            "convolutions are folded with their batch norms in float32; pass --dtype float16 or "
            "float32."
        )
    return found


def target_weights(directory: ModelDir, recipe: Recipe) -> list[StoredTensor]:
    """The weights of the checkpoint whose names are those of targets in the recipe's blocks."""
    wanted = [glob for part in recipe.parts for glob in _globs(part.blocks, part.targets)]
    ignored = [glob for part in recipe.parts for glob in _globs(part.blocks, part.ignore)]
    return [
        tensor
        for name, tensor in directory.tensors.items()
        if any(fnmatch(name, glob) for glob in wanted)
        and not any(fnmatch(name, glob) for glob in ignored)
    ]


def _globs(blocks: str, layers: Sequence[str]) -> list[str]:
    """What weights of layers may be called, with or without a prefix of the checkpoint."""
    globs = [f"{before}{blocks}.*.{layer}.weight" for layer in layers for before in ("", "*.")]
    # A model may be opened without the prefix of its checkpoint, or the other way round.
    return globs + [glob.partition(".")[2] for glob in globs if not glob.startswith("*.")]


def _most_common(tensors: Iterable[StoredTensor]) -> str:
    """The floating dtype of most parameters, "" where there is none."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    return max(sorted(counts), key=counts.__getitem__, default="")


def _has_batch_norm(directory: ModelDir, recipe: Recipe) -> bool:
    """Whether the model, built without memory for its weights, normalises by batches of images."""
    model = without_weights(directory, recipe.task) if recipe.modality is IMAGES else None
    return model is not None and any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
