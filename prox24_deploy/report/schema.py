"""The shape of `report.json`, the single source of every other report file.

The records of the stages appear as they are; what is defined here is only what the report adds to
them. From the first release on, any change of a key raises `SCHEMA_VERSION`, because unknown
keys are errors.
"""

import json
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from prox24_deploy.core.accuracy import EngineAccuracy, TaskScores
from prox24_deploy.core.documents import Document, first_problem, parse_json, read_document
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.quantized import LayerQuantization, StraightThrough
from prox24_deploy.core.records import (
    AccuracyStep,
    ChannelOrder,
    EngineEvidence,
    Estimate,
    Interval,
    LatencyRow,
    LayerRecord,
    Metric,
    ModelInfo,
    NotMeasured,
    Sensitivity,
    TensorCheck,
    TextSource,
)
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.types import Judgement, QuantizedFormat, Verdict

SCHEMA_VERSION: Final = 2
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

PartName = Literal["sparsity", "export", "accuracy", "speed"]
PARTS: tuple[PartName, ...] = get_args(PartName)
CheckKind = Literal[
    "pruning", "sparsity", "numerics", "parity", "accuracy", "budget", "latency", "limits",
    "baseline",
]  # fmt: skip
KINDS: tuple[CheckKind, ...] = get_args(CheckKind)
Status = Literal["compared", "missing", "new", "unmatched"]
ChangeKind = Literal[
    "accuracy", "speed-up", "latency", "size", "layers", "kernels", "release", "limits"
]


class _Record(BaseModel):
    # Text such as "1e999" is taken for a number, and for an infinite one.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Check(_Record):
    """One thing that was checked, for one part of the verdict; "not gated" is without a limit.

    `value` is judged against `limit`; both are None where the check is not a comparison of numbers.
    The kinds: "parity" is an engine against PyTorch, "accuracy" a metric against the dense model,
    "budget" the limit of loss that chose the layers, "limits" a limit that found no figure.
    """

    name: str
    part: PartName
    kind: CheckKind
    value: float | None
    limit: float | None
    verdict: Judgement
    message: str

    @property
    def gated(self) -> bool:
        """Whether it can fail the release."""
        return self.verdict != "not gated"


class Part(_Record):
    """One part of the verdict, and in one sentence why."""

    verdict: Judgement
    reason: str


class Parts(_Record):
    """The verdict in four parts.

    `sparsity`: every pruned weight is proven 2:4 on the files. `export`: files and engines do what
    PyTorch does with the same weights. `accuracy`: the sparse model against the dense one, and
    against a baseline where there is one. `speed`: sparse against dense, on backends that have
    sparse kernels.
    """

    sparsity: Part
    export: Part
    accuracy: Part
    speed: Part

    def by_name(self) -> dict[PartName, Part]:
        """Every part, in the order of the stages."""
        return {name: getattr(self, name) for name in PARTS}


class PruningTotals(_Record):
    """Sums and means over the layers.

    `parameters` counts the weights of the pruned layers, `density` is the non-zero share of the
    weights that the ONNX file declares 2:4, and the errors are plain means over pruned layers.
    """

    pruned: int
    skipped: int
    parameters: int
    density: float | None
    relative_error: float | None
    held_out_error: float | None


class Pruning(_Record):
    """What the pruning stage did, layer by layer."""

    method: str
    preset: str
    target: Literal["asymmetric", "symmetric"]
    device: str
    calibration: TextSource
    held_out: TextSource
    damping: tuple[float, float]
    reconstructed: bool
    sensitivity: Sensitivity | None
    orders: tuple[ChannelOrder, ...] = ()
    seconds: float
    layers: tuple[LayerRecord, ...]
    totals: PruningTotals


class Quantization(_Record):
    """What quantisation did, layer by layer; `withheld` samples chose, the others gave ranges."""

    format: QuantizedFormat
    calibration: TextSource
    withheld: int
    seconds: float
    layers: tuple[LayerQuantization, ...]
    training: StraightThrough | None = None


class Accuracy(_Record):
    """The headline metric spelled out, and all metrics.

    `dense`, `sparse` and `difference` are None where the headline compares the two models directly;
    `agreement` is that of the first metric that does. A figure that is not finite is None, and a
    check of its own fails. `metrics` are of the PyTorch models; `engines` has the same through the
    engines, on some of the samples. Engines that cannot run here are `engines_not_measured`, those
    that gave no usable output `engines_failed`. `tasks` are those of the lm-evaluation-harness.
    `steps` has the metrics after every step before the last.
    """

    metric: str
    higher_is_better: bool
    samples: int
    dense: Estimate | None
    sparse: Estimate | None
    difference: Estimate | None
    agreement_metric: str | None
    agreement: Estimate | None
    metrics: tuple[Metric, ...]
    evaluation: TextSource
    engines: tuple[EngineAccuracy, ...] = ()
    engines_not_measured: tuple[NotMeasured, ...] = ()
    engines_failed: tuple[NotMeasured, ...] = ()
    tasks: TaskScores | None = None
    steps: tuple[AccuracyStep, ...] = ()


class Sparsity(_Record):
    """The proof on the ONNX file, and what each backend made of it."""

    tensors: tuple[TensorCheck, ...]
    engines: tuple[EngineEvidence, ...]


class Sizes(_Record):
    """Bytes on disk, and numbers of weights.

    A 2:4 weight stores its zeros, so both ONNX files are about equally large. `packed_bytes` is
    computed: the sparse file if each group of four were two values and two 2-bit indices.
    """

    onnx_dense_bytes: int
    onnx_sparse_bytes: int
    packed_bytes: int
    weights: int
    non_zero_weights: int
    files: dict[str, int]


class Difference(_Record):
    """Something in which a report and its baseline are unlike, in words."""

    key: str
    report: str
    baseline: str


class Change(_Record):
    """One figure against that of the baseline.

    `worse` says by how much it is worse, in its unit and with a 95 % interval; negative is better.
    A "missing" figure is in the baseline alone, a "new" one in the report alone, and an "unmatched"
    row is a limit that found no figure. `limits` says its limits in words; a change without any is
    "not gated".
    """

    name: str
    kind: ChangeKind
    unit: str
    higher_is_better: bool
    before: float | None
    after: float | None
    worse: Interval | None
    limits: str
    status: Status
    verdict: Judgement
    message: str

    @property
    def gated(self) -> bool:
        """Whether it can fail the comparison."""
        return self.verdict != "not gated"


class Headline(_Record):
    """The figures of one accepted release, for the trend."""

    date: str
    reason: str
    verdict: Verdict
    figures: dict[str, float]


class Comparison(_Record):
    """A report against a baseline: what `compare.json` holds.

    `reason` and `date` are those of the baseline, "" where it is a plain report. `allowed` lists
    what differs and was accepted, `history` the figures of accepted releases, the oldest first.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    verdict: Verdict
    baseline: str
    reason: str
    date: str
    allowed: tuple[Difference, ...]
    changes: tuple[Change, ...]
    history: tuple[Headline, ...]


class Report(_Record):
    """Everything that `report.json` holds.

    `verdict` follows from `parts`: "fail" if one failed, else "inconclusive" if one is or accuracy
    was not gated, else "pass". `sentence` says what changed and whether that may ship, and is the
    first line of every view. `accepted_losses` are the limits that the user widened by name.
    `date` is when the last stage ended, ISO 8601 in UTC; `contents_sha256` is over the names and
    hashes of all files of the bundle that the stages left (`bundle.manifest.contents_sha256`), so
    that a page and a bundle can be told to belong together.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    verdict: Verdict
    sentence: str
    parts: Parts
    date: str = ""
    contents_sha256: str = ""
    accepted_losses: tuple[str, ...] = ()
    warnings: tuple[str, ...]
    model: ModelInfo
    options: dict[str, JsonValue]
    environment: dict[str, JsonValue]
    pruning: Pruning
    recovery: RecoverResult | None = None
    quantization: Quantization | None = None
    accuracy: Accuracy
    sparsity: Sparsity
    latency: tuple[LatencyRow, ...]
    not_measured: tuple[NotMeasured, ...]
    sizes: Sizes
    timings: dict[str, float]
    checks: tuple[Check, ...]
    regressions: tuple[Check, ...]
    baseline: Comparison | None = None

    @field_validator("latency")
    @classmethod
    def _times_are_times(cls, rows: tuple[LatencyRow, ...]) -> tuple[LatencyRow, ...]:
        for row in rows:
            times = (row.dense, row.sparse)
            known = [part for time in times for part in (time.median_ms, *time.samples_ms)]
            known += [row.speedup.value, row.speedup.low, row.speedup.high]
            if not all(map(_is_measured, known)) or not all(time.samples_ms for time in times):
                raise ValueError(f"a time or ratio of {row.backend} cannot have been measured")
        return rows


def _is_measured(value: float) -> bool:
    """Whether this can be milliseconds, or a ratio of them, from which others are computed."""
    return 1e-12 < value < 1e12


def report_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a written `report.json`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(mode="serialization"),
    }


def schema_text() -> str:
    """`report_schema()` as the package ships it, in `report.schema.json`."""
    return json.dumps(report_schema(), indent=2, sort_keys=True) + "\n"


def load_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        BundleError: the file is missing, is not JSON, is of another schema version, or lacks a key.
    """
    document = Document(f"Report {path}", BundleError, "pass the report.json of a bundle")
    return parse_report(read_document(path, document), str(path))


def parse_report(data: bytes, source: str) -> Report:
    """Parse the bytes of a `report.json`; `source` names it in errors.

    Raises:
        BundleError: as for `load_report`.
    """
    raw = parse_json(data, Document(f"Report {source}", BundleError, "build the bundle again"))
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"Report {source} has schema_version {version!r}, expected {SCHEMA_VERSION}; build the "
            "bundle again with this version of prox24-deploy."
        )
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        where, what = first_problem(error)
        raise BundleError(
            f"Report {source} is damaged at {where!r}: {what}, got "
            f"{_short(error.errors()[0]['input'])}; build the bundle again."
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
