"""Every way to prune a model, beside SparseGPT as published, on the same texts.

    python benchmarks/methods.py MODEL_DIR --calibration F --evaluation F
        [--ways wanda default reconstructed ...] [--device cuda]

Prunes the model in each way and compares it with the dense one on the same evaluation samples, as
`recovery.py` does. Prints a JSON line for each as it is done, with the ratio of its loss to that of
SparseGPT and its paired standard error, then a table.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from recovery import SPARSEGPT, asking, dense_loss, losses_of, opened, pruned_model, ratio_of, shown
from rich.console import Console
from rich.table import Table

from prox24_deploy.config.options import PruneOptions

# The first three as their papers have them.
WAYS = {
    "sparsegpt": SPARSEGPT,
    "magnitude": replace(SPARSEGPT, method="magnitude"),
    "wanda": replace(SPARSEGPT, method="wanda"),
    "sparsegpt-refined": PruneOptions(method="sparsegpt", permute="none"),
    "fast": PruneOptions(preset="fast", permute="none"),
    "default": PruneOptions(permute="none"),
    "permuted": PruneOptions(),
    "reconstructed": PruneOptions(reconstruct=True),
    "best": PruneOptions(preset="best"),
}


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prune-tokens", type=int, default=65536)
    asked, console = parser.parse_args(), Console(width=100)
    context, device = opened(asked)
    loss = dense_loss(context, asked.evaluation_tokens, device)
    table, rival = Table("way", "s", loss.name, "of SparseGPT's", box=None), None
    for name in dict.fromkeys(("sparsegpt", *asked.ways)):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            made = pruned_model(context, WAYS[name], asked.prune_tokens, Path(folder), device)
            seconds = time.perf_counter() - began
            losses = losses_of(made, context, loss, device)
        rival = losses if rival is None else rival
        ratio, error = ratio_of(losses, rival)
        row = {"way": name, "seconds": seconds, "loss": float(losses.mean())}
        print(json.dumps({**row, "ratio": ratio, "ratio_error": error}), flush=True)
        table.add_row(name, f"{seconds:.0f}", shown(losses), f"{ratio:.3f} ± {error:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
