"""How often an image classifier chooses what it did, once pruned and once recovered.

Trains a vision transformer on digits, prunes all layers of its blocks with preset `default` and
with `magnitude`, and trains the kept weights against the dense model on the images that it was
trained on. Agreement is that of the likeliest class on 597 others, with binomial errors.

    python benchmarks/image_recovery.py [--steps 600] [--width 16] [--device cpu]

Prints a table and one JSON line; fails if agreement behind recovery is below 0.97.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits import Digits, trained_on_digits
from PIL import Image
from recovery import progress, pruned_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import ViTImageProcessor

from prox24_deploy.config.options import BuildOptions, PruneOptions, RecoverOptions, TextOptions
from prox24_deploy.core.types import Method
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.directory import ModelDir, load_model, open_model_dir
from prox24_deploy.pipeline.context import RunContext, read_context, torch_device
from prox24_deploy.recovery.recover import Recovery, recover_directory

_BAR = 0.97
_METHODS: tuple[Method, ...] = ("prox", "magnitude")
# More than there are.
_IMAGES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Shares of equal choices with their errors, and seconds of recovery."""

    method: Method
    pruned: tuple[float, float]
    recovered: tuple[float, float]
    seconds: float


def written(made: Digits, folder: Path) -> tuple[Path, Path, Path]:
    """The model's directory, and folders of the images that it was trained on and of the others."""
    model, seen, others = folder / "model", folder / "seen", folder / "others"
    made.model.save_pretrained(model)  # type: ignore[operator]
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(model)
    for part, pixels in ((seen, made.pixels[: made.seen]), (others, made.pixels[made.seen :])):
        part.mkdir()
        bytes_of = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for number, image in enumerate(bytes_of):
            Image.fromarray(image).save(part / f"{number:04}.png")
    return model, seen, others


@torch.no_grad()
def choices(directory: ModelDir, context: RunContext, device: torch.device) -> Tensor:
    """The likeliest class of each evaluation image."""
    model = load_model(directory, context.recipe, device)
    found = [
        run_model(model, batch, context.recipe.task).logits.argmax(-1)
        for batch in context.held_out.batches
    ]
    return torch.cat(found).cpu()


def agreement(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Share of equal choices and its standard error."""
    share = float((first == second).double().mean())
    return share, (share * (1 - share) / len(first)) ** 0.5


def measured(
    method: Method,
    context: RunContext,
    dense: Tensor,
    steps: int,
    device: torch.device,
    folder: Path,
) -> Row:
    """Prune by a method and recover, in a folder; `dense` is what the dense model chooses."""
    tokens = context.calibration.source.tokens
    pruned = pruned_model(context, PruneOptions(method=method), tokens, folder, device)
    asked = Recovery(
        dense=context.source,
        pruned=pruned,
        recipe=context.recipe,
        calibration=context.calibration,
        options=RecoverOptions(steps=steps),
        seed=0,
        device=device,
    )
    out = folder / "recovered"
    found = recover_directory(asked, kept=folder / "kept", out=out, progress=progress)
    return Row(
        method=method,
        pruned=agreement(dense, choices(pruned, context, device)),
        recovered=agreement(dense, choices(open_model_dir(out), context, device)),
        seconds=found.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=16, help="of the model; 64 hardly loses")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    device = torch_device(asked.device)
    made = trained_on_digits(steps=1500, channels=3, width=asked.width)
    table = Table("mask", "pruned", "recovered", "s", box=None)
    with tempfile.TemporaryDirectory() as name:
        model, seen, others = written(made, Path(name))
        text = TextOptions(calibration=(seen,), evaluation=(others,), images=_IMAGES)
        context = read_context(model, None, BuildOptions(text=text))
        dense = choices(context.source, context, device)
        rows = [
            measured(method, context, dense, asked.steps, device, Path(name) / method)
            for method in _METHODS
        ]
    for row in rows:
        shares = [f"{share:.3f} ± {error:.3f}" for share, error in (row.pruned, row.recovered)]
        table.add_row(row.method, *shares, f"{row.seconds:.0f}")
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "image_recovery", "rows": [asdict(row) for row in rows]}))
    missed = [row.method for row in rows if row.recovered[0] < _BAR]
    if missed:
        sys.exit(f"agreement below {_BAR} behind recovery: {', '.join(missed)}")


if __name__ == "__main__":
    main()
