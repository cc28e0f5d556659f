"""How pruning grows: time, memory and traffic of a random Llama of any shape, one JSON line a run.

    python benchmarks/scale.py --hidden 512 --inner 1536 --blocks 2 --tokens 16384
    python benchmarks/scale.py --hidden 8192 --inner 28672 --heads 64 --kv-heads 8 --blocks 3 \
        --whole 80 --tokens 262144 --device cuda --parts

The model is made on the spot, in bfloat16 and in shards of a block, and pruned as `prune` does it.
Started by `torchrun --nproc-per-node N`, N processes share the work, one on each GPU, as they do in
`build --gpus N`; what is printed is then of the first of them. With `--count`, speed is that of all
matrix products, as PyTorch counts them, over the whole of the time, beside the largest that a
product in the precision of the solver's steps reaches here. With `--parts`, the parts of the work
are timed, for which the GPU is waited for. Both take time themselves. A run of few blocks tells of
a model of more: each block takes as long as the last but one of these, the last of them as the last
of these, which passes nothing on and with `--reconstruct` looks at no next one; so a run of one
block tells too little, and one of two counts what the first alone does. Opening and writing grow
with the weights, and taking the samples to the first block, which is a part of opening, does not;
that a larger model may have to be kept elsewhere (`--memory-limit`) is not in it. Bytes are those
that the process asked for, caches included.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from prox24_deploy.config.options import BuildOptions, PruneOptions
from prox24_deploy.config.recipe import Recipe, parse_recipe, shipped_recipes
from prox24_deploy.core.records import PruneResult, TextSource
from prox24_deploy.core.types import Progress
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.directory import open_model_dir
from prox24_deploy.pipeline.ranks import shared
from prox24_deploy.pruning import activations, block, layer_group
from prox24_deploy.pruning.directory import help_to_prune, prune_directory
from prox24_deploy.pruning.ranks import ALONE, Ranks
from prox24_deploy.pruning.solvers import solver
from prox24_deploy.pruning.solvers.products import tensor_cores

_PEAK_SIZE, _PEAK_RUNS = {"cpu": 2048, "cuda": 8192}, 5
# Where the functions are looked up that `--parts` times; the solution holds those of the solver.
_RECORD = "record calls"
_PARTS = {
    _RECORD: (activations, "record_activations"),
    "advance": (activations, "advance"),
    "Gram matrices": (block, "collect_wave"),
    "problem": (layer_group, "layer_problem"),
    "ADMM": (solver, "prox_admm"),
    "SparseGPT": (solver, "sparsegpt"),
    "refine": (solver, "_refine"),
    "solution": (layer_group, "solve_layer"),
    "errors": (block, "_errors"),
    "reconstruct": (block, "reconstruct_block"),
}


def main() -> None:
    """Make a model, prune it, and print what that took."""
    asked = arguments()
    with shared(BuildOptions(device=asked.device)) as found:
        ranks = found or ALONE
        with shared_folder(asked, ranks) as folder:
            line = measured(asked, folder, ranks)
            if ranks.writes:
                print(json.dumps(line), flush=True)
    if asked.plot and ranks.writes:
        draw(line, asked.plot)


@contextmanager
def shared_folder(asked: argparse.Namespace, ranks: Ranks) -> Iterator[Path]:
    """A folder of all processes, which the first makes and removes."""
    if not ranks.writes:
        yield Path(ranks.told(""))
        ranks.told("")
        return
    with TemporaryDirectory(dir=asked.folder) as folder:
        ranks.told(folder)
        yield Path(folder)
        # The others are done with it.
        ranks.told("")


def arguments() -> argparse.Namespace:
    """What to make and how to prune it."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {
        "hidden": 512, "inner": 1536, "heads": 8, "kv-heads": 8, "blocks": 2, "vocabulary": 32000,
        "length": 2048, "tokens": 16384,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--whole", type=int, help="blocks of the model that this is a part of")
    parser.add_argument("--preset", default="default")
    for switch in ("reconstruct", "count", "parts"):
        parser.add_argument(f"--{switch}", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-limit", type=float, help="GiB")
    parser.add_argument("--folder", type=Path, help="where there is room for the model, twice")
    parser.add_argument("--plot", type=Path, help="an SVG of seconds by stage")
    return parser.parse_args()


def measured(asked: argparse.Namespace, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Prune a model of the shape; what it took in this process."""
    made = ranks.told(made_model(asked, folder / "model") if ranks.writes else None)
    assert made is not None
    device = torch.device(asked.device)
    peak = matrix_peak(device)
    parts = timed_parts(device, _PARTS if asked.parts else {_RECORD: _PARTS[_RECORD]})
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = Steps()
    before = traffic()
    counter = FlopCounterMode(display=False) if asked.count else None
    with counter or nullcontext():
        result = pruned(asked, folder, ranks, steps.note)
    if result is None:
        return {}
    seconds = steps.seconds()
    total = sum(seconds.values())
    flops = counter.get_total_flops() if counter else None
    after = traffic()
    return {
        "shape": {name: getattr(asked, name) for name in ("hidden", "inner", "blocks", "tokens")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "weights": made.outside + made.blocks * made.block,
        "seconds": seconds,
        "parts": parts,
        "solving": solving(result, made.blocks - 1),
        "total_seconds": total,
        "whole_seconds": whole(seconds, parts[_RECORD], made, asked.whole),
        "processes": ranks.count,
        "estimate": result.memory,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_gpu_gib": (
            torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        ),
        "peak_tflops": peak / 1e12,
        "tflops": flops and flops / total / 1e12,
        "share_of_peak": flops and flops / total / peak,
        "read_gib": (after["rchar"] - before["rchar"]) / 2**30,
        "written_gib": (after["wchar"] - before["wchar"]) / 2**30,
        "versions": {"torch": torch.__version__},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Numbers of weights of a random model: outside of its blocks and in each of them."""

    outside: int
    block: int
    blocks: int


def made_model(asked: argparse.Namespace, out: Path) -> Made:
    """Write a random model."""
    config = LlamaConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.hidden,
        intermediate_size=asked.inner,
        num_hidden_layers=asked.blocks,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.kv_heads,
        max_position_embeddings=asked.length,
    )
    torch.manual_seed(0)
    with torch.device(asked.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained(out, max_shard_size=max(2 * block, 2**20))
    outside = sum(p.numel() for p in model.parameters()) - asked.blocks * block
    return Made(outside=outside, block=block, blocks=asked.blocks)


def random_samples(asked: argparse.Namespace) -> Samples:
    """Windows of random tokens, one in a batch."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(asked.vocabulary, (asked.tokens // asked.length, asked.length),
                         generator=generator)  # fmt: skip
    batches = tuple(
        Batch({"input_ids": row[None], "attention_mask": torch.ones_like(row[None])},
              torch.ones(1, asked.length, dtype=torch.bool))
        for row in rows
    )  # fmt: skip
    source = TextSource(
        kind="file", sha256="0" * 64, tokens=asked.tokens, samples=len(rows), paths=()
    )
    return Samples(batches=batches, source=source)


def pruned(
    asked: argparse.Namespace, folder: Path, ranks: Ranks, progress: Progress
) -> PruneResult | None:
    """Prune it on random windows; None in a process that helps."""
    samples = random_samples(asked)
    limit = None if asked.memory_limit is None else int(asked.memory_limit * 2**30)
    given = (
        open_model_dir(folder / "model"),
        llama(),
        samples,
        replace(samples, batches=samples.batches[:1]),
        PruneOptions(preset=asked.preset, reconstruct=asked.reconstruct, permute="none"),
    )
    where: dict[str, Any] = {
        "device": torch.device(asked.device),
        "memory_limit": limit,
        "ranks": ranks,
    }
    if not ranks.writes:
        help_to_prune(*given, **where)
        return None
    return prune_directory(
        *given, **where, solved=folder / "solved", out=folder / "pruned", progress=progress
    )


def llama() -> Recipe:
    """The recipe of the family."""
    return parse_recipe(shipped_recipes()["llama"], "llama").for_architecture("LlamaForCausalLM")


class Steps:
    """When each block began and the last ended."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def note(self, label: str, done: int, total: int) -> None:
        """Take the time of one call of progress."""
        self._times.append(time.perf_counter())
        print(f"{time.strftime('%H:%M:%S')} {label} {done}/{total}", file=sys.stderr, flush=True)

    def seconds(self) -> dict[str, float]:
        """By stage: until the first block, each block, and from the last on."""
        times = [*self._times, time.perf_counter()]
        spans = [after - before for before, after in pairwise(times)]
        blocks = {f"block {i}": span for i, span in enumerate(spans[1:-1])}
        return {"open": spans[0], **blocks, "write": spans[-1]}


def solving(result: PruneResult, block: int) -> dict[str, float]:
    """Seconds of solving each layer of one block, by its name and its shape, outputs by inputs.

    Second moments are not in it. Layers with one input are solved together and share it.
    """
    layers = [layer for layer in result.layers if f".{block}." in layer.name]
    return {
        f"{layer.name.rpartition('.')[2]}, {layer.shape[0]} x {layer.shape[1]}": layer.seconds
        for layer in layers
    }


def whole(seconds: dict[str, float], record: float, made: Made, count: int | None) -> float | None:
    """Of a model of so many blocks, by the assumptions at the top."""
    if count is None:
        return None
    if count == made.blocks:
        return sum(seconds.values())
    spans = [span for name, span in seconds.items() if name.startswith("block")]
    *_, one, last = spans[0], *spans
    weights = made.outside + count * made.block
    grown = weights / (made.outside + made.blocks * made.block)
    growing = seconds["open"] - record + seconds["write"]
    return growing * grown + record + one * (count - 1) + last


def matrix_peak(device: torch.device) -> float:
    """FLOP/s of the fastest of some products, in TF32 on a GPU, in float32 on a CPU."""
    size = _PEAK_SIZE[device.type]
    one = torch.randn(size, size, device=device)
    best = 0.0
    with tensor_cores(device):
        for _ in range(_PEAK_RUNS):
            began = time.perf_counter()
            float((one @ one)[0, 0])
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def timed_parts(device: torch.device, parts: Mapping[str, tuple[Any, str]]) -> dict[str, float]:
    """Time functions from now on; seconds by part, which grow."""
    seconds = dict.fromkeys(parts, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = function(*arguments, **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[part] += time.perf_counter() - began
            return found

        return run

    for part, (module, name) in parts.items():
        setattr(module, name, timed(part, getattr(module, name)))
    return seconds


def traffic() -> dict[str, int]:
    """Bytes that this process has read and written so far, those of caches too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(":") for line in lines)}


def draw(line: dict[str, Any], out: Path) -> None:
    """Seconds by stage."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.barh(list(line["seconds"]), list(line["seconds"].values()))
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds, {line['device']}")
    figure.savefig(out)


if __name__ == "__main__":
    main()
