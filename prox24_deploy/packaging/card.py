"""The model card of the pruned model, in the form that the Hugging Face Hub reads.

It is written when the report is, for it quotes measured accuracy, in its text and in its
metadata, there as a model-index. Of the source model's own card it keeps the text, below its own,
and of its metadata what stays true: licence and language.
https://huggingface.co/docs/hub/model-cards says what the metadata means.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from prox24_deploy import __version__
from prox24_deploy.bundle.layout import PRUNED, RECOVERED
from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.documents import Document, read_object, reason_of
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.metrics import METRICS
from prox24_deploy.core.printable import printable
from prox24_deploy.core.records import Metric, TextSource
from prox24_deploy.core.tasks import TASKS
from prox24_deploy.report.escape import code
from prox24_deploy.report.render import render_markdown
from prox24_deploy.report.schema import Report

CARD_FILE = "README.md"
TAGS = ["2:4-sparsity", "semi-structured", "pruned", "prox24-deploy"]
_DENSE_TAGS = TAGS[-1:]

# Metadata of the source model that stays true of the pruned one.
_KEPT = ("license", "license_name", "license_link", "language")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ParsedCard:
    """A card: all of its metadata, its text, and why the metadata could not be read, else ""."""

    metadata: Mapping[str, Any]
    text: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """What the source model says of itself.

    Attributes:
        metadata: what of its card stays true, with the licence of its configuration where the card
            names none.
        text: of its card, without the metadata; "" where it has none.
        opened_by: class of sentence-transformers that opens it; "" for a model of transformers.
        problem: why its metadata could not be read, else "".
    """

    metadata: Mapping[str, Any]
    text: str
    opened_by: str = ""
    problem: str = ""


def parse_card(written: str) -> ParsedCard:
    """Split the text of a card from its metadata."""
    metadata, problem = _metadata(written)
    return ParsedCard(metadata, _FRONT_MATTER.sub("", written, count=1).strip(), problem)


def read_source_card(model_dir: Path) -> SourceCard:
    """Read README.md and config.json of the source model; a card that is damaged says so."""
    path = model_dir / CARD_FILE
    card = parse_card(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    config = _read_object(model_dir / "config.json")
    kept = {key: card.metadata[key] for key in _KEPT if key in card.metadata}
    if "license" not in kept and isinstance(config.get("license"), str):
        kept["license"] = config["license"]
    return SourceCard(
        metadata=kept, text=card.text, opened_by=_opened_by(model_dir), problem=card.problem
    )


def _opened_by(model_dir: Path) -> str:
    if not (model_dir / "modules.json").is_file():
        return ""
    file = model_dir / "config_sentence_transformers.json"
    library = _read_object(file) if file.is_file() else {}
    return str(library.get("model_type", "SentenceTransformer"))


def _read_object(file: Path) -> dict[str, Any]:
    document = Document(str(file), ModelDirError, "restore it")
    return read_object(file, document, finite=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFigures:
    """Accuracy of one model of the release; `heading` says which, "" where there is but one.

    `suffix` tells names of its metrics from those of the others.
    """

    heading: str
    suffix: str
    metrics: tuple[Metric, ...]
    tasks: tuple[Metric, ...]


def card_figures(report: Report) -> list[CardFigures]:
    """What the model beside the card scored, then what its 8-bit numbers do, where there are any.

    These are in other files of the release, and their figures are not those of the weights that
    the card is of.
    """
    accuracy, quantized = report.accuracy, report.quantization
    tasks = accuracy.tasks.metrics if accuracy.tasks else ()
    last = CardFigures(heading="", suffix="", metrics=accuracy.metrics, tasks=tasks)
    if quantized is None or not accuracy.steps:
        return [last]
    form, stored = quantized.format.upper(), report.model.source_dtype
    folder = RECOVERED if report.recovery else PRUNED
    return [
        CardFigures(
            heading=f"The model in `{folder}/` of the release, in {stored}:",
            suffix="",
            metrics=accuracy.steps[-1].metrics,
            tasks=(),
        ),
        replace(
            last,
            heading=f"The same with its layers in {form}, as ONNX files and engines of the release "
            f"have it, and what is packaged of it for vLLM; the verdict is of this one:",
            suffix=f" in {form}",
        ),
    ]


def render_card(report: Report, source: SourceCard) -> str:
    """Text of the card; the same report and source give the same text."""
    name = report.model.title
    dense: dict[str, list[str]] = {}
    for layer in report.pruning.layers:
        if layer.status == "skipped":
            dense.setdefault(layer.reason, []).append(layer.name)
    view = {
        "report": report,
        "totals": report.pruning.totals,
        "kind": _kind(report),
        "recovery": report.recovery,
        "trained": bool(report.recovery and report.recovery.kept),
        "figures": card_figures(report),
        "name": name,
        "tool_version": __version__,
        "opened_by": source.opened_by,
        "dense": dense,
        "source": _samples,
        "limits": _limits(report, source),
        # Quoted as its authors wrote it.
        "text": Markup(source.text),
        "front_matter": _front_matter(report, source).to_yaml(),
    }
    return render_markdown("card.md.jinja", view)


def write_card(report: Report, source: SourceCard, pruned: Path) -> None:
    """Write README.md into the directory of the pruned model, at once."""
    write_atomic(pruned / CARD_FILE, render_card(report, source).encode())


def _metadata(written: str) -> tuple[dict[str, Any], str]:
    found = _FRONT_MATTER.match(written)
    if found is None:
        return {}, ""
    try:
        metadata = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Dates that there are none of are a ValueError.
        return {}, reason_of(error)
    if not isinstance(metadata, dict):
        return {}, "it is no mapping"
    return metadata, ""


def _kind(report: Report) -> str:
    return "2:4 sparse" if report.pruning.totals.pruned else "dense"


def _front_matter(report: Report, source: SourceCard) -> ModelCardData:
    """The metadata; what of the source's stays true may be anything that YAML has."""
    title, task = report.model.title, report.model.task
    return ModelCardData(
        **source.metadata,
        base_model=title if "/" in title else None,
        library_name="sentence-transformers" if source.opened_by else "transformers",
        pipeline_tag=TASKS[task].hub_name or task,
        tags=TAGS if report.pruning.totals.pruned else _DENSE_TAGS,
        model_name=f"{printable(title).rpartition('/')[2]}, {_kind(report)}",
        eval_results=[*_index(report)],
    )


def _index(report: Report) -> Iterator[EvalResult]:
    """What was measured of the sparse model, or of it against the dense one, for the Hub."""
    for part in card_figures(report):
        for metric in part.metrics:
            yield from _result(report, metric, part.suffix, of_harness=False)
        for metric in part.tasks:
            yield from _result(report, metric, part.suffix, of_harness=True)


def _result(
    report: Report, metric: Metric, suffix: str, *, of_harness: bool
) -> Iterator[EvalResult]:
    """One figure, unless there is none."""
    found = metric.sparse or metric.agreement
    if found is None or not math.isfinite(found.value):
        return
    task, known = report.model.task, METRICS.get(metric.name)
    # On one line: a line of its own might end the metadata.
    group, _, measure = printable(metric.name).rpartition("/")
    yield EvalResult(
        task_type=TASKS[task].hub_name or task,
        dataset_type="lm-evaluation-harness" if of_harness else "custom",
        dataset_name=group if of_harness else _samples(report.accuracy.evaluation),
        metric_type=(known and known.hub_name) or measure,
        metric_name=printable(metric.name) + suffix,
        metric_value=found.value,
    )


def _samples(text: TextSource) -> str:
    """What samples were taken from; of the user's files no paths, for a card is published."""
    kinds = {
        "file": "given by its maker",
        "written": "that the source model wrote itself",
        "builtin": "of the English documentation inside CPython, not of the model's own domain",
        "split": "held out from the calibration samples",
    }
    unit = f"samples ({text.tokens:,} {text.unit}s)"
    if text.modality.is_counted_in_samples:
        unit = f"{text.unit}s"
    return f"{text.samples:,} {unit} {kinds[text.kind]}"


def _limits(report: Report, source: SourceCard) -> list[str]:
    limits = [
        "Whatever limits the source model has, this one has too; pruning can harm rare inputs more "
        "than the averages above show.",
        "Only what the table above lists was measured: not robustness, bias or safety after "
        "pruning.",
    ]
    if report.accuracy.evaluation.kind != "file":
        limits.append("Accuracy was not measured on data of the model's own task.")
    if "license" not in source.metadata:
        limits.append("The source model names no licence, so that none is given here.")
    if source.problem:
        limits.append(
            "The metadata of the source model's card could not be read "
            f"({code(source.problem)}); its licence is missing here."
        )
    if "/" not in report.model.title:
        limits.append(
            "No repository of the source model was named; add `base_model` to the metadata above "
            "before this is published."
        )
    return limits
