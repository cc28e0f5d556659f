"""What layers lose that few tokens are routed to, with the pull to their dense weights or not.

    python benchmarks/few_tokens.py MODEL_DIR --calibration F

MLPs of a trained decoder stand for experts: gate and down of two blocks are pruned on some of the
tokens that they read, so many for each of their features, and judged by their relative squared
error on 6144 others. The first column keeps the largest weights, as an expert without tokens does.
The command prints the mean over the layers and fails if the pull makes any mean worse.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from families import aligned, prepare
from torch import Tensor, nn

from prox24_deploy.config.options import BuildOptions, TextOptions
from prox24_deploy.core.types import silent
from prox24_deploy.model.blocks import find_blocks, run_model
from prox24_deploy.model.directory import load_model
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pruning.second_moments import SecondMoments
from prox24_deploy.pruning.solvers.problem import damping_for, layer_problem
from prox24_deploy.pruning.solvers.solver import PRESETS, solve_layer

LAYERS = ("mlp.gate_proj", "mlp.down_proj")
TOKENS_PER_FEATURE = (0, 1 / 16, 1 / 4, 1 / 2, 1)
JUDGED, MOST_ROWS = 6144, 128


@torch.no_grad()
def inputs_of(model: nn.Module, batches: Sequence[Any], task: str, layer: nn.Module) -> Tensor:
    """What a layer reads, (tokens, d), in an order that is drawn."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches:
        run_model(model, batch, task)
    handle.remove()
    rows = torch.cat(seen)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def error(weight: Tensor, inputs: Tensor, judged: Tensor, *, pulled: bool) -> float:
    """Relative squared error on `judged` of a layer (rows, d) that was pruned on `inputs`."""
    features = weight.shape[1]
    moments = SecondMoments.empty(features, weight.device, routed=pulled)
    moments.add(inputs, inputs)
    gram, _, tokens = moments.for_solving(cross=False)
    problem = layer_problem(weight, gram, damping_for(features, moments.tokens), tokens=tokens)
    found = solve_layer(weight, problem, options=PRESETS["fast"]).weight
    return float((judged @ (found - weight).T).square().sum() / (judged @ weight.T).square().sum())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    options: Any = parser.parse_args(arguments)
    prepare()
    text = TextOptions(calibration=(options.calibration,), calibration_tokens=16384)
    context = read_context(options.model, None, BuildOptions(text=text), silent)
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    blocks = find_blocks(model, context.recipe)
    means: dict[bool, list[list[float]]] = {True: [], False: []}
    for index in (len(blocks) // 3, 2 * len(blocks) // 3):
        for name in LAYERS:
            layer = blocks[index].get_submodule(name)
            batches = context.calibration.batches
            rows = inputs_of(model, batches, context.recipe.task, layer)
            weight: Any = layer.weight[:MOST_ROWS]  # type: ignore[index]  # a Linear
            counts = [int(each * weight.shape[1]) for each in TOKENS_PER_FEATURE]
            for pulled, found in means.items():
                judged = rows[-JUDGED:]
                # Without the pull there is nothing to go by where there is no token.
                found.append(
                    [
                        error(weight, rows[:count], judged, pulled=pulled or not count)
                        for count in counts
                    ]
                )
    table = {
        pulled: [fmean(column) for column in zip(*f, strict=True)] for pulled, f in means.items()
    }
    head = ["tokens per feature", *(f"{each:.2f}" for each in TOKENS_PER_FEATURE)]
    cells = [
        ["pulled" if pulled else "not pulled", *(f"{each:.4f}" for each in row)]
        for pulled, row in table.items()
    ]
    print(aligned(head, cells))
    print(json.dumps({"pulled": table[True], "not_pulled": table[False]}))
    for with_pull, without in zip(table[True], table[False], strict=True):
        assert with_pull <= without * 1.001, table


if __name__ == "__main__":
    main()
