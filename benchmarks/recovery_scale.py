"""How recovery grows: seconds a step and memory of a random Llama of any shape.

    python benchmarks/recovery_scale.py --hidden 4096 --inner 11008 --heads 32 --kv-heads 32 \\
        --blocks 32 --device cuda --optimizer adafactor --checkpointing [--processes 1 2]

The model is made on the spot, in bfloat16, and made 2:4 by magnitude; then its kept weights are
trained as `recover` trains them, with each number of processes in turn, on a GPU one on each. The
time of a step is the mean of those between the first and the first check on withheld samples; what
opening, checks, saving and writing take is in the whole of the seconds. Memory is that of the first
process on its GPU, beside what is estimated before work. Withheld losses of different numbers of
processes must agree, for they take the same steps. Prints a JSON line for each number of them.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from safetensors import safe_open
from scale import Made, llama, made_model, random_samples
from tiny_directories import write_byte_tokenizer
from torch import Tensor

from prox24_deploy.config.options import RecoverOptions
from prox24_deploy.core.host import GIB
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.types import RecoverOptimizer
from prox24_deploy.model.checkpoint import write_pruned
from prox24_deploy.model.directory import ModelDir, open_model_dir
from prox24_deploy.recovery.memory import require_memory
from prox24_deploy.recovery.recover import Recovery, recover_directory
from prox24_deploy.sparsity.pattern import mask_24

# Losses of the same steps, summed in another order in bfloat16, may differ by this share.
_ALIKE = 0.02


def main() -> None:
    """Make a model and its 2:4 twin, train that, and print what it took."""
    asked = arguments()
    with TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        made = made_model(asked, folder / "dense")
        write_byte_tokenizer(folder / "dense")
        dense = open_model_dir(folder / "dense")
        write_pruned(dense, by_magnitude(dense, asked.device), folder / "sparse")
        if asked.device == "cuda":
            torch.cuda.empty_cache()
        lines = [measured(asked, folder, made, count) for count in asked.processes]
    first = lines[0]
    for line in lines[1:]:
        line["faster"] = first["step_seconds"] / line["step_seconds"]
        print(f"{line['processes']} processes: {line['faster']:.2f} times as fast")
        if not math.isclose(line["after"], first["after"], rel_tol=_ALIKE):
            sys.exit(f"withheld loss {line['after']}, in one process {first['after']}")


def arguments() -> argparse.Namespace:
    """What to make and how to train it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {
        "hidden": 256, "inner": 768, "heads": 4, "kv-heads": 4, "blocks": 2, "vocabulary": 1024,
        "length": 256, "tokens": 16384, "steps": 12, "step-tokens": 8192,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--optimizer", choices=get_args(RecoverOptimizer), default="adamw")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where there is room for four models")
    return parser.parse_args()


def by_magnitude(directory: ModelDir, device: str) -> dict[str, Tensor]:
    """The weights of all linear layers of the blocks, two of four kept."""
    found = {}
    for shard in directory.shards:
        with safe_open(shard, framework="pt", device=device) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name.endswith("_proj.weight"):
                    weight = handle.get_tensor(name)
                    found[name] = (weight * mask_24(weight.abs(), 1)).cpu()
    return found


def measured(asked: argparse.Namespace, folder: Path, made: Made, count: int) -> dict[str, Any]:
    """Train in so many processes; what it took."""
    options = RecoverOptions(
        steps=asked.steps,
        step_tokens=asked.step_tokens,
        learning_rate=asked.rate,
        optimizer=asked.optimizer,
        checkpointing=asked.checkpointing,
        processes=count,
        write=False,
    )
    times: list[float] = []
    result = trained(asked, folder, options, times)
    line = {
        "shape": {name: getattr(asked, name) for name in ("hidden", "inner", "blocks")},
        "weights": made.outside + made.blocks * made.block,
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "processes": count,
        "optimizer": asked.optimizer,
        "checkpointing": asked.checkpointing,
        "step_tokens": result.step_tokens,
        "steps": result.taken,
        "step_seconds": step_seconds(times, result.curve[1].step),
        "total_seconds": result.seconds,
        "peak_gib": result.peak_gib,
        "estimated_gib": result.needed_gib,
        "before": result.before,
        "after": result.after,
        "warning": result.warning,
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(line), flush=True)
    return line


def step_seconds(times: Sequence[float], checked: int) -> float:
    """Mean time of a step by when each began; the first is left out, and what follows a check."""
    assert checked > 2, "too few steps before the first check; ask for more"
    return (times[checked - 1] - times[1]) / (checked - 2)


def trained(
    asked: argparse.Namespace, folder: Path, options: RecoverOptions, times: list[float]
) -> RecoverResult:
    """Train on random windows; `times` receives when each step began and the last ended."""

    def note(label: str, done: int, total: int) -> None:
        times.append(time.perf_counter())
        since = times[-1] - times[-2] if done else 0.0
        # A run that is ended has told what its steps took.
        peak = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if alone_on_gpu else ""
        print(f"{label} {done}/{total}, {since:.3f} s{peak}", file=sys.stderr, flush=True)

    pruned, device = open_model_dir(folder / "sparse"), torch.device(asked.device)
    alone_on_gpu = device.type == "cuda" and options.processes == 1
    run = Recovery(
        dense=open_model_dir(folder / "dense"),
        pruned=pruned,
        recipe=llama(),
        calibration=random_samples(asked),
        options=options,
        seed=0,
        device=device,
        needed=require_memory(pruned, llama(), options, device).total,
    )
    with TemporaryDirectory(dir=folder) as own:
        return recover_directory(run, kept=Path(own) / "kept", out=Path(own) / "out", progress=note)


if __name__ == "__main__":
    main()
