"""Quality of every pruning method on one model, layer by layer and end to end.

Layer by layer, every method gets the same weights and the same Gram matrices of the dense model;
the loss is the relative squared output error on held-out text, and the seconds of its solver are
those of the processor on a CPU. End to end, every method prunes a
fresh copy of the model; the loss is the rise of the log-perplexity (decoders) or 1 - cosine of the
embeddings (encoders) on evaluation text, and ratios have paired standard errors.

    python benchmarks/quality.py MODEL_DIR [--calibration F --evaluation F] [--part layers|model]
        [--layer-methods METHOD ...] [--plot FILE]

Prints tables, the bars that hold for all-MiniLM-L6-v2 (layers) and for decoders (model) beside what
was reached, and one JSON line. --plot draws both parts; it needs the `bench` extra.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rivals import GRADUAL_DAMPING, gradual_admm
from torch import Tensor

from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.data.text import thin
from prox24_deploy.evaluation.losses import loss_against
from prox24_deploy.model.blocks import find_blocks, shared_inputs, target_layers
from prox24_deploy.model.checkpoint import BlockStore, stored_dtype
from prox24_deploy.model.directory import load_model
from prox24_deploy.model.layers import layer_at, to_matrix
from prox24_deploy.pipeline.context import RunContext, read_context
from prox24_deploy.pruning.activations import (
    Activations,
    BlockPair,
    advance,
    collect,
    record_activations,
)
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.solvers.ista import IstaOptions
from prox24_deploy.pruning.solvers.problem import LayerProblem, damping_for, layer_problem
from prox24_deploy.pruning.solvers.prox import COMPILED_FROM, prox_24
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient
from prox24_deploy.pruning.solvers.solver import PRESETS, solve_layer

FASTER = IstaOptions(precondition=True, momentum=0.9)
Solve = Callable[[Tensor, LayerProblem], Tensor]


def _solver(method: str, **options: object) -> Solve:
    return lambda weight, problem: (
        solve_layer(weight, problem, method=method, **options).weight  # type: ignore[arg-type]
    )


def _admm_pruning(_: Tensor, problem: LayerProblem, *, refine: bool) -> Tensor:
    found, mask = gradual_admm(problem)
    if refine:
        found = masked_conjugate_gradient(problem, mask, found)
    return problem.to_weight(found)


LAYER_METHODS: dict[str, Solve] = {
    "magnitude": _solver("magnitude", refinement="none"),
    "magnitude + cg": _solver("magnitude"),
    "wanda": _solver("wanda", refinement="none"),
    "wanda + gradient": _solver("wanda", refinement="gradient"),
    "wanda + cg": _solver("wanda"),
    "sparsegpt": _solver("sparsegpt", refinement="none"),
    "sparsegpt + gradient": _solver("sparsegpt", refinement="gradient"),
    "sparsegpt + cg": _solver("sparsegpt"),
    "admm-pruning": partial(_admm_pruning, refine=False),
    "admm-pruning + cg": partial(_admm_pruning, refine=True),
    "ista (paper)": _solver("ista"),
    "ista, preconditioned, momentum + cg": _solver(
        "ista", ista_options=FASTER, refinement="conjugate-gradient"
    ),
    "prox fast": _solver("prox", options=PRESETS["fast"]),
    "prox default": _solver("prox"),
    "prox best": _solver("prox", options=PRESETS["best"]),
}
MODEL_METHODS: dict[str, PruneOptions] = {
    "magnitude": PruneOptions(method="magnitude", refinement="none"),
    "wanda": PruneOptions(method="wanda", refinement="none"),
    "wanda + cg": PruneOptions(method="wanda", target="symmetric"),
    "sparsegpt": PruneOptions(method="sparsegpt", target="symmetric", refinement="none"),
    "sparsegpt + cg": PruneOptions(method="sparsegpt", target="symmetric"),
    "ista (paper)": PruneOptions(method="ista", target="symmetric"),
    "prox symmetric": PruneOptions(target="symmetric"),
    "prox default": PruneOptions(),
    "prox best, no reconstruction": PruneOptions(preset="best", reconstruct=False),
    "prox default + reconstruction": PruneOptions(reconstruct=True),
    "prox best": PruneOptions(preset="best"),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """`method` over `rival` must not exceed `limit`."""

    method: str
    rival: str
    limit: float


LAYER_BARS = (
    Bar("prox default", "sparsegpt", 0.66),
    Bar("prox default", "sparsegpt + cg", 0.90),
    Bar("prox default", "wanda + cg", 0.80),
    Bar("prox default", "admm-pruning + cg", 0.94),
)
WORST_BARS = (
    Bar("prox default", "sparsegpt", 0.80),
    Bar("prox default", "sparsegpt + cg", 1.0),
    Bar("prox default", "admm-pruning + cg", 1.0),
)
# The damping of their authors; every other method, and every refinement, gets this project's rule.
OWN_DAMPING = {"sparsegpt": 0.01, "admm-pruning": GRADUAL_DAMPING}
DECODER_BARS = (
    Bar("prox default", "sparsegpt", 0.77),
    Bar("prox default", "sparsegpt + cg", 0.92),
    Bar("prox best", "sparsegpt", 0.60),
)
ENCODER_BARS = (
    Bar("prox default", "sparsegpt", 0.62),
    Bar("prox default + reconstruction", "sparsegpt", 0.52),
)
SOLVER_SECONDS = 60.0


@torch.no_grad()
def layer_losses(
    context: RunContext, methods: list[str], device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Held-out loss by method and layer, and solver seconds by method."""
    # Compiled before anything is timed.
    prox_24(torch.zeros(4 * COMPILED_FROM, device=device), 1.0)
    model = load_model(context.source, context.recipe, device)
    blocks = find_blocks(model, context.recipe)
    sets = [
        record_activations(model, blocks, context.recipe, batches)
        for batches in (context.calibration.batches, thin(context.held_out, 32768))
    ]
    losses: dict[str, dict[str, float]] = {name: {} for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for index, block in enumerate(blocks):
        twin = BlockPair(
            index=index, prefix=f"{context.recipe.blocks}.{index}", dense=block, pruned=block
        )
        layers = target_layers(block, context.recipe)
        for group in shared_inputs(block, layers, sets[0].calls[0][index], sets[0].dense[0]):
            _solve_group(twin, group, sets, losses, seconds)
        advance(twin, sets)
        print(f"{twin.prefix} done", file=sys.stderr)
    return losses, seconds


def _solve_group(
    twin: BlockPair,
    group: list[str],
    sets: list[Activations],
    losses: dict[str, dict[str, float]],
    seconds: dict[str, float],
) -> None:
    """Add the losses and times of layers that share one input."""
    layers = [layer_at(twin.dense, name) for name in group]
    weights = [to_matrix(layer, layer.weight) for layer in layers]
    stacked = torch.cat(weights)
    moments, held_out = (collect(twin, group[0], activations) for activations in sets)
    damping = damping_for(stacked.shape[1], moments.tokens)
    clock = time.process_time if stacked.device.type == "cpu" else time.perf_counter
    for name in seconds:
        began = clock()
        own = OWN_DAMPING.get(name, damping)
        problem = layer_problem(stacked, moments.pruned, own, tokens=moments.tokens)
        parts = LAYER_METHODS[name](stacked, problem).split([len(weight) for weight in weights])
        seconds[name] += clock() - began
        for layer, before, after in zip(group, weights, parts, strict=True):
            losses[name][f"{twin.prefix}.{layer}"] = held_out.errors({layer: before}).of(
                layer, after
            )


@torch.no_grad()
def model_losses(
    context: RunContext, methods: list[str], device: torch.device
) -> tuple[str, dict[str, Tensor], dict[str, float]]:
    """Name of the loss, loss per evaluation sample by method, seconds of pruning by method."""
    recipe = context.recipe
    dense = load_model(context.source, recipe, device)
    loss = loss_against(dense, recipe.task, context.held_out.batches)
    losses, seconds = {}, {}
    for name in methods:
        model = deepcopy(dense)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            prune_model(
                model,
                recipe,
                context.calibration.batches,
                (),
                MODEL_METHODS[name],
                stored_dtype=lambda parameter: stored_dtype(context.source, parameter),
                store=BlockStore(Path(folder)),
                progress=lambda *_: None,
            )
        seconds[name] = time.perf_counter() - began
        losses[name] = loss.of(model)
        print(f"{name}: {float(losses[name].mean()):.4f}, {seconds[name]:.0f} s", file=sys.stderr)
    return loss.name, losses, seconds


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def paired_ratio(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same samples, with its standard error by the delta method."""
    ratio = float(first.mean() / second.mean())
    spread = (first - ratio * second).std() / math.sqrt(len(first))
    return ratio, float(spread / second.mean())


def report_layers(
    context: RunContext, methods: list[str], device: torch.device, console: Console
) -> dict[str, object]:
    """Print the table and the bars of the layer-wise part."""
    losses, seconds = layer_losses(context, methods, device)

    def ratios(method: str, rival: str) -> list[float]:
        return [losses[method][layer] / losses[rival][layer] for layer in losses[rival]]

    table = Table("method", "mean loss", "/ sparsegpt", "worst layer", "solver s", box=None)
    rows: dict[str, dict[str, Any]] = {}
    for name in methods:
        against = ratios(name, "sparsegpt")
        rows[name] = {
            "loss": statistics.fmean(losses[name].values()),
            "ratio": geometric_mean(against),
            "worst": max(against),
            "seconds": seconds[name],
            "ratios": against,
        }
        cells = (f"{rows[name]['loss']:.4f}", *(f"{rows[name][k]:.3f}" for k in ("ratio", "worst")))
        table.add_row(name, *cells, f"{seconds[name]:.1f}")
    console.print(table)
    bars = [
        (bar, kind, of(ratios(bar.method, bar.rival)))
        for all_bars, kind, of in (
            (LAYER_BARS, "mean", geometric_mean),
            (WORST_BARS, "worst layer", max),
        )
        for bar in all_bars
        if {bar.method, bar.rival} <= losses.keys()
    ]
    if "prox default" in seconds:
        bar = Bar("prox default", "seconds of solver", SOLVER_SECONDS)
        bars.append((bar, "", seconds["prox default"]))
    return {"methods": rows, "bars": _print_bars(bars, console)}


def report_model(
    context: RunContext, methods: list[str], device: torch.device, console: Console
) -> dict[str, object]:
    """Print the table and the bars of the end-to-end part."""
    kind, losses, seconds = model_losses(context, methods, device)
    decoder = context.recipe.task == "text-generation"
    table = Table("method", "loss", "/ sparsegpt", "seconds", box=None)
    rows = {}
    for name in methods:
        loss = losses[name]
        error = float(loss.std()) / math.sqrt(len(loss))
        ratio = paired_ratio(loss, losses["sparsegpt"])
        rows[name] = {
            "loss": float(loss.mean()), "standard_error": error,
            "ratio": ratio[0], "ratio_standard_error": ratio[1], "seconds": seconds[name],
        }  # fmt: skip
        table.add_row(
            name,
            f"{rows[name]['loss']:.4f} ± {error:.4f}",
            f"{ratio[0]:.3f} ± {ratio[1]:.3f}",
            f"{seconds[name]:.0f}",
        )
    console.print(table)
    bars = [
        (bar, "", paired_ratio(losses[bar.method], losses[bar.rival])[0])
        for bar in (DECODER_BARS if decoder else ENCODER_BARS)
        if {bar.method, bar.rival} <= losses.keys()
    ]
    return {
        "loss": kind,
        "samples": len(losses["sparsegpt"]),
        "methods": rows,
        "bars": _print_bars(bars, console),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios to SparseGPT: one dot per layer, and the whole model with its error."""
    from matplotlib.figure import Figure

    parts = [part for part in ("layers", "end_to_end") if part in result]
    figure = Figure(figsize=(6.5 * len(parts), 5), layout="constrained")
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        methods = result[part]["methods"]
        for height, row in enumerate(methods.values()):
            if part == "layers":
                axes.plot(row["ratios"], [height] * len(row["ratios"]), ".", color="0.65")
                axes.plot(row["ratio"], height, "D", color="C0")
            else:
                error = 1.96 * row["ratio_standard_error"]
                axes.errorbar(
                    row["ratio"], height, xerr=error, fmt="D", capsize=3, color="tab:blue"
                )
        axes.set_yticks(range(len(methods)), labels=list(methods))
        axes.axvline(1, color="0.8", zorder=0)
        axes.set_xscale("log")
        for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatted("{x:g}")
        axes.invert_yaxis()
        titles = {"layers": "loss of each layer, held-out", "end_to_end": "loss of the model, 95 %"}
        axes.set_title(titles[part])
        axes.set_xlabel("ratio to SparseGPT")
    figure.suptitle(str(result["model"]))
    figure.savefig(path)


def _print_bars(found: list[tuple[Bar, str, float]], console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for bar, kind, reached in found:
        verdict = "reached" if reached <= bar.limit else "MISSED"
        console.print(
            f"{bar.method} / {bar.rival} {kind}: {reached:.3f}, limit {bar.limit}: {verdict}",
            highlight=False,
        )
        rows.append(
            {"method": bar.method, "rival": bar.rival, "kind": kind, "limit": bar.limit,
             "reached": reached}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--evaluation", type=Path, action="append", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--evaluation-tokens", type=int, default=32768)
    parser.add_argument("--part", choices=("layers", "model", "both"), default="both")
    parser.add_argument("--methods", nargs="+", choices=MODEL_METHODS, default=[*MODEL_METHODS])
    parser.add_argument(
        "--layer-methods", nargs="+", choices=LAYER_METHODS, default=[*LAYER_METHODS]
    )
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plot", type=Path, help="draw to this file: .svg, .png or .pdf")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = replace(
        TextOptions(),
        calibration=tuple(arguments.calibration),
        evaluation=tuple(arguments.evaluation),
        calibration_tokens=arguments.calibration_tokens,
        evaluation_tokens=arguments.evaluation_tokens,
    )
    options = BuildOptions(recipe=arguments.recipe, text=text)
    context = read_context(arguments.model_dir, None, options)
    device = torch.device(arguments.device)
    console = Console(width=100)
    result: dict[str, Any] = {
        "benchmark": "quality",
        "model": arguments.model_dir.name,
        "calibration_tokens": context.calibration.source.tokens,
        "device": arguments.device,
    }
    if arguments.part != "model":
        methods = [n for n in LAYER_METHODS if n in {*arguments.layer_methods, "sparsegpt"}]
        result["layers"] = report_layers(context, methods, device, console)
    if arguments.part != "layers":
        methods = [n for n in MODEL_METHODS if n in {*arguments.methods, "sparsegpt"}]
        result["end_to_end"] = report_model(context, methods, device, console)
    if arguments.plot:
        draw(result, arguments.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
