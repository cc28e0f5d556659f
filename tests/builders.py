"""Realistic records of one build, for the tests of the report."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prox24_deploy.config.limits import GivenLimits, Limits
from prox24_deploy.core.quantized import LayerQuantization, QuantizeResult
from prox24_deploy.core.records import (
    AccuracyStep,
    BenchResult,
    CompileResult,
    CurvePoint,
    DirectMetric,
    Engine,
    EngineEvidence,
    Estimate,
    EvaluateResult,
    ExportResult,
    Interval,
    LatencyRow,
    LayerEvidence,
    LayerRecord,
    LayerSensitivity,
    Metric,
    ModelInfo,
    NotMeasured,
    NumericsCheck,
    OnnxModel,
    PairedMetric,
    PruneResult,
    Sensitivity,
    TensorCheck,
    TextSource,
)
from prox24_deploy.core.recovery import RecoverResult, RecoveryPoint, WrittenText
from prox24_deploy.core.results import BuildResults
from prox24_deploy.core.types import Verdict
from prox24_deploy.latency.measure import PairSamples, latency_verdict, speedup_interval, timing
from prox24_deploy.report.assemble import Report, assemble_report

KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}


@dataclass(frozen=True)
class Records:
    """What a report is assembled from."""

    model: ModelInfo
    prune: PruneResult
    evaluate: EvaluateResult
    export: ExportResult
    compile: CompileResult
    bench: BenchResult
    quantize: QuantizeResult | None = None
    recover: RecoverResult | None = None

    @property
    def results(self) -> BuildResults:
        return BuildResults(
            prune=self.prune, evaluate=self.evaluate, export=self.export, compile=self.compile,
            bench=self.bench, quantize=self.quantize, recover=self.recover,
        )  # fmt: skip

    def report(self, given: GivenLimits | None = None, limits: Limits | None = None) -> Report:
        return assemble_report(
            self.model,
            self.results,
            limits or Limits(),
            given=given or GivenLimits(),
            options={
                "dtype": "float16",
                "seed": 0,
                "shapes": [[1, 128], [8, 128]],
                "baseline": None,
            },
            environment={
                "python": "3.11.2",
                "packages": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
            },
            sizes={"pruned": 90_870_000, "onnx/dense": 45_600_000, "onnx/sparse": 45_600_000},
            timings={"prune": 93.2, "evaluate": 41.0, "export": 18.4, "compile": 0.6, "bench": 9.1},
        )


def quantised(records: Records, reason: str = "") -> Records:
    """The same model quantised, but for its last layer where there is a reason."""
    pruned = [layer for layer in records.prune.layers if layer.status == "pruned"]
    layers = [
        LayerQuantization(
            name=layer.name, shape=layer.shape, largest=12.5, limit=9.25,
            chosen_by="99.99 percentile", clipped=1e-4, rounding="corrected",
            error=0.0021, nearest_error=0.0034,
        )
        for layer in pruned
    ]  # fmt: skip
    if reason:
        layers[-1] = replace(layers[-1], reason=reason)
    before = AccuracyStep(name="pruned", metrics=records.evaluate.metrics)
    return replace(
        records,
        quantize=QuantizeResult(
            format="fp8", layers=tuple(layers), calibration=records.prune.calibration, withheld=64,
            state_sha256="d" * 64, seconds=3.0,
        ),
        evaluate=replace(records.evaluate, steps=(before,)),
    )  # fmt: skip


def recovery(**changes: Any) -> RecoverResult:
    """A recovery that kept the second of its three points."""
    records = make_records(2)
    curve = (
        RecoveryPoint(step=0, trained=None, withheld=0.62),
        RecoveryPoint(step=10, trained=0.41, withheld=0.33),
        RecoveryPoint(step=20, trained=0.22, withheld=0.35),
    )
    found = RecoverResult(
        loss="KL(dense, sparse)", steps=20, step_tokens=8192, taken=20, kept=10, before=0.62,
        after=0.33, curve=curve, learning_rate=0.01, layers=12, vectors=30, parameters=4_000_000,
        calibration=records.prune.calibration, withheld=16,
        written=WrittenText(written=512, samples=500, tokens=256_000, sha256="0" * 64),
        warning="", device="cuda", peak_gib=3.5, state_sha256="0" * 64, seconds=80.0,
    )  # fmt: skip
    return replace(found, **changes)


def make_records(blocks: int = 6, *, gated: bool = False) -> Records:
    """A BERT of `blocks` blocks of six layers; the last layer is skipped."""
    layers = make_layers(blocks)
    text = TextSource(
        kind="file", paths=("calibration.txt",), sha256="c" * 64, samples=512, tokens=131_072
    )
    sparsity = tuple(make_check(layer) for layer in layers if layer.status == "pruned")
    device = "NVIDIA H200" if gated else "CPU (Some Processor @ 2.10GHz)"
    return Records(
        model=ModelInfo(
            path="models/all-MiniLM-L6-v2",
            sha256="a" * 64,
            model_type="bert",
            architecture="BertModel",
            family="bert",
            task="feature-extraction",
            parameters=22_713_216,
            source_dtype="float32",
        ),
        prune=PruneResult(
            method="prox",
            preset="default",
            target="asymmetric",
            device="cpu",
            layers=layers,
            calibration=text,
            held_out=replace(text, kind="split", samples=64, tokens=16_384),
            damping=(0.01, 0.01),
            state_sha256="b" * 64,
            seconds=93.2,
        ),
        evaluate=EvaluateResult(
            metrics=make_metrics(),
            evaluation=replace(text, paths=("evaluation.txt",)),
            seconds=41.0,
        ),
        export=ExportResult(
            dense=(make_onnx("dense", blocks),),
            sparse=(make_onnx("sparse", blocks),),
            sparsity=sparsity,
            numerics=make_numerics(),
            seconds=18.4,
        ),
        compile=CompileResult(
            engines=(make_engine("dense", device), make_engine("sparse", device)),
            evidence=(make_evidence(sparsity, device, gated=gated),),
            seconds=0.6,
        ),
        bench=BenchResult(
            latency=(
                make_row(1, 8.4, gated=gated, device=device),
                make_row(8, 61.0, gated=gated, device=device),
            ),
            conditions={
                "gpu": "no NVIDIA GPU",
                "cpu": "Some Processor",
                "load average": "0.51 0.40 0.38",
            },
            seconds=9.1,
        ),
    )


def make_layers(blocks: int) -> tuple[LayerRecord, ...]:
    random = np.random.default_rng(1)
    records = []
    for block in range(blocks):
        for position, (kind, shape) in enumerate(KINDS.items()):
            error = float(0.01 * (1 + position) * np.exp(random.normal(0.1 * block, 0.3)))
            records.append(
                LayerRecord(
                    name=f"encoder.layer.{block}.{kind}",
                    shape=shape,
                    status="pruned",
                    reason="",
                    method="prox",
                    relative_error=error,
                    held_out_error=error * float(random.uniform(1.02, 1.4)),
                    iterations=300,
                    seconds=2.5,
                    rows=131_072,
                )
            )
    records[-1] = skipped(records[-1], "listed under ignore in the recipe")
    return tuple(records)


def skipped(layer: LayerRecord, reason: str) -> LayerRecord:
    return replace(
        layer, status="skipped", reason=reason, relative_error=None, held_out_error=None,
        iterations=0, seconds=0.0,
    )  # fmt: skip


def make_check(layer: LayerRecord) -> TensorCheck:
    rows, columns = layer.shape
    return TensorCheck(
        tensor=f"val_{sum(map(ord, layer.name))}_{layer.name}",
        module=layer.name,
        node="node_MatMul",
        op_type="MatMul",
        dtype="float16",
        shape=(columns, rows),
        axis=0,
        density=0.5,
        is_24=True,
        expected=True,
        first_violation=None,
        reason="",
        part="",
        eligible=True,
        ineligible_reason="",
    )


def make_metrics() -> tuple[Metric, ...]:
    return (
        PairedMetric(
            name="STS-B Spearman correlation",
            higher_is_better=True,
            samples=1379,
            dense=Estimate(value=0.8203, standard_error=0.0091),
            sparse=Estimate(value=0.8117, standard_error=0.0094),
            difference=Estimate(value=-0.0086, standard_error=0.0021),
        ),
        DirectMetric(
            name="embedding cosine",
            higher_is_better=True,
            samples=512,
            agreement=Estimate(value=0.9712, standard_error=0.0009),
        ),
        DirectMetric(
            name="top-1 neighbour agreement",
            higher_is_better=True,
            samples=512,
            agreement=Estimate(value=0.914, standard_error=0.0124),
        ),
    )


def make_onnx(twin: str, blocks: int) -> OnnxModel:
    size_bytes = 24_312_345 + 2 * blocks * sum(rows * columns for rows, columns in KINDS.values())
    return OnnxModel(
        path=f"onnx/{twin}/model.onnx",
        dtype="float16",
        opset=20,
        sha256="d" * 64,
        size_bytes=size_bytes,
    )


def make_numerics() -> tuple[NumericsCheck, ...]:
    twins: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
    return tuple(
        NumericsCheck(
            twin=twin,
            output="last_hidden_state",
            shapes=((1, 8), (2, 32)),
            max_abs_difference=1.1e-3,
            tolerance=1e-2,
            passed=True,
        )
        for twin in twins
    )


def make_engine(twin: Literal["dense", "sparse"], device: str) -> Engine:
    return Engine(
        path=f"engines/onnxruntime/{twin}/engine.json",
        backend="onnxruntime",
        twin=twin,
        onnx=f"onnx/{twin}/model.onnx",
        onnx_sha256="d" * 64,
        device=device,
        dtype="float16",
        versions={"onnxruntime": "1.32.0"},
        size_bytes=45_612_345,
    )


def make_evidence(sparsity: tuple[TensorCheck, ...], device: str, *, gated: bool) -> EngineEvidence:
    layers = tuple(
        LayerEvidence(
            module=check.module,
            eligible=gated,
            chosen=gated,
            reason="" if gated else "no sparse kernels on CPU",
        )
        for check in sparsity
    )
    chosen = len(layers) if gated else 0
    summary = f"{chosen} of {len(layers)} layers run on sparse kernels"
    return EngineEvidence(
        backend="onnxruntime",
        device=device,
        eligible=chosen,
        chosen=chosen,
        summary=summary,
        layers=layers,
    )


def make_row(
    batch: int, base_ms: float, *, gated: bool, device: str, slowdown: float = 0.0
) -> LatencyRow:
    random = np.random.default_rng(batch)
    noise = 1 + random.gamma(2.0, 0.02, (2, 120, 1)) + (random.random((2, 120, 1)) < 0.02)
    pair = PairSamples(base_ms * noise[0], base_ms * (1 + slowdown) * noise[1])
    speedup = speedup_interval(pair)
    return LatencyRow(
        backend="onnxruntime",
        device=device,
        dtype="float16",
        batch=batch,
        sequence=128,
        dense=timing(pair.dense),
        sparse=timing(pair.sparse),
        speedup=speedup,
        limit=0.02,
        gated=gated,
        verdict=latency_verdict(speedup, 0.02) if gated else "not gated",
    )


def perplexities(
    dense: float, sparse: float, windows: int, *, spread: float = 0.05, seed: int = 0
) -> tuple[PairedMetric, PairedMetric]:
    """Perplexity as an evaluation tells it, from windows whose loss differs by `spread`."""
    random = np.random.default_rng(seed)
    losses = math.log(dense) + random.normal(0, 0.3, windows)
    losses += math.log(dense) - losses.mean()
    gaps = random.normal(0, spread, windows)
    gaps += math.log(sparse / dense) - gaps.mean()
    after = losses + gaps

    def mean(values: npt.NDArray[np.float64]) -> Estimate:
        error = float(values.std(ddof=1)) / math.sqrt(windows) if windows > 1 else 0.0
        return Estimate(value=float(values.mean()), standard_error=error)

    def power(values: npt.NDArray[np.float64]) -> Estimate:
        found = mean(values)
        return Estimate(
            value=math.exp(found.value), standard_error=math.exp(found.value) * found.standard_error
        )

    return (
        PairedMetric(
            name="perplexity",
            higher_is_better=False,
            samples=windows,
            dense=power(losses),
            sparse=power(after),
            difference=None,
        ),
        PairedMetric(
            name="log-perplexity",
            higher_is_better=False,
            samples=windows,
            dense=mean(losses),
            sparse=mean(after),
            difference=mean(gaps),
            values=tuple(after.tolist()),
        ),
    )


def with_metrics(records: Records, task: str, *metrics: Metric) -> Records:
    """A model of this task with these metrics, over as many samples as the first one says."""
    source = replace(
        records.evaluate.evaluation, samples=metrics[0].samples, tokens=512 * metrics[0].samples
    )
    return replace(
        records,
        model=replace(records.model, task=task),
        evaluate=EvaluateResult(metrics=metrics, evaluation=source, seconds=1.0),
    )


def with_layers(records: Records, layers: tuple[LayerRecord, ...]) -> Records:
    return replace(records, prune=replace(records.prune, layers=layers))


def with_budget(records: Records, max_loss: float | None, cosine: float = 0.97) -> Records:
    """Half of the layers chosen by a budget; the embeddings keep `cosine` ± 0.001."""
    pruned = [layer for layer in records.prune.layers if layer.status == "pruned"]
    alone = tuple(
        LayerSensitivity(
            name=layer.name,
            weights=math.prod(layer.shape),
            loss=Estimate(value=1e-4 * (i + 1), standard_error=2e-5),
        )
        for i, layer in enumerate(pruned)
    )
    curve = tuple(
        CurvePoint(
            layers=n,
            weights=sum(layer.weights for layer in alone[:n]),
            loss=Estimate(value=5e-4 * n**1.3, standard_error=1e-4 * n),
        )
        for n in (1, len(alone) // 2, len(alone))
    )
    budget = Sensitivity(
        metric="1 - embedding cosine",
        samples=64,
        layers=alone,
        curve=curve,
        max_loss=max_loss,
        max_layers=None,
        chosen=len(alone) // 2,
    )
    metrics = tuple(
        replace(metric, agreement=Estimate(value=cosine, standard_error=0.001))
        if isinstance(metric, DirectMetric) and metric.name == "embedding cosine"
        else metric
        for metric in records.evaluate.metrics
    )
    return replace(
        records,
        prune=replace(records.prune, sensitivity=budget),
        evaluate=replace(records.evaluate, metrics=metrics),
    )


def with_sparsity_lost(records: Records) -> Records:
    first, *rest = records.export.sparsity
    lost = replace(first, is_24=False, first_violation=(4, 0), reason="3 of 4 values are not zero")
    return replace(records, export=replace(records.export, sparsity=(lost, *rest)))


def with_numerics_failed(records: Records) -> Records:
    dense, sparse = records.export.numerics
    wrong = replace(sparse, max_abs_difference=0.5, passed=False)
    return replace(records, export=replace(records.export, numerics=(dense, wrong)))


def with_latency(records: Records, verdict: Verdict, *, gated: bool) -> Records:
    """Latencies that a limit of 2 % judges so, where they are gated."""
    speedups = {
        "pass": Interval(value=1.0, low=0.99, high=1.01),
        "inconclusive": Interval(value=0.98, low=0.95, high=1.0),
        "fail": Interval(value=0.9, low=0.89, high=0.91),
    }
    rows = tuple(
        replace(row, speedup=speedups[verdict], gated=gated) for row in records.bench.latency
    )
    return replace(records, bench=replace(records.bench, latency=rows))


def with_not_measured(records: Records, *, alone: bool) -> Records:
    """A backend that was compiled for other machines, beside the measured one or `alone`."""
    engines = tuple(
        replace(e, backend="tensorrt-rtx", device="SM86") for e in records.compile.engines
    )
    layers = tuple(
        LayerEvidence(
            module=check.module,
            eligible=None,
            chosen=None,
            reason="unknown: it chooses kernels on the GPU",
        )
        for check in records.export.sparsity
    )
    summary = "sparse kernels: unknown, it chooses kernels on the GPU"
    evidence = EngineEvidence(
        backend="tensorrt-rtx",
        device="SM86",
        eligible=None,
        chosen=None,
        summary=summary,
        layers=layers,
    )
    before = CompileResult(engines=(), evidence=(), seconds=0.0) if alone else records.compile
    missing = NotMeasured(
        backend="tensorrt-rtx", reason="engines for SM86 cannot run here; take it elsewhere."
    )
    return replace(
        records,
        compile=CompileResult(
            engines=(*before.engines, *engines), evidence=(*before.evidence, evidence), seconds=1.0
        ),
        bench=replace(
            records.bench,
            latency=() if alone else records.bench.latency,
            not_measured=(missing,),
        ),
    )


def all_skipped(records: Records) -> Records:
    layers = tuple(skipped(layer, "too small") for layer in records.prune.layers)
    return with_layers(replace(records, export=replace(records.export, sparsity=())), layers)
