"""Groups of layers of one block whose inputs are collected in the same forward passes.

Layers that share an input are solved together, and see what those before them feed them once they
are pruned. Experts do not feed each other: what all of them read is the same for each, and so they
take two passes over the samples together, where each alone would take two.
"""

from collections.abc import Sequence

from torch import nn

from prox24_deploy.model.experts import place_of
from prox24_deploy.model.layers import layer_at, matrix_shape

# Bytes of Gram matrices that experts have in memory at once; one group of layers may have more.
MOST_GRAM = 2**32
# Those of one group: pruned, dense and cross, of calibration and of held-out samples, float64.
_MATRICES, _DOUBLE = 6, 8

Group = list[str]


def gram_bytes(features: int) -> int:
    """Those of the Gram matrices of one input."""
    return _MATRICES * _DOUBLE * features**2


def waves(block: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Put groups of layers, in the order of a forward pass, into waves; most have one group.

    Of experts, all layers that read what the expert reads come before those that read what these
    give.
    """
    found: list[list[Group]] = []
    of_experts: dict[int, tuple[list[Group], list[Group]]] = {}
    for group in groups:
        place = place_of(block, group[0])
        if place is None:
            found.append([group])
            continue
        if id(place.experts) not in of_experts:
            of_experts[id(place.experts)] = ([], [])
            found.extend(of_experts[id(place.experts)])
        of_experts[id(place.experts)][place.is_last].append(group)
    return [part for wave in found for part in _parts(block, wave)]


def _parts(block: nn.Module, wave: Sequence[Group]) -> list[list[Group]]:
    """Parts of a wave whose Gram matrices may be in memory together."""
    parts: list[list[Group]] = []
    left = 0
    for group in wave:
        size = gram_bytes(matrix_shape(layer_at(block, group[0]))[1])
        if size > left:
            parts.append([])
            left = MOST_GRAM
        parts[-1].append(group)
        left -= size
    return parts
