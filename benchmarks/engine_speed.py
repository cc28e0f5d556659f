"""End-to-end speed of 2:4 on this GPU through cuSPARSELt, against what the single GEMMs promise.

    python benchmarks/engine_speed.py [--blocks 4] [--dtype float16] [--decode] [--profile FILE]
        [--save-profile FILE]

A Llama-style model with 4096-wide layers and random weights is made on the spot, pruned by
magnitude, compressed where that pays, and timed against its dense twin at 512, 4096 and 16384 rows
(batch × sequence), both under torch.compile and CUDA graphs; the dense twin is held against
`plain_compile.py`. BERT-base at small shapes follows: there 2:4 does not pay, `plan` must say so,
and a model compressed all the same must confirm it. Prints tables and one JSON line; fails if the
profiler sees sparse kernels in other layers than the chosen ones, if less than 80 % of the gain
that the GEMMs allow by Amdahl's law is reached, if the plan is off by more than 7 %, if a gain
misses its bar, or if plain torch.compile is faster than the dense twin by more than 3 %.

With --decode the Llama alone is timed, in prefill and in steps of 16 sequences behind 1024 tokens,
layers being chosen for both.
"""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from prox24_deploy.config.recipe import Recipe, parse_recipe, shipped_recipes
from prox24_deploy.core.records import EngineEvidence, Interval
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType
from prox24_deploy.engines.cusparselt.backend import collect_evidence
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.gemm import choose_measured, gpu_profile
from prox24_deploy.engines.cusparselt.linear import two_four_layers
from prox24_deploy.engines.cusparselt.merge import members
from prox24_deploy.engines.cusparselt.planning import ShapePlan, plan_layers, plan_shapes
from prox24_deploy.engines.cusparselt.prepare import Prepared, prepare
from prox24_deploy.engines.cusparselt.profile import GpuProfile, read_profile, write_profile
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, as_engine, median_ms
from prox24_deploy.graph.export.module import TORCH_DTYPES
from prox24_deploy.latency.measure import MeasureOptions, measure_pair, speedup_interval, timing
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.sparsity.pattern import mask_24

Shapes = Sequence[Shape]

LLAMA_SHAPES = (
    Shape(batch=1, sequence=512), Shape(batch=2, sequence=2048), Shape(batch=8, sequence=2048),
)  # fmt: skip
DECODE_SHAPES = (Shape(batch=2, sequence=2048), Shape(batch=16, sequence=1, past=1024))
BERT_SHAPES = (Shape(batch=1, sequence=128), Shape(batch=8, sequence=128))
AMDAHL, PREDICTION, PLAIN = 0.80, 0.07, 0.03
# Least gains over the compiled dense model.
BARS = {
    Shape(batch=2, sequence=2048): 1.20,
    Shape(batch=8, sequence=2048): 1.25,
    Shape(batch=16, sequence=1, past=1024): 1.20,
}
MEASURING = MeasureOptions(min_rounds=30, max_rounds=200, seconds=3.0, input_sets=2)


@dataclass(frozen=True, slots=True)
class Row:
    """One shape of one model: measured medians and speed-up beside the planned ones."""

    shape: Shape
    dense_ms: float
    sparse_ms: float
    speedup: Interval
    planned: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of the sparse twin."""
        return 1e3 * self.shape.batch * self.shape.sequence / self.sparse_ms

    @property
    def share(self) -> float | None:
        """Of the time that the GEMMs promised to save, the part that was saved; None if none."""
        promised = 1 - 1 / self.planned
        return (1 - 1 / self.speedup.value) / promised if promised > 0 else None


def llama(blocks: int, dtype: torch.dtype) -> nn.Module:
    """The layers of an 8 B Llama 3, a few of its blocks and a small vocabulary."""
    return random_llama(blocks, dtype, hidden=4096, inner=14336, heads=32, vocabulary=32000)


def random_llama(
    blocks: int, dtype: torch.dtype, *, hidden: int, inner: int, heads: int, vocabulary: int
) -> nn.Module:
    """A Llama 3 of a given width, with eight heads of keys."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=8,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(lambda: LlamaForCausalLM(config), dtype)


def bert(dtype: torch.dtype) -> nn.Module:
    return random_model(lambda: BertModel(BertConfig()), dtype)


def random_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model with random weights on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = make()
    return model.eval().requires_grad_(requires_grad=False).to(dtype)


def opened(model: nn.Module, recipe: Recipe, dtype: DType) -> TorchModel:
    config: Any = model.config
    return TorchModel(as_engine(model, recipe), dtype, config.vocab_size)


def prune(model: nn.Module, recipe: Recipe) -> set[str]:
    """Keep the two largest weights of each cell of four, in place; returns the layers' paths."""
    names = set()
    for index, block in enumerate(find_blocks(model, recipe)):
        for name, layer in target_layers(block, recipe).items():
            layer.weight.mul_(mask_24(layer.weight.abs(), 1))
            names.add(f"{recipe.blocks}.{index}.{name}")
    return names


def pair(model: nn.Module, recipe: Recipe, dtype: DType) -> tuple[TorchModel, TorchModel, set[str]]:
    """Dense and sparse twin with layers merged, and the layers and products that are 2:4."""
    dense, sparse = opened(deepcopy(model), recipe, dtype), opened(model, recipe, dtype)
    prune(sparse.wrapped, recipe)
    dense, sparse = (
        twin.merge(twin.groups(Shape(batch=1, sequence=2))) for twin in (dense, sparse)
    )
    return dense, sparse, two_four_layers(sparse.wrapped)


def planned(
    dense: TorchModel, names: set[str], shapes: Shapes, profile: GpuProfile
) -> tuple[tuple[LayerChoice, ...], tuple[ShapePlan, ...], GpuProfile]:
    """What `plan` says of the model on this GPU."""
    found, profile = choose_measured(dense, shapes, names, profile, lambda *_: None)
    choices = tuple(choice for choice in found if choice.name in names)
    ready = prepare(dense, shapes, (), eager=False)
    session = dense.session("the dense model", ready.compiled)
    times = [median_ms(session, [dense.feeds(shape, s) for s in (0, 1)], 2.0) for shape in shapes]
    session.close()
    return choices, plan_shapes(shapes, plan_layers(choices, {}, {}), times), profile


def measured(
    dense: Prepared, sparse: Prepared, shapes: Shapes, plans: Sequence[ShapePlan]
) -> list[Row]:
    """Time both twins in turns at every shape."""
    sessions = [twin.opened.session("a twin", twin.compiled) for twin in (dense, sparse)]
    rows = []
    for shape, plan in zip(shapes, plans, strict=True):
        feeds = [dense.opened.feeds(shape, seed) for seed in range(MEASURING.input_sets)]
        pair = measure_pair(sessions[0], sessions[1], feeds, options=MEASURING)
        dense_ms, sparse_ms = (timing(part).median_ms for part in (pair.dense, pair.sparse))
        rows.append(Row(shape, dense_ms, sparse_ms, speedup_interval(pair), plan.speedup))
    for session in sessions:
        session.close()
    return rows


def plain_ms(blocks: int, dtype: DType, shapes: Shapes) -> dict[str, float]:
    """Latencies of the dense model by `plain_compile.py`, in a process that knows nothing of us."""
    script = str(Path(__file__).with_name("plain_compile.py"))
    asked = ",".join(f"{shape.batch}x{shape.sequence}" for shape in shapes if not shape.past)
    command = [sys.executable, script, "--blocks", str(blocks), "--dtype", dtype, "--shapes", asked]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])["ms"]
    return found


def show(console: Console, title: str, rows: Sequence[Row], evidence: EngineEvidence) -> None:
    table = Table("shape", "dense ms", "sparse ms", "speed-up", "95 %", "planned",
                  "of Amdahl", "tokens/s", box=None, title=title)  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.shape), f"{row.dense_ms:.3f}", f"{row.sparse_ms:.3f}",
            f"{row.speedup.value:.3f}", f"{row.speedup.low:.3f}-{row.speedup.high:.3f}",
            f"{row.planned:.3f}", "-" if row.share is None else f"{row.share:.2f}",
            f"{row.tokens_per_second:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(evidence.summary)


def show_gemms(console: Console, profile: GpuProfile) -> None:
    table = Table("N", "K", "M", "dense us", "sparse us", "speed-up", "algorithm", box=None)
    for t in profile.gemms:
        table.add_row(
            str(t.shape.n), str(t.shape.k), str(t.shape.m), f"{t.dense_us:.1f}",
            f"{t.sparse_us:.1f}", f"{t.speedup:.2f}", str(t.algorithm),
        )  # fmt: skip
    console.print(table)


def faults(
    choices: Sequence[LayerChoice], evidence: EngineEvidence, rows: Sequence[Row]
) -> list[str]:
    """What misses its bar."""
    chosen = {name for choice in choices if choice.chosen for name in members(choice.name)}
    running = {layer.module for layer in evidence.layers if layer.chosen}
    found = []
    if chosen != running:
        found.append(f"chosen layers {sorted(chosen)} and sparse kernels in {sorted(running)}")
    for row in rows:
        if row.share is not None and row.share < AMDAHL:
            found.append(f"{row.shape}: {row.share:.3f} of Amdahl, bar {AMDAHL}")
        bar = BARS.get(row.shape, 1.0)
        if row.speedup.value < bar:
            found.append(f"{row.shape}: gain {row.speedup.value:.3f}, bar {bar}")
        off = row.planned / row.speedup.value - 1
        if abs(off) > PREDICTION:
            found.append(f"{row.shape}: plan off by {off:+.1%}, bar {PREDICTION:.0%}")
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--decode", action="store_true", help="time prefill and decoding alone")
    parser.add_argument("--profile", type=Path, help="timings of GEMMs that were saved before")
    parser.add_argument("--save-profile", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(relativeCreated)d ms: %(message)s")
    logging.getLogger("prox24_deploy").setLevel(logging.INFO)
    console = Console(width=110)
    half = TORCH_DTYPES[arguments.dtype]
    recipes = {name: parse_recipe(text, name) for name, text in shipped_recipes().items()}
    known = read_profile(arguments.profile) if arguments.profile else None
    here = gpu_profile()
    profile = known if known is not None and known.fits(here) else here
    result: dict[str, object] = {"benchmark": "engine_speed", "gpu": profile.gpu}
    missed: list[str] = []

    recipe = recipes["llama"]
    model = llama(arguments.blocks, half)
    shapes = DECODE_SHAPES if arguments.decode else LLAMA_SHAPES
    dense, sparse, names = pair(model, recipe, arguments.dtype)
    choices, plans, profile = planned(dense, names, shapes, profile)
    show_gemms(console, profile)
    twins = [
        prepare(model, shapes, chosen, eager=False)
        for model, chosen in ((dense, ()), (sparse, choices))
    ]
    evidence = collect_evidence(twins[1], choices)
    rows = measured(twins[0], twins[1], shapes, plans)
    show(console, f"Llama, 4096 wide, {arguments.blocks} blocks", rows, evidence)
    missed += faults(choices, evidence, rows)
    missed += [f"not compiled: {twin.compilation.reason}" for twin in twins if not twin.compiled]
    result["llama"] = [asdict(row) | {"share": row.share} for row in rows]
    result["compilation"] = [asdict(twin.compilation) for twin in twins]
    result["kernels"] = sorted({layer.reason.rpartition("kernel ")[2] for layer in evidence.layers
                                if layer.chosen})  # fmt: skip
    for twin in twins:
        twin.close()
    del dense, sparse, model, twins
    torch.cuda.empty_cache()
    result["plain"] = plain = plain_ms(arguments.blocks, arguments.dtype, shapes)
    for row in rows:
        if row.shape.past:
            continue
        faster = row.dense_ms / plain[f"{row.shape.batch}x{row.shape.sequence}"] - 1
        console.print(f"{row.shape}: dense twin {faster:+.1%} of plain torch.compile")
        if faster > PLAIN:
            missed.append(f"{row.shape}: plain torch.compile faster by {faster:.1%}")
    if not arguments.decode:
        profile = narrow(result, missed, recipes["bert"], profile, arguments.dtype, console)

    show_gemms(console, profile)
    if arguments.save_profile:
        write_profile(profile, arguments.save_profile)
    print(json.dumps(result | {"missed": missed}))
    if missed:
        sys.exit("\n".join(missed))


def narrow(
    result: dict[str, object],
    missed: list[str],
    recipe: Recipe,
    profile: GpuProfile,
    dtype: DType,
    console: Console,
) -> GpuProfile:
    """BERT-base, where 2:4 does not pay: what the plan says, and what happens all the same."""
    model = bert(TORCH_DTYPES[dtype])
    dense, sparse, names = pair(model, recipe, dtype)
    choices, _, profile = planned(dense, names, BERT_SHAPES, profile)
    advised = [choice.name for choice in choices if choice.chosen]
    console.print(f"BERT-base: plan prunes {len(advised)} of {len(choices)} layers")
    forced = [replace(choice, chosen=choice.eligible) for choice in choices]
    twins = [
        prepare(model, BERT_SHAPES, chosen, eager=False)
        for model, chosen in ((dense, ()), (sparse, forced))
    ]
    session = dense.session("bert", twins[0].compiled)
    times = [median_ms(session, [dense.feeds(s)], 1.0) for s in BERT_SHAPES]
    plans = plan_shapes(BERT_SHAPES, plan_layers(forced, {}, {}), times)
    evidence = collect_evidence(twins[1], forced)
    rows = measured(twins[0], twins[1], BERT_SHAPES, plans)
    show(console, "BERT-base, compressed against the advice", rows, evidence)
    if advised or any(row.speedup.high > 1 for row in rows):
        missed.append(f"BERT-base: {len(advised)} layers advised, speed-ups {rows}")
    result["bert"] = [asdict(row) for row in rows]
    return profile


if __name__ == "__main__":
    main()
