"""Speed of a Llama in 16 and in 8 bits, dense and 2:4, against what `plan` expects of it.

    python benchmarks/quantized_speed.py [--layout llama-8b] [--blocks 4] [--dtype float16]
        [--shape 2x2048] [--models none,fp8+,fp8,int8+] [--algorithms 1,2,5,6,22,25,26]

The model has random weights, pruned by magnitude, and is rounded to 8 bits by its largest weights
and activations. Every model is compiled and runs as a CUDA graph; all are timed in turns. A name
with a plus is the 2:4 model, in which every layer is multiplied in the way that pays most.
`--shape 16x1+1024` is a step of decoding behind 1024 tokens. `--algorithms` bounds what is tried in
16 bits. Prints a table and one JSON line; fails if the profiler sees sparse kernels in other layers
than the chosen ones, or if a gain misses its bar or its plan.
"""

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from engine_speed import llama, opened, pair, random_llama, random_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Quantize
from prox24_deploy.engines.cusparselt.choice import choose
from prox24_deploy.engines.cusparselt.cuda_graph import GraphSession
from prox24_deploy.engines.cusparselt.gemm import copy_rate, gpu_profile, measure_layers, uses_at
from prox24_deploy.engines.cusparselt.kernels import kernels_by_layer, sparse_kernels
from prox24_deploy.engines.cusparselt.linear import replace_layers
from prox24_deploy.engines.cusparselt.planning import LayerPlan, plan_layers, plan_shapes
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmTiming, half_format
from prox24_deploy.engines.cusparselt.quantized import replace_quantized
from prox24_deploy.engines.cusparselt.torch_model import TorchModel
from prox24_deploy.engines.cusparselt.ways import EIGHT_BITS, Way, cheapest
from prox24_deploy.graph.export.module import TORCH_DTYPES
from prox24_deploy.model.layers import layer_at
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.tensors import QuantizedLayer

ROUNDS = 40
PREDICTION = 0.07
# Least gains over the dense model in 16 bits, and over that in the same 8 bits.
BARS: dict[tuple[str, str, str], float] = {
    ("llama-8b", "2x2048", "fp8+"): 1.8,
    ("llama-8b", "16x1+1024", "none+"): 1.2,
    ("llama-8b", "16x1+1024", "fp8+"): 1.45,
    ("llama-70b", "2x2048", "fp8+"): 1.9,
}
OVER_EIGHT_BITS = {("llama-8b", "2x2048", "fp8+"): 1.15}


def llama_70b(blocks: int, dtype: torch.dtype) -> nn.Module:
    """The layers of a 70 B Llama 3, a few of its blocks and a small vocabulary."""
    return random_llama(blocks, dtype, hidden=8192, inner=28672, heads=64, vocabulary=1024)


def xlm_r_large(blocks: int, dtype: torch.dtype) -> nn.Module:
    """The layers of XLM-R-large, a few of its blocks and a small vocabulary."""
    config = XLMRobertaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=blocks,
        num_attention_heads=16, max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    return random_model(lambda: XLMRobertaModel(config, add_pooling_layer=False), dtype)


# By layout how to make it, and the recipe of its family.
LAYOUTS = {
    "llama-8b": (llama, "llama"),
    "llama-70b": (llama_70b, "llama"),
    "xlm-r-large": (xlm_r_large, "roberta"),
}


def input_limits(model: TorchModel, names: Sequence[str], shape: Shape) -> dict[str, float]:
    """Largest magnitude of the inputs of each layer in one run."""
    found: dict[str, float] = {}

    def note(name: str, hidden: Tensor) -> None:
        found[name] = float(hidden.abs().max())

    hooks = [
        model.wrapped.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: note(name, given[0])
        )
        for name in names
    ]
    model.run(model.feeds(shape))
    for hook in hooks:
        hook.remove()
    return found


def rounded(weight: Tensor, limit: float, quantize: Quantize) -> QuantizedLayer:
    """To the nearest number; the largest weight of a row and the largest input are the greatest."""
    form = FORMATS[quantize]  # type: ignore[index]
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / form.largest
    return QuantizedLayer(
        weight=form.weight_numbers(weight, scale),
        weight_scale=scale,
        input_scale=limit / form.largest,
    )


def apply(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    ways: Mapping[str, Way],
    limits: Mapping[str, float],
    quantize: Quantize,
) -> set[str]:
    """Let every layer be multiplied in its way, in place; the paths of those that run sparse."""
    sparse: dict[str, dict[int, int]] = {}
    for layer in layers:
        name = layer.choice.name
        if ways[name].sparse:
            sparse[name] = layer.algorithms(ways[name])
    eight = [name for name, way in ways.items() if way.format in EIGHT_BITS]
    replace_layers(model, {name: a for name, a in sparse.items() if name not in eight})
    stored = {name: rounded(layer_at(model, name).weight, limits[name], quantize) for name in eight}
    replace_quantized(model, stored, {name: a for name, a in sparse.items() if name in eight})
    return set(sparse)


def ready(model: TorchModel, shape: Shape, name: str) -> GraphSession:
    """Compiled and captured."""
    session = model.session(name, model.compiled([shape]))
    session.latencies_ms(model.feeds(shape), runs=1, warmup=2)
    return session


def judged(
    times: Mapping[str, float], planned: Mapping[str, float], layout: str, shape: str
) -> tuple[Table, list[str]]:
    """A row for each model, and what misses its bar."""
    table = Table("model", "ms", "over dense", "planned", "off", "over dense 8 bit", box=None)
    missed = []
    for name, ms in times.items():
        gain, own = times["none"] / ms, (layout, shape, name)
        off = planned[name] / gain - 1
        dense = times.get(name.rstrip("+"), 0.0) if name.endswith("+") else 0.0
        over = f"{dense / ms:.3f}" if dense else "-"
        table.add_row(name, f"{ms:.3f}", f"{gain:.3f}", f"{planned[name]:.3f}", f"{off:+.1%}", over)
        if abs(off) > PREDICTION:
            missed.append(f"{name}: plan off by {off:+.1%}, bar {PREDICTION:.0%}")
        if gain < (bar := BARS.get(own, 0.0)):
            missed.append(f"{name}: gain {gain:.3f}, bar {bar}")
        if dense and dense / ms < (bar := OVER_EIGHT_BITS.get(own, 0.0)):
            missed.append(f"{name}: gain over dense {over}, bar {bar}")
    return table, missed


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="llama-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--shape", default="2x2048")
    parser.add_argument("--models", default="none,fp8+,fp8,int8+")
    parser.add_argument("--algorithms", default="1,2,5,6,22,25,26,27,29", help="tried in 16 bits")
    arguments = parser.parse_args()
    now, _, past = arguments.shape.partition("+")
    batch, sequence = map(int, now.split("x"))
    shape = Shape(batch=batch, sequence=sequence, past=int(past or 0))
    half = half_format(arguments.dtype)
    recipes = {name: parse_recipe(text, name) for name, text in shipped_recipes().items()}
    make, family = LAYOUTS[arguments.layout]
    recipe = recipes[family]
    model = make(arguments.blocks, TORCH_DTYPES[arguments.dtype])
    dense, pruned, names = pair(model, recipe, arguments.dtype)
    tried = {int(number) for number in arguments.algorithms.split(",")}
    profile, uses = gpu_profile(), uses_at(dense, [shape])
    formats = [q for q in EIGHT_BITS if q in arguments.models.replace("+", "").split(",")]
    for format in (half, *formats):
        only = tried if format == half else None
        profile = measure_layers(profile, uses, names, format, lambda *_: None, only)
    if formats:
        profile = replace(profile, copy_rate=copy_rate())
    limits = input_limits(dense, sorted(names), shape)
    choices = [c for c in choose(uses, profile, names, half) if c.name in names]
    eight: dict[str, dict[GemmFormat, tuple[GemmTiming, ...]]] = {
        use.name: {
            f: tuple(profile.with_rounding(profile.timing(g, f)) for g in use.gemms)
            for f in formats
        }
        for use in uses
        if use.name in names
    }
    layers = plan_layers(choices, {}, {}, eight)
    for timing in profile.gemms:
        size = f"{timing.shape.n:6} {timing.shape.k:6} {timing.shape.m:6}"
        times_of = f"dense {timing.dense_us:8.1f} 2:4 {timing.sparse_us:8.1f} us"
        print(f"{timing.format:9} {size} {times_of}, algorithm {timing.algorithm}")

    sessions: dict[str, GraphSession] = {}
    wrong: list[str] = []
    for model_name in arguments.models.split(","):
        quantize: Quantize = next((q for q in EIGHT_BITS if q == model_name.rstrip("+")), "none")
        ways = {
            layer.choice.name: cheapest(
                layer.timings, half, quantize, sparse=model_name.endswith("+")
            )
            for layer in layers
        }
        source = pruned if model_name.endswith("+") else dense
        twin = opened(deepcopy(source.wrapped), recipe, arguments.dtype)
        sparse = apply(twin.wrapped, layers, ways, limits, quantize)
        print(f"{model_name}: {len(sparse)} layers sparse, {sorted(set(map(str, ways.values())))}")
        sessions[model_name] = ready(twin, shape, model_name)
        if sparse:
            seen = kernels_by_layer(partial(twin.run, twin.feeds(shape)))
            running = {name for name, kernels in seen.items() if sparse_kernels(kernels)}
            if running != sparse:
                wrong.append(f"{model_name}: chosen {sorted(sparse)}, running {sorted(running)}")
        gc.collect()

    feeds = [dense.feeds(shape, seed) for seed in (0, 1)]
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(ROUNDS):
        for name, session in sessions.items():
            samples[name] += session.latencies_ms(feeds[number % 2], runs=1, warmup=1).tolist()
    times = {name: median(values) for name, values in samples.items()}
    (plan,) = plan_shapes([shape], layers, [times["none"]])
    expected = {m.quantize + "+" * m.sparse: m.speedup for m in plan.models}
    table, missed = judged(times, expected, arguments.layout, arguments.shape)
    wrong += missed
    Console(width=100).print(table)
    result = {"gpu": profile.gpu, "layout": arguments.layout, "blocks": arguments.blocks,
              "shape": arguments.shape, "ms": times, "planned": expected}  # fmt: skip
    print(json.dumps({"benchmark": "quantized_speed", **result, "wrong": wrong}))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
