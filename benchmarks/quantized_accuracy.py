"""What rounding to 8 bits costs trained models, dense and 2:4, beside the bars that it must keep.

    python benchmarks/quantized_accuracy.py [--only NAME ...] [--formats fp8 int8]
        [--prune prox] [--language MODEL_DIR --calibration F --evaluation F] [--embedding MODEL_DIR]

A language model loses log-perplexity, an embedder cosine to the dense embeddings, each beyond what
the model lost before it was quantised; a vision transformer, trained here in seconds on the digits
of scikit-learn, must choose the same classes as before. Subjects without a directory are left out.
`--prune prox` makes 2:4 models as a release is made; a model that is 2:4 already counts as dense.
Prints a table and one JSON line, and fails where a bar is missed.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits import trained_on_digits
from family_batches import recipe_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from prox24_deploy.config.options import BuildOptions, PruneOptions, TextOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.evaluation.classes import class_figures
from prox24_deploy.evaluation.losses import loss_against
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.directory import load_model
from prox24_deploy.model.layers import is_layer, to_matrix
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.quantization.quantize import quantize_model
from prox24_deploy.sparsity.pattern import is_24

# The most that quantisation may add to the loss of each subject.
BARS: dict[str, dict[QuantizedFormat, float]] = {
    "language": {"fp8": 0.01, "int8": 0.03},
    "embedding": {"fp8": 0.003, "int8": 0.01},
    "images": {"fp8": 0.02, "int8": 0.02},
}
# As quick as can be, and as a release is.
PRUNING = {
    "wanda": PruneOptions(method="wanda", refinement="none"),
    "prox": PruneOptions(permute="none"),
}
# By model before and after, loss of each sample.
Change = Callable[[nn.Module, nn.Module], Tensor]


@dataclass(frozen=True)
class Subject:
    """A trained model; `change` says what the second model loses against the first."""

    name: str
    loss: str
    model: nn.Module
    recipe: Recipe
    calibration: tuple[Batch, ...]
    change: Change


@dataclass(frozen=True)
class Row:
    """One model in one format; `worst` are the layers with the largest error, by what is added."""

    subject: str
    sparsity: str
    format: QuantizedFormat
    loss: str
    added: float
    standard_error: float
    samples: int
    bar: float
    quantized: int
    left: int
    outputs: int
    worst: dict[str, float]
    seconds: float

    @property
    def met(self) -> bool:
        return self.added <= self.bar


def from_directory(name: str, path: Path, text: TextOptions) -> Subject:
    """A model directory; the loss is that of its task, on evaluation text."""
    context = read_context(path, None, BuildOptions(text=text))
    model = load_model(context.source, context.recipe, torch.device("cpu"))
    loss = loss_against(model, context.recipe.task, context.held_out.batches)

    def change(before: nn.Module, after: nn.Module) -> Tensor:
        return loss.of(after) - loss.of(before)

    batches = context.calibration.batches
    return Subject(name, loss.name, model, context.recipe, batches, change)


def digits() -> Subject:
    """A vision transformer that tells digits apart, trained on two thirds of 1797 images."""
    made = trained_on_digits()
    recipe = recipe_of(made.model)
    given = [_images(part) for part in made.pixels[made.seen :].split(64)]

    def change(before: nn.Module, after: nn.Module) -> Tensor:
        pairs = [[_logits(m, each, recipe) for m in (before, after)] for each in given]
        figures = [class_figures(a, b, g.real) for (a, b), g in zip(pairs, given, strict=True)]
        return 1 - torch.cat(figures, dim=1)[0]

    calibration = tuple(_images(part) for part in made.pixels[:256].split(32))
    return Subject("images", "1 - top-1 agreement", made.model, recipe, calibration, change)


def _images(pixels: Tensor) -> Batch:
    return Batch({"pixel_values": pixels}, torch.ones(len(pixels), dtype=torch.bool))


@torch.no_grad()
def _logits(model: nn.Module, given: Batch, recipe: Recipe) -> Tensor:
    found: Tensor = run_model(model, given, recipe.task).logits.double()
    return found


def pruned(subject: Subject, options: PruneOptions) -> nn.Module:
    """The model with every target 2:4."""
    model = deepcopy(subject.model)
    with tempfile.TemporaryDirectory() as folder:
        prune_model(
            model, subject.recipe, subject.calibration, (), options,
            stored_dtype=lambda _: torch.float32, store=BlockStore(Path(folder)),
            progress=lambda *_: None,
        )  # fmt: skip
    return model


def measure(subject: Subject, before: nn.Module, sparsity: str, form: QuantizedFormat) -> Row:
    """Quantise a copy of a model, and compare it with what it was."""
    began = time.perf_counter()
    model = deepcopy(before)
    sparse = [
        name for name, m in model.named_modules() if is_layer(m) and is_24(to_matrix(m, m.weight))
    ]
    made, records, _ = quantize_model(
        model, subject.recipe, subject.calibration, form, sparse=sparse, progress=lambda *_: None
    )
    added = subject.change(before, model)
    errors = {record.name: record.error or 0.0 for record in records}
    return Row(
        subject=subject.name,
        sparsity=sparsity,
        format=form,
        loss=subject.loss,
        added=float(added.mean()),
        standard_error=float(added.std()) / math.sqrt(len(added)),
        samples=len(added),
        bar=BARS[subject.name][form],
        quantized=len(made.layers),
        left=len(records) - len(made.layers),
        outputs=sum(layer.output_scale is not None for layer in made.layers.values()),
        worst={name: errors[name] for name in sorted(errors, key=lambda n: -errors[n])[:4]},
        seconds=time.perf_counter() - began,
    )


def show(rows: Sequence[Row]) -> None:
    """Print the table, and all of it as JSON."""
    table = Table(
        "subject", "weights", "format", "loss", "added", "bar", "layers", "outputs", "s", box=None
    )
    for row in rows:
        table.add_row(
            row.subject, row.sparsity, row.format, row.loss,
            f"{row.added:.4f} ± {row.standard_error:.4f}",
            f"{row.bar} {'met' if row.met else 'MISSED'}",
            f"{row.quantized} of {row.quantized + row.left}", str(row.outputs),
            f"{row.seconds:.0f}",
        )  # fmt: skip
    Console(width=120).print(table, highlight=False)
    print(json.dumps({"benchmark": "quantized_accuracy", "rows": [asdict(row) for row in rows]}))


def subjects(arguments: argparse.Namespace) -> dict[str, Callable[[], Subject]]:
    """How to open every subject of which there is a model."""
    own = TextOptions(
        calibration=tuple(arguments.calibration),
        evaluation=tuple(arguments.evaluation),
        calibration_tokens=arguments.tokens,
        evaluation_tokens=arguments.tokens,
    )
    carried = TextOptions(calibration_tokens=arguments.tokens, evaluation_tokens=arguments.tokens)
    found: dict[str, Callable[[], Subject]] = {}
    if arguments.language:
        found["language"] = lambda: from_directory("language", arguments.language, own)
    if arguments.embedding:
        found["embedding"] = lambda: from_directory("embedding", arguments.embedding, carried)
    found["images"] = digits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language", type=Path, help="directory of a decoder")
    parser.add_argument("--embedding", type=Path, help="directory of an embedder")
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--evaluation", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=8192, help="of either text")
    parser.add_argument("--only", nargs="+", choices=BARS, default=[*BARS])
    parser.add_argument("--formats", nargs="+", choices=("fp8", "int8"), default=["fp8", "int8"])
    parser.add_argument("--sparsity", nargs="+", choices=("dense", "2:4"), default=["dense", "2:4"])
    parser.add_argument("--prune", choices=PRUNING, default="wanda")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for name, opened in subjects(arguments).items():
        if name not in arguments.only:
            continue
        subject = opened()
        for sparsity in arguments.sparsity:
            before = (
                subject.model if sparsity == "dense" else pruned(subject, PRUNING[arguments.prune])
            )
            for form in arguments.formats:
                rows.append(measure(subject, before, sparsity, form))
                print(rows[-1], file=sys.stderr)
    show(rows)
    if not rows or not all(row.met for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
