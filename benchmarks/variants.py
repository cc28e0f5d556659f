"""Ideas between a pruned model and its dense teacher, each beside the default on the same texts.

    python benchmarks/variants.py MODEL_DIR --calibration F --evaluation F
        [--variants default rows rotated ...] [--device cuda]

Dense rows in a matrix, orders of channels, rotations that the weights absorb, the prox inside the
recovery loop, tokens weighted by the Fisher information, and swaps; see `variant_*.py`. Every model
is pruned with the default preset and without a permutation, but for what the variant says, and
compared with the dense one on the same evaluation samples. Prints one JSON line for each variant as
it is done, with the ratio of its loss to the default's and to the one it is measured against, and
paired standard errors; then a table, and what dense rows cost in time on GPUs that were measured.
Asserts that rotated and reordered models compute what the dense one does and that gains of swaps
are exact.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from recovery import asking, dense_loss, opened, ratio_of, shown
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from variant_joint import learned, recovered
from variant_lab import Figures, Lab
from variant_order import ordered
from variant_rotations import rotated
from variant_rows import costs, with_layers, with_rows
from variant_swaps import require_exact, with_swaps
from variant_tokens import with_weights

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.model.directory import load_model

Made = tuple[nn.Module, Figures]
# As many weights as v_proj has in the model that this was made for.
_FEW, _MANY = 1 / 24, 1 / 8
VARIANTS: dict[str, Callable[[Lab], Made]] = {
    "default": lambda lab: (lab.pruned, {}),
    "values-dense": partial(with_layers, name="v_proj"),
    "rows": partial(with_rows, share=_FEW),
    "more-rows": partial(with_rows, share=_MANY),
    "ordered": partial(ordered, stream=False),
    "ordered-stream": partial(ordered, stream=True),
    "hadamard": partial(rotated, stream="hadamard", heads=False),
    "rotated": partial(rotated, stream="learned", heads=False),
    "rotated-ordered": partial(rotated, stream="learned", heads=False, order=True),
    "rotated-heads": partial(rotated, stream="none", heads=True),
    "rotated-both": partial(rotated, stream="learned", heads=True),
    "tokens": partial(with_weights, power=1.0),
    "tokens-root": partial(with_weights, power=0.5),
    "swaps": with_swaps,
    "recovered": lambda lab: recovered(lab, lab.pruned),
    "rotated-recovered": lambda lab: recovered(lab, made(lab, "rotated")),
    "joint": partial(learned, normalised=False),
    "joint-normalised": partial(learned, normalised=True),
}
# What a variant is measured against beside the default.
RIVALS = {
    "ordered-stream": "ordered",
    "rows": "values-dense",
    "rotated-recovered": "recovered",
    "joint": "recovered",
    "joint-normalised": "recovered",
}
# Rows of activations from which on a prefill has them.
_PREFILL = 1024


def made(lab: Lab, name: str) -> nn.Module:
    """The model of a variant, made here if it was not made yet."""
    if name not in lab.made:
        lab.made[name] = VARIANTS[name](lab)[0]
    return lab.made[name]


def lab_of(asked: argparse.Namespace) -> Lab:
    """The model, the texts and the sizes that were asked for."""
    context, device = opened(asked)
    wanted = argparse.Namespace(**{**vars(asked), "calibration_tokens": asked.recovery_tokens})
    dense = load_model(context.source, context.recipe, device)
    return Lab(
        context=context,
        device=device,
        dense=dense,
        loss=dense_loss(context, asked.evaluation_tokens, device),
        options=PruneOptions(permute="none", preset=asked.preset, include=tuple(asked.include)),
        lessons=opened(wanted)[0].calibration,
        steps=asked.steps,
        turns=asked.turns,
    )


def parsed() -> argparse.Namespace:
    parser = asking(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--preset", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--include", nargs="+", default=[], help="globs of the layers to prune")
    parser.add_argument("--recovery-tokens", type=int, default=495_000, help="text to train on")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--turns", type=int, default=200, help="steps of a search for rotations")
    return parser.parse_args()


def run(lab: Lab, name: str, losses: dict[str, Tensor]) -> Figures:
    """Make one variant, measure it and print its line."""
    began = time.perf_counter()
    model, figures = VARIANTS[name](lab)
    lab.made[name] = model
    if lab.device.type == "cuda":
        torch.cuda.synchronize(lab.device)
    seconds = time.perf_counter() - began
    losses[name] = lab.losses(model)
    row: Figures = {
        "variant": name,
        "device": str(lab.device),
        "seconds": seconds,
        "loss": float(losses[name].mean()),
    }
    for key, rival in (("ratio", next(iter(losses))), ("rival", RIVALS.get(name))):
        if rival in losses:
            row |= dict(
                zip((key, f"{key}_error"), ratio_of(losses[name], losses[rival]), strict=True)
            )
    row |= figures
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    asked, console = parsed(), Console(width=120)
    require_exact()
    lab = lab_of(asked)
    losses: dict[str, Tensor] = {}
    table = Table("variant", "s", lab.loss.name, "ratio", "ratio to its rival", box=None)
    # Each comes after what it is measured against.
    for name in (each for each in VARIANTS if each in asked.variants):
        row = run(lab, name, losses)
        ratios = [
            f"{row[key]:.4f} ± {row[f'{key}_error']:.4f}" if key in row else ""
            for key in ("ratio", "rival")
        ]
        table.add_row(name, f"{row['seconds']:.1f}", shown(losses[name]), *ratios)
    console.print(table)
    for share in (_FEW, _MANY):
        for figures in costs(share, ("h100", "h200", "a100", "rtx4090"), _PREFILL):
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
