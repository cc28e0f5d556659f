"""How much of what pruning costs is recovered in a given time.

Prunes a model, or takes it pruned, trains its kept weights against the dense one as `recover` does,
and compares both with the dense model on the same evaluation samples: the rise of the
log-perplexity (decoders), 1 - cosine of the embeddings (encoders) or the divergence (classifiers).

    python benchmarks/recovery.py MODEL_DIR --calibration F --evaluation F --minutes 5
        [--pruned DIR] [--texts written calibration] [--rates 0.005 0.01 0.02]
        [--optimizers adamw adafactor] [--rival] [--rotate] [--reconstruct]

Prints a row for each optimiser, learning rate and kind of text (what the model writes itself beside
the calibration text, or that alone), with paired errors, the curves, and one JSON line; asserts
that no zero of a weight was lost and that nothing became worse on withheld samples. `--rival`
prunes with SparseGPT as published, too, and prints what each loss is of the loss of that. With
`--rotate` what is pruned and recovered is the model as `rotate` leaves it, and the rival is not;
with `--reconstruct` blocks are tuned as a whole before.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prox24_deploy.config.options import (
    ROTATE_STEPS,
    BuildOptions,
    PruneOptions,
    RecoverOptions,
    TextOptions,
)
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.types import RecoverOptimizer
from prox24_deploy.data.text import thin
from prox24_deploy.evaluation.losses import Loss, loss_against
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.pipeline.context import RunContext, read_context, torch_device
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.recovery.recover import Recovery, recover_directory
from prox24_deploy.rotation.rotate import rotate_directory

KINDS = get_args(RecoverOptimizer)
# Frantar and Alistarh, arXiv 2301.00774: dense weights on the inputs of the pruned model.
SPARSEGPT = PruneOptions(method="sparsegpt", refinement="none", target="symmetric", permute="none")
COLUMNS = ("optimiser", "rate", "steps", "kept", "written", "withheld", "loss", "ratio", "s")


def progress(label: str, done: int, total: int) -> None:
    if done in {0, total}:
        print(f"{time.strftime('%H:%M:%S')} {label} {done}/{total}", file=sys.stderr)


def pruned_model(
    context: RunContext, options: PruneOptions, tokens: int, folder: Path, device: torch.device
) -> ModelDir:
    """The model pruned here on some of the calibration text."""
    calibration = replace(context.calibration, batches=thin(context.calibration, tokens))
    prune_directory(
        context.source,
        context.recipe,
        calibration,
        context.held_out,
        options,
        device=device,
        solved=folder / "solved",
        out=folder / "pruned",
        progress=progress,
    )
    return open_model_dir(folder / "pruned")


def rotated(
    asked: argparse.Namespace, context: RunContext, device: torch.device, out: Path
) -> RunContext:
    """The model as `rotate` writes it, and the same texts; prints what that took."""
    result = rotate_directory(
        context.source,
        context.recipe,
        context.calibration,
        out,
        device=device,
        memory_limit=None,
        steps=ROTATE_STEPS,
        progress=progress,
    )
    print(f"rotated in {result.seconds:.0f} s, {result}")
    return opened(argparse.Namespace(**{**vars(asked), "model": out}))[0]


@torch.no_grad()
def losses_of(directory: ModelDir, context: RunContext, loss: Loss, device: torch.device) -> Tensor:
    """Loss of a model on each evaluation sample, on the CPU."""
    return loss.of(load_model(directory, context.recipe, device)).cpu()


def require_same_zeros(before: ModelDir, after: ModelDir, context: RunContext) -> None:
    """Every zero of the layers that may be 2:4 is where it was."""
    models = (load_model(each, context.recipe, torch.device("cpu")) for each in (before, after))
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    for (name, old), (_, new) in pairs:
        if old.ndim > 1:
            assert torch.equal(new[old == 0], torch.zeros_like(new[old == 0])), name


def shown(values: Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std()) / math.sqrt(len(values)):.4f}"


def ratio_of(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same samples, with its standard error by the delta method."""
    ratio = float(first.mean() / second.mean())
    spread = (first - ratio * second).std() / math.sqrt(len(first))
    return ratio, float(spread / second.mean())


def asking(description: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments that `opened` reads: a model, texts and a device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--evaluation", type=Path, action="append", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--evaluation-tokens", type=int, default=131072)
    parser.add_argument("--device", default="auto")
    return parser


def opened(asked: argparse.Namespace) -> tuple[RunContext, torch.device]:
    """The model and the texts that were asked for, and where to run."""
    text = TextOptions(
        calibration=tuple(asked.calibration),
        evaluation=tuple(asked.evaluation),
        calibration_tokens=asked.calibration_tokens,
        evaluation_tokens=asked.evaluation_tokens,
    )
    return read_context(asked.model, None, BuildOptions(text=text)), torch_device(asked.device)


@torch.no_grad()
def dense_loss(context: RunContext, tokens: int, device: torch.device) -> Loss:
    """The loss against the dense model on so many tokens of the evaluation text."""
    dense = load_model(context.source, context.recipe, device)
    return loss_against(dense, context.recipe.task, thin(context.held_out, tokens))


def parsed() -> argparse.Namespace:
    parser = asking(__doc__)
    parser.add_argument("--pruned", type=Path, help="a pruned model directory; else prune here")
    parser.add_argument("--method", default="prox")
    parser.add_argument("--prune-tokens", type=int, default=65536)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="in the place of minutes")
    parser.add_argument("--step-tokens", type=int)
    parser.add_argument("--rates", type=float, nargs="+", default=[None])
    parser.add_argument("--optimizers", nargs="+", choices=KINDS, default=["adamw"])
    parser.add_argument("--texts", nargs="+", choices=["written", "calibration"],
                        default=["written"])  # fmt: skip
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--reconstruct", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked, console = parsed(), Console(width=140)
    context, device = opened(asked)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = rotated(asked, context, device, folder / "rotated") if asked.rotate else context
        own = PruneOptions(method=asked.method, reconstruct=asked.reconstruct)
        began = time.perf_counter()
        student = (
            open_model_dir(asked.pruned)
            if asked.pruned
            else pruned_model(teacher, own, asked.prune_tokens, folder / "own", device)
        )
        print(f"pruned in {time.perf_counter() - began:.0f} s")
        loss = dense_loss(context, asked.evaluation_tokens, device)
        before = losses_of(student, teacher, loss, device)
        console.print(f"{loss.name} of the pruned model: {shown(before)}, {len(before)} samples")
        rival = None
        if asked.rival:
            made = pruned_model(context, SPARSEGPT, asked.prune_tokens, folder / "rival", device)
            rival = losses_of(made, context, loss, device)
            console.print(f"{loss.name} of SparseGPT: {shown(rival)}")
        rows: list[dict[str, object]] = []
        table = Table(*COLUMNS, box=None)
        for run in runs(asked, teacher, student, device):
            result, made = recovered(run, folder / f"run {len(rows)}")
            require_same_zeros(student, made, teacher)
            after = losses_of(made, teacher, loss, device)
            worse = (result.after or 0.0) > (result.before or 0.0)
            assert result.warning or not worse
            ratios = [ratio_of(after, each) for each in (before, rival) if each is not None]
            table.add_row(*cells(result.learning_rate, result, after, ratios))
            rows.append({"rate": result.learning_rate, "loss": float(after.mean()),
                         "ratios": ratios, **asdict(result)})  # fmt: skip
        console.print(table)
    print(json.dumps({"loss": loss.name, "before": float(before.mean()), "rows": rows}))


def runs(
    asked: argparse.Namespace, context: RunContext, student: ModelDir, device: torch.device
) -> Iterator[Recovery]:
    """The recoveries that were asked for."""
    for kind, rate, text in product(asked.optimizers, asked.rates, asked.texts):
        options = RecoverOptions(
            minutes=None if asked.steps else asked.minutes,
            steps=asked.steps,
            step_tokens=asked.step_tokens,
            write=text == "written",
            learning_rate=rate,
            optimizer=kind,
        )
        yield Recovery(
            dense=context.source,
            pruned=student,
            recipe=context.recipe,
            calibration=context.calibration,
            options=options,
            seed=0,
            device=device,
        )


def recovered(run: Recovery, folder: Path) -> tuple[RecoverResult, ModelDir]:
    """What a recovery came to, and its model."""
    result = recover_directory(run, kept=folder / "kept", out=folder / "out", progress=progress)
    return result, open_model_dir(folder / "out")


def cells(
    rate: float, result: RecoverResult, after: Tensor, ratios: Sequence[tuple[float, float]]
) -> list[str]:
    written = result.written.tokens if result.written else 0
    withheld = f"{result.before or math.nan:.4f} -> {result.after or math.nan:.4f}"
    steps = f"{result.steps} x {result.step_tokens}"
    parts = [
        result.optimizer,
        f"{rate:g}",
        steps,
        str(result.kept),
        f"{written:,}",
        withheld,
        shown(after),
    ]
    told = " ".join(f"{ratio:.3f} ± {spread:.3f}" for ratio, spread in ratios)
    return [*parts, told, f"{result.seconds:.0f}"]


if __name__ == "__main__":
    main()
