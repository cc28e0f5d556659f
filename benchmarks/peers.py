"""Other tools that prune to 2:4 beside this one: same windows, same evaluation, own environments.

    python benchmarks/peers.py MODEL_DIR --calibration F --evaluation F --work DIR [--only TOOL ...]

Makes an environment for each tool under DIR, with the versions below, from the package index (some
400 MB of downloads besides torch). Prunes all linear layers of the blocks of a decoder on the same
windows, holds every weight that came back against 2:4, and measures the rise of log-perplexity over
the dense model on the same evaluation windows, with standard errors of the paired difference.
A tool that cannot be installed or fails is a row that says so.

Prints a table and one JSON line, and fails where a tool of ours is not 2:4.
"""

import argparse
import json
import math
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peer_runs import TOOLS
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from prox24_deploy.config.options import BuildOptions, TextOptions
from prox24_deploy.evaluation.language import next_logits, window_nll
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.directory import load_model
from prox24_deploy.pipeline.context import RunContext, read_context
from prox24_deploy.sparsity.pattern import is_24

# What is installed for each tool. ModelOpt 0.47 imports requests and does not ask for it.
REQUIREMENTS = {
    "ModelOpt": ("torch==2.13.0", "nvidia-modelopt==0.47.0", "transformers==5.23.0", "requests"),
    "llm-compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1", "transformers==5.17.0"),
}
LAST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Row:
    """What a tool reached; `fault` says why there is nothing else."""

    tool: str
    command: str
    gap: float = math.nan
    error: float = math.nan
    perplexity: float = math.nan
    seconds: float = math.nan
    cpu_seconds: float = math.nan
    peak_gib: float = math.nan
    layers: int = 0
    sparse: int = 0
    fault: str = ""


def environment(tool: str, work: Path) -> Path:
    """The interpreter for a tool: this one for ours, else that of an environment made for it."""
    name = tool.split()[0]
    if name not in REQUIREMENTS:
        return Path(sys.executable)
    folder = work / name
    done = folder / ".installed"
    python = folder / "bin" / "python"
    wanted = "\n".join(REQUIREMENTS[name])
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]])
        done.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(" ".join(ran.stderr.split())[-LAST_WORDS:])
    return ran.stdout


def windows_of(batches: tuple[Batch, ...], count: int) -> Tensor:
    """Token ids (windows, length) of full windows; a shorter one at the end is left out."""
    rows = [row for batch in batches for row in batch.inputs["input_ids"]]
    longest = max(len(row) for row in rows)
    return torch.stack([row for row in rows if len(row) == longest][:count])


def losses(model: nn.Module, batches: tuple[Batch, ...]) -> Tensor:
    """Mean negative log-likelihood of each evaluation window, in nats."""
    with torch.inference_mode():
        return torch.cat([window_nll(next_logits(model, batch), batch) for batch in batches])


def measure(tool: str, context: RunContext, arguments: argparse.Namespace, dense: Tensor) -> Row:
    windows, out = arguments.work / "windows.npy", arguments.work / "pruned.safetensors"
    script = Path(__file__).with_name("peer_runs.py")
    command = [str(script), tool, str(arguments.model_dir), str(windows), str(out)]
    shown = f"peer_runs.py {tool!r} MODEL_DIR windows.npy pruned.safetensors"
    try:
        answer = _run([str(environment(tool, arguments.work)), *command]).splitlines()[-1]
        found = json.loads(answer)
    except (RuntimeError, subprocess.CalledProcessError, json.JSONDecodeError, IndexError) as error:
        return Row(tool, shown, fault=f"did not run: {error}")
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    weights = load_file(out)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        return Row(tool, shown, fault=f"gave weights that the model has not: {unknown[0]}")
    inside = {n: w for n, w in weights.items() if ".layers." in n and w.ndim == 2}
    change = losses(model, context.held_out.batches) - dense
    return Row(
        tool, shown,
        gap=float(change.mean()),
        error=float(change.std() / math.sqrt(len(change))),
        perplexity=math.exp(float((dense + change).mean())),
        layers=len(inside),
        sparse=sum(map(is_24, inside.values())),
        **found,
    )  # fmt: skip


def show(rows: list[Row]) -> None:
    table = Table(
        "tool", "rise of log-perplexity", "perplexity", "s", "CPU s", "GiB", "2:4 layers", "note"
    )
    for row in rows:
        if row.fault:
            table.add_row(row.tool, *["not run"] * 6, row.fault)
            continue
        table.add_row(
            row.tool, f"{row.gap:.3f} ± {row.error:.3f}", f"{row.perplexity:.2f}",
            f"{row.seconds:.0f}",
            f"{row.cpu_seconds:.0f}", f"{row.peak_gib:.2f}", f"{row.sparse} of {row.layers}", "",
        )  # fmt: skip
    Console(width=140).print(table)
    print(json.dumps([asdict(row) for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--evaluation", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the environments")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--evaluation-windows", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=[*TOOLS])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    context = read_context(arguments.model_dir, None, _options(arguments))
    np.save(
        arguments.work / "windows.npy",
        windows_of(context.calibration.batches, arguments.windows).numpy(),
    )
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    dense = losses(model, context.held_out.batches)
    print(f"dense perplexity {math.exp(float(dense.mean())):.2f}, {len(dense)} windows", flush=True)
    rows = []
    for tool in arguments.only:
        rows.append(measure(tool, context, arguments, dense))
        print(rows[-1], file=sys.stderr, flush=True)
    show(rows)
    wrong = [row.tool for row in rows if row.tool.startswith("prox24") and row.sparse != row.layers]
    if wrong:
        raise SystemExit(f"not 2:4: {', '.join(wrong)}")


def _options(arguments: argparse.Namespace) -> BuildOptions:
    length = 512
    return BuildOptions(
        text=TextOptions(
            calibration=tuple(arguments.calibration),
            evaluation=tuple(arguments.evaluation),
            calibration_tokens=arguments.windows * length,
            evaluation_tokens=arguments.evaluation_windows * length,
        )
    )


if __name__ == "__main__":
    main()
