"""What single choices of pruning are worth: the same model and text, one thing changed at a time.

    python benchmarks/ablation.py MODEL_DIR --calibration F --evaluation F
        [--variants default float32 permuted reconstructed sparsegpt] [--device cuda]

Each variant prunes with the default preset and without a permutation, but for what its name says;
`float32` rounds no product to TF32, which makes a difference on a GPU alone. The loss is compared
with the dense model on the same evaluation samples. Prints one JSON line for each variant as it is
done, and a table with the ratio of each loss to the first and its paired standard error.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from recovery import asking, dense_loss, losses_of, opened, ratio_of, shown
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.types import silent
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.pipeline.context import RunContext
from prox24_deploy.pruning import directory
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.pruning.solvers import products

VARIANTS = {
    "default": PruneOptions(permute="none"),
    "float32": PruneOptions(permute="none"),
    "permuted": PruneOptions(permute="auto"),
    "reconstructed": PruneOptions(permute="none", reconstruct=True),
    "sparsegpt": PruneOptions(permute="none", method="sparsegpt"),
}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one variant gave: its model, seconds, and the mean error of its layers."""

    directory: ModelDir
    seconds: float
    error: float


def run(context: RunContext, name: str, folder: Path, device: torch.device) -> Pruned:
    """Prune as a variant does."""
    with in_float32() if name == "float32" else nullcontext():
        began = time.perf_counter()
        result = prune_directory(
            context.source,
            context.recipe,
            context.calibration,
            context.held_out,
            VARIANTS[name],
            device=device,
            solved=folder / name / "solved",
            out=folder / name / "pruned",
            progress=silent,
        )
        seconds = time.perf_counter() - began
    errors = [layer.held_out_error for layer in result.layers if layer.held_out_error is not None]
    return Pruned(
        open_model_dir(folder / name / "pruned"), seconds, float(torch.tensor(errors).mean())
    )


@contextmanager
def in_float32() -> Iterator[None]:
    """Round nothing to TF32: not in forward passes, not in the solver."""
    with (
        patch.object(directory, "tensor_cores", lambda _: nullcontext()),
        patch.object(products, "_has_tf32", lambda _: False),
    ):
        yield


def same_masks(first: ModelDir, second: ModelDir, context: RunContext) -> float:
    """Share of the elements of pruned layers that are zero in both models or in neither."""
    models = (load_model(each, context.recipe, torch.device("cpu")) for each in (first, second))
    alike = total = 0
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if one.ndim > 1 and float((one == 0).float().mean()) > 0.4:
            alike += int(((one == 0) == (other == 0)).sum())
            total += one.numel()
    return alike / total


def parsed() -> argparse.Namespace:
    parser = asking(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return parser.parse_args()


def main() -> None:
    asked, console = parsed(), Console(width=120)
    context, device = opened(asked)
    loss = dense_loss(context, asked.evaluation_tokens, device)
    table = Table("variant", "s", "layer error", loss.name, "ratio", "same mask", box=None)
    losses: list[Tensor] = []
    first: Pruned | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.variants:
            made = run(context, name, Path(folder), device)
            first = first or made
            losses.append(losses_of(made.directory, context, loss, device))
            ratio, spread = ratio_of(losses[-1], losses[0])
            alike = same_masks(first.directory, made.directory, context)
            row = {
                "variant": name,
                "device": str(device),
                "seconds": made.seconds,
                "layer_error": made.error,
                "loss": float(losses[-1].mean()),
                "ratio": ratio,
                "ratio_error": spread,
                "same_mask": alike,
            }
            print(json.dumps(row), flush=True)
            table.add_row(
                name, f"{made.seconds:.1f}", f"{made.error:.5f}", shown(losses[-1]),
                f"{ratio:.4f} ± {spread:.4f}", f"{alike:.4f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
