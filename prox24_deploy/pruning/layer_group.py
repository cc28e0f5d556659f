"""Solve the layers of one block that share an input, as one stacked problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.layers import Layer, from_matrix, layer_at, to_matrix
from prox24_deploy.pruning.activations import BlockPair
from prox24_deploy.pruning.masks import fixed_mask
from prox24_deploy.pruning.ranks import ALONE, Ranks
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.solvers.problem import LayerProblem, damping_for, layer_problem
from prox24_deploy.pruning.solvers.solver import PRESETS, LayerSolution, is_solved, solve_layer


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """One pruned layer.

    Attributes:
        weight: in the layout of the layer and the dtype of the checkpoint.
        method: the method that made it; "unchanged" where the layer was 2:4 already.
        iterations: of the solver.
    """

    weight: Tensor
    method: str
    iterations: int


def solve_group(
    twin: BlockPair,
    group: Sequence[str],
    moments: SecondMoments,
    options: PruneOptions,
    stored_dtype: Callable[[str], torch.dtype],
    ranks: Ranks = ALONE,
    *,
    last: bool = False,
) -> dict[str, SolvedLayer]:
    """Prune layers of the block from the weights they have in `twin.pruned`, which stay.

    Args:
        twin: the block.
        group: paths of layers that share an input.
        moments: of that input.
        options: method, preset and target.
        stored_dtype: parameter name to the dtype in which the checkpoint stores it.
        ranks: the processes that each solve some of the rows.
        last: that no other layer is solved on these moments, so that their cross sum may go.

    Raises:
        ModelDirError: weights or activations are NaN or infinite.
    """
    layers = [layer_at(twin.pruned, name) for name in group]
    matrices = [to_matrix(layer, layer.weight) for layer in layers]
    masks = [_mask_matrix(layer) for layer in layers]
    stacked = torch.cat(matrices)
    rows = ranks.rows(len(stacked))
    problem = group_problem(stacked[rows], moments, options, f"{twin.prefix}.{group[0]}")
    if last:
        moments.give_up(cross=True)
    known = [mask for mask in masks if mask is not None]
    fixed = torch.cat(known)[rows] if known else None
    solution = _solution(stacked[rows], problem, options, fixed, ranks)
    sizes = [len(matrix) for matrix in matrices]
    parts = ranks.gathered(solution.weight, len(stacked)).split(sizes)
    solved = {}
    for name, layer, mask, before, after in zip(group, layers, masks, matrices, parts, strict=True):
        # Solved with its group or not, a layer that is 2:4 already keeps its bits.
        unchanged = is_solved(before, mask)
        own = from_matrix(layer, before if unchanged else after)
        solved[name] = SolvedLayer(
            own.to(stored_dtype(f"{twin.prefix}.{name}.weight")),
            "unchanged" if unchanged else solution.used,
            0 if unchanged else solution.iterations,
        )
    return solved


def _mask_matrix(layer: Layer) -> Tensor | None:
    mask = fixed_mask(layer)
    return None if mask is None else to_matrix(layer, mask)


def group_problem(
    weight: Tensor, moments: SecondMoments, options: PruneOptions, path: str
) -> LayerProblem:
    """What is to be solved for some rows (rows, d) of a group; `path` names it in an error.

    Raises:
        ModelDirError: weights or activations are NaN or infinite.
    """
    try:
        gram, cross, tokens = moments.for_solving(cross=options.target == "asymmetric")
        damping = damping_for(weight.shape[1], moments.tokens)
        return layer_problem(weight, gram, damping, cross, tokens=tokens)
    except ValueError as error:
        raise ModelDirError(
            f"Layer {path}: {error}; its activations overflow or the checkpoint is damaged."
        ) from error


def _solution(
    weight: Tensor, problem: LayerProblem, options: PruneOptions, mask: Tensor | None, ranks: Ranks
) -> LayerSolution:
    """The rows of this process, solved together with the others."""
    if options.method == "none":
        raise ValueError("layers are not to be pruned")
    return solve_layer(
        weight,
        problem,
        method=options.method,
        options=PRESETS[options.preset],
        refinement=options.refinement,
        fixed=mask,
        shares=ranks,
    )
