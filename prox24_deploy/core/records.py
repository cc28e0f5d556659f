"""Frozen records handed from stage to stage.

Every stage returns one of the `*Result` classes; the bundle stores it as JSON under `stages/` and
the report is assembled from nothing else. Paths inside records are POSIX paths relative to the
bundle, so that a bundle can be moved. No torch, no pydantic and no I/O in this module.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.modalities import ModalityKind, modality_of_unit
from prox24_deploy.core.types import DType, Judgement, Twin


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where text came from and how much of it was used.

    `kind` is "file" for text of the user's, "written" for what the model wrote itself, "builtin"
    for the text shipped with CPython and "split" for a part of the user's or of that which was held
    out. An image or recording is one unit.
    `targets` counts the samples of an encoder-decoder that came with a target; the others were
    their own, or the dense model's. It is None for any other. `tokens` counts text and target.
    `shared` counts the held-out samples that are calibration samples, too.
    """

    kind: Literal["file", "written", "builtin", "split"]
    paths: tuple[str, ...] = field(metadata=unkeyed("`sha256` says what was read there"))
    sha256: str
    samples: int
    tokens: int
    unit: str = "token"
    targets: int | None = None
    shared: int = 0

    @property
    def modality(self) -> ModalityKind:
        """What the samples are of."""
        return modality_of_unit(self.unit, targets=self.targets is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was read from the model directory, and what the model is called."""

    path: str
    sha256: str
    model_type: str
    architecture: str
    family: str
    task: str
    parameters: int
    source_dtype: str
    name: str = ""

    @property
    def title(self) -> str:
        """Its name; where an older version has stored none, that of its folder."""
        return self.name or PurePosixPath(self.path).name or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What happened to one layer.

    `shape` is that of its matrix, (out_features, in_features); of a convolution (out_channels,
    height · width · in_channels). Errors are ||Y - Y'||^2 / ||Y||^2, where Y is the output
    of the dense layer in the dense model and Y' that of the pruned layer in the pruned model (bias
    excluded), on calibration and on held-out text; None for a skipped layer. `rows` counts the
    inputs that it was calibrated on: tokens, patches or pixels. `note`: why its errors say nothing.
    `pull`: of a layer of an expert with too few of them, which part of what it was solved on pulls
    it to the dense weights, 0 to 1.
    """

    name: str
    shape: tuple[int, int]
    status: Literal["pruned", "skipped"]
    reason: str
    method: str
    relative_error: float | None
    held_out_error: float | None
    iterations: int
    seconds: float
    rows: int = 0
    note: str = ""
    pull: float = 0.0

    @classmethod
    def skipped(cls, name: str, shape: tuple[int, int], reason: str) -> "LayerRecord":
        """That of a layer, of a matrix of this shape, that was left as it is."""
        return cls(
            name=name,
            shape=shape,
            status="skipped",
            reason=reason,
            method="",
            relative_error=None,
            held_out_error=None,
            iterations=0,
            seconds=0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with the standard error of its mean."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """Rise of the model's loss when this layer alone is pruned; `weights` counts its elements."""

    name: str
    weights: int
    loss: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Rise of the model's loss with the least harmful `layers` pruned, `weights` elements."""

    layers: int
    weights: int
    loss: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What pruning costs layer by layer and in sum, on calibration text that was withheld.

    `metric` names the loss, such as "log-perplexity" or "1 - embedding cosine", averaged over
    `samples`. `layers` are in order of the harm per weight, the least first; `curve` has some of
    the prefixes of it, and the first `chosen` layers were pruned. Each layer was solved alone, on
    inputs of the dense model; the whole model, solved in sequence, usually loses less.
    """

    metric: str
    samples: int
    layers: tuple[LayerSensitivity, ...]
    curve: tuple[CurvePoint, ...]
    max_loss: float | None
    max_layers: int | None
    chosen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOrder:
    """Whether the channels that a layer reads were put into another order before it was pruned.

    `tensors` names all that moved, in the built model. `kept_before` and `kept_after` are the share
    of Wanda's score, squared, that the best two of every four keep in the old order and the new
    one, whose hash is `order_sha256`. `reason` says why the channels stay where they were, "" if
    they moved.
    """

    layer: str
    tensors: tuple[str, ...]
    kept_before: float | None
    kept_after: float | None
    order_sha256: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """Result of the pruning stage.

    `state_sha256` hashes every weight file that was written; `reconstructed` says that the kept
    weights of each block were tuned together after the layers were solved. `sensitivity` is there
    where a budget chose the layers. `notes` are sentences on what of the checkpoint was left out,
    `memory` says where weights and hidden states were kept and what that was expected to take.
    `orders` has each pruned layer that reads channels whose order is free.
    """

    method: str
    preset: str
    target: Literal["asymmetric", "symmetric"]
    device: str
    layers: tuple[LayerRecord, ...]
    calibration: TextSource
    held_out: TextSource
    damping: tuple[float, float]
    state_sha256: str
    seconds: float
    reconstructed: bool = False
    sensitivity: Sensitivity | None = None
    notes: tuple[str, ...] = ()
    memory: str = ""
    orders: tuple[ChannelOrder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedMetric:
    """A figure that the dense and the sparse model each have, on the same inputs.

    `difference` is sparse − dense, None where it is not a mean over samples. `values` has one
    figure of the sparse model for each sample, whose mean is `sparse`, so that two builds can be
    compared sample by sample. A report has None for what is not finite. In files either kind of
    metric has the same keys: `agreement` of this one is always null.
    """

    name: str
    higher_is_better: bool
    samples: int
    dense: Estimate | None
    sparse: Estimate | None
    difference: Estimate | None
    agreement: None = None
    values: tuple[float, ...] = ()

    @property
    def estimate(self) -> Estimate | None:
        """What is held against a baseline: the figure of the sparse model."""
        return self.sparse

    @property
    def change(self) -> Estimate | None:
        """How far the sparse model is from the dense one, in units of the metric."""
        return self.difference


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectMetric:
    """A figure that compares the two models with each other; neither has one of its own.

    `values` has one figure for each sample, whose mean is `agreement`. In files either kind of
    metric has the same keys: `dense`, `sparse` and `difference` of this one are always null. One
    whose agreement is None, as a report has it where that is not finite, is read as a pair of None.
    """

    name: str
    higher_is_better: bool
    samples: int
    dense: None = None
    sparse: None = None
    difference: None = None
    agreement: Estimate | None
    values: tuple[float, ...] = ()

    @property
    def estimate(self) -> Estimate | None:
        """What is held against a baseline."""
        return self.agreement

    @property
    def change(self) -> Estimate | None:
        """How far the sparse model is from the dense one, in units of the metric."""
        return self.agreement


# One accuracy figure, dense against sparse on the same inputs.
Metric = PairedMetric | DirectMetric


# What was last done to a model.
StepName = Literal["pruned", "recovered", "quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyStep:
    """The metrics of a model on its way, against the dense one on the same samples."""

    name: StepName
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """Result of the evaluation stage; `metrics[0]` is the headline.

    `steps` has what the model scored after each step before the last, in their order.
    """

    metrics: tuple[Metric, ...]
    evaluation: TextSource
    seconds: float
    steps: tuple[AccuracyStep, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """2:4 check of one weight tensor along its reduction axis.

    `module` is the module path where the file tells it, else "". `expected` says that the file (or
    the caller) declares this weight as 2:4. `first_violation` is the index of the first element of
    the first group of four with more than two non-zeros, or None. `axis` (-1 if not known) and that
    index are those of the stored tensor. `part` is the slice of it that the weight is, "" for all
    of it, or says what it is computed from; `shape` is that of the slice. `density` is the share of
    its elements that are not zero, 0 if not read. `node` names the consumer ("" outside ONNX).
    TensorRT may take a sparse kernel for an `eligible` one; of an `unproven` one nothing is known.
    """

    tensor: str
    module: str
    node: str
    op_type: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    density: float
    is_24: bool
    expected: bool
    first_violation: tuple[int, ...] | None
    reason: str
    part: str = ""
    eligible: bool = False
    ineligible_reason: str = ""
    unproven: bool = False
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """One exported file: path in the bundle, hash over graph and external data, size in bytes."""

    path: str
    dtype: DType
    opset: int
    sha256: str
    size_bytes: int

    @property
    def graph(self) -> str:
        """Name of the graph: "model", "encoder" or "decoder"."""
        return graph_name(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsCheck:
    """ONNX Runtime on CPU against PyTorch for one output over all tried shapes."""

    twin: Twin
    output: str
    shapes: tuple[tuple[int, ...], ...]
    max_abs_difference: float
    tolerance: float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """Result of the export stage; a twin is one graph, or those of encoder and decoder."""

    dense: tuple[OnnxModel, ...]
    sparse: tuple[OnnxModel, ...]
    sparsity: tuple[TensorCheck, ...]
    numerics: tuple[NumericsCheck, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One layer of an engine: its name, what it says of the ONNX nodes in it, and its kernel."""

    layer: str
    nodes: str
    tactic: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderSparsity:
    """What a builder said of sparse layers, None where nothing; `kernels` of the engine."""

    eligible: int | None
    chosen: int | None
    eligible_layers: tuple[str, ...] = ()
    chosen_layers: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """How torch.compile made the graphs of an engine: `graphs` of them, `cached` from its cache.

    `reason` says why the engine runs without, kernel by kernel; it is "" where it is compiled.
    """

    seconds: float = 0.0
    graphs: int = 0
    cached: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One compiled engine; `versions` of what made it, `said` what its builder said of sparsity.

    `compilation` is that of an engine that PyTorch runs.
    """

    path: str
    backend: str
    twin: Twin
    onnx: str
    onnx_sha256: str
    device: str
    dtype: DType
    versions: dict[str, str]
    size_bytes: int
    said: BuilderSparsity | None = None
    compilation: Compilation | None = None

    @property
    def graph(self) -> str:
        """Name of the graph that was compiled: "model", "encoder" or "decoder"."""
        return graph_name(self.onnx)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvidence:
    """Whether one layer runs on sparse tensor cores, and why not. None means unknown."""

    module: str
    eligible: bool | None
    chosen: bool | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvidence:
    """What one backend did with the 2:4 weights.

    `numerics` compares its sparse engine with the same weights multiplied dense, where it can;
    `graph` is that of the engine.
    """

    backend: str
    device: str
    eligible: int | None
    chosen: int | None
    summary: str
    layers: tuple[LayerEvidence, ...]
    numerics: tuple[NumericsCheck, ...] = ()
    graph: str = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """Result of the compile stage."""

    engines: tuple[Engine, ...]
    evidence: tuple[EngineEvidence, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Percentiles of one twin's latency; `samples_ms` keeps every run for the plots."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Slowest and fastest clock of a GPU's multiprocessors while it was timed, in MHz.

    `slowed_by` names what kept it from a higher clock, such as its power cap or its temperature.
    """

    sm_mhz_low: int
    sm_mhz_high: int
    slowed_by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Dense against sparse at one shape, interleaved; `speedup` is dense over sparse time.

    `gated` is False where the backend has no sparse kernels: the row informs and is "not gated".
    `sequence` is 0 for a graph that has no such axis. `clocks` is None where nothing ran on a GPU.
    `graph` is "model", or "encoder" or "decoder" where there are both; what the decoder reads is
    as long as what it writes, `sequence` tokens. `past` counts the tokens before them, of which the
    cache holds keys and values.
    """

    backend: str
    device: str
    dtype: DType
    batch: int
    sequence: int
    dense: Timing
    sparse: Timing
    speedup: Interval
    limit: float
    gated: bool
    verdict: Judgement
    clocks: Clocks | None = None
    graph: str = "model"
    past: int = 0

    @property
    def engine(self) -> str:
        """The backend, and the graph where there are two."""
        return self.backend if self.graph == "model" else f"{self.backend}, {self.graph}"

    def runs_dense(self, evidence: Iterable[EngineEvidence]) -> bool:
        """Whether its own sparse engine is known to run no sparse kernel."""
        own = [e for e in evidence if (e.backend, e.graph) == (self.backend, self.graph)]
        return bool(own) and all(each.chosen == 0 for each in own)

    def tokens_per_second(self, twin: Timing) -> float | None:
        """New tokens of all rows by the median time; None for a graph that has none."""
        return 1e3 * self.batch * self.sequence / twin.median_ms if self.sequence else None

    def ms_per_token(self, twin: Timing) -> float | None:
        """Median time by new tokens of one row: when decoding, what a reader waits for each."""
        return twin.median_ms / self.sequence if self.sequence else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """A backend whose engines could not run on this machine, and why."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Result of the bench stage."""

    latency: tuple[LatencyRow, ...]
    conditions: dict[str, str]
    seconds: float
    not_measured: tuple[NotMeasured, ...] = ()


def graph_name(onnx: str) -> str:
    """Name of the graph that a file in the bundle holds."""
    return PurePosixPath(onnx).stem
