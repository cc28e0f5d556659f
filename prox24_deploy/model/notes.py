"""What of a checkpoint is left out of everything that is made from it, and must be said."""

import math
from collections.abc import Iterator, Sequence

from torch import nn

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.rotation import read_rotation
from prox24_deploy.model.blocks import find_blocks
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.layers import is_layer

_NAMED = 3
# Why they are no targets, as the end of a sentence.
FUSED_EXPERTS = "only experts that a table [experts] of a recipe takes apart can be pruned"


def left_out(
    directory: ModelDir, model: nn.Module, recipe: Recipe, unused: Sequence[str]
) -> tuple[str, ...]:
    """One sentence for each part of a checkpoint that is not exported, or not pruned unseen.

    Also that it is a rotated one, so that what is called dense is not the first model.

    Args:
        directory: the checkpoint.
        model: as opened for the task of the recipe.
        recipe: says where the blocks are.
        unused: tensors of the checkpoint that the model has no place for.
    """
    return (*_rotated(directory), *_unused(directory, recipe, unused), *_fused(model, recipe))


def expert_weights(block: nn.Module) -> list[str]:
    """Weights of a block that hold several matrices in one tensor, as fused experts do.

    They belong to no layer of a kind that can be pruned, and so are targets of no recipe that does
    not take them apart.
    """
    of_layers = {id(p) for m in block.modules() if is_layer(m) for p in m.parameters()}
    # Kernels of convolutions of any rank are single matrices.
    of_layers |= {id(p) for m in block.modules() if isinstance(m, _KERNELS) for p in m.parameters()}
    return [
        name
        for name, parameter in block.named_parameters()
        if parameter.ndim > 2 and id(parameter) not in of_layers
    ]


_KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def _rotated(directory: ModelDir) -> Iterator[str]:
    if found := read_rotation(directory.path):
        yield (
            "The dense model is a rotated one: as stored, its most likely token is that of the "
            f"model that it was made from, sha256 {found.source_sha256[:8]}, at "
            f"{found.agreement:.2%} of positions."
        )


def _unused(directory: ModelDir, recipe: Recipe, unused: Sequence[str]) -> Iterator[str]:
    names = sorted(n for n in unused if directory.tensors[n].dtype.is_floating_point)
    if names:
        yield (
            f"The checkpoint is a {directory.architecture} and was opened for {recipe.task}, which "
            f"has no place for {len(names)} of its tensors ({_some(names)}): what they compute, "
            "such as the output of a head, is in no ONNX file."
        )


def _fused(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    names, weights = [], 0
    for part in recipe.parts:
        for index, block in enumerate(find_blocks(model, part)):
            found = expert_weights(block)
            names += [f"{part.blocks}.{index}.{name}" for name in found]
            weights += sum(math.prod(block.get_parameter(name).shape) for name in found)
    if names:
        yield (
            f"{len(names)} tensors of several matrices each, as those of fused experts "
            f"({_some(names)}), hold {weights:,} weights and are left dense: {FUSED_EXPERTS}."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
