"""What 2:4 and 8 bits would gain on one GPU: layer by layer, and for the model as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import Estimate
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType, Quantize
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.plan_file import read_record
from prox24_deploy.engines.cusparselt.profile import GemmFormat, GemmTiming, GpuProfile
from prox24_deploy.engines.cusparselt.ways import EIGHT_BITS, Way, cheapest, times_us

SCHEMA_VERSION = 3

# By layer and 8-bit format the timings of its GEMM in each input shape.
EightBitTimings = Mapping[str, Mapping[GemmFormat, tuple[GemmTiming, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer: whether to prune it, what that costs and what it gains.

    `loss` is the rise of the model's loss when this layer alone is pruned, None where it was not
    measured. The times of the layer's GEMM in 16 bit are in `choice`, those in 8 bit in
    `eight_bit`. `ways` has the cheapest way in a model of each quantisation that was timed; it is
    empty where the layer has no times.
    """

    choice: LayerChoice
    loss: Estimate | None
    prune: bool
    reason: str
    eight_bit: dict[GemmFormat, tuple[GemmTiming, ...]] = field(default_factory=dict)
    ways: dict[Quantize, Way] = field(default_factory=dict)

    @property
    def timings(self) -> dict[GemmFormat, tuple[GemmTiming, ...]]:
        """By format the timings of the layer's GEMM in each input shape."""
        own = self.choice.timings
        return {own[0].format: own, **self.eight_bit} if own else {}

    @property
    def known_ways(self) -> tuple[Way, ...]:
        """The ways that were timed besides dense 16 bit."""
        return tuple(
            Way(format=format, sparse=sparse)
            for format in self.timings
            for sparse in (False, True)
            if sparse or format in self.eight_bit
        )

    def algorithms(self, way: Way) -> dict[int, int]:
        """Number of the fastest algorithm of a 2:4 way by rows of activations."""
        return {timing.shape.m: timing.algorithm for timing in self.timings[way.format]}

    def gains(self, way: Way) -> tuple[float, ...]:
        """Speed-up of a way over dense 16 bit in each input shape."""
        taken = times_us(self.timings, way)
        return tuple(t.dense_us / us for t, us in zip(self.choice.timings, taken, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTime:
    """One model at one input shape: quantised or not, 2:4 where that pays or dense.

    `linear_ms` is the time of all layers that were looked at, `speedup` that of the dense 16-bit
    model over the expected time, as in `ShapePlan`.
    """

    quantize: Quantize
    sparse: bool
    linear_ms: float
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """One input shape.

    `dense_ms` is the measured time of the dense model, None without its GPU. `linear_ms` and
    `expected_linear_ms` are those of all layers that were looked at, before and after pruning.
    `speedup` is dense over expected time: of the whole model where `dense_ms` is known, else of
    these layers alone, which bounds it from above. `models` compares every model that was timed.
    """

    batch: int
    sequence: int
    dense_ms: float | None
    linear_ms: float
    expected_linear_ms: float
    speedup: float
    past: int = 0
    models: tuple[ModelTime, ...] = ()

    @property
    def shape(self) -> Shape:
        """Batch, new tokens and those before them."""
        return Shape(batch=self.batch, sequence=self.sequence, past=self.past)

    def over(self, model: ModelTime, quantize: Quantize) -> float | None:
        """Speed-up of a model over the dense one of a quantisation; None if that was not timed."""
        found = (m for m in self.models if m.quantize == quantize and not m.sparse)
        dense = next(found, None)
        return None if dense is None else model.speedup / dense.speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which layers of a model to prune for one GPU.

    `source` says whether times were measured on the GPU at hand or come from a saved profile.
    `metric` names the loss of the layers, "" where it was not measured. `dtype` is that of the
    model, `quantize` the 8-bit format that layers may use besides.
    """

    model_sha256: str
    dtype: DType
    source: Literal["measured", "profile"]
    metric: str
    shapes: tuple[ShapePlan, ...]
    layers: tuple[LayerPlan, ...]
    profile: GpuProfile
    quantize: Quantize = "none"
    schema_version: int = SCHEMA_VERSION

    @property
    def left_dense(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of each layer that is not to be pruned."""
        return tuple(
            (layer.choice.name, f"planned dense, {layer.reason}")
            for layer in self.layers
            if not layer.prune
        )


def plan_layers(
    choices: Sequence[LayerChoice],
    losses: Mapping[str, Estimate],
    over_budget: Mapping[str, str],
    eight_bit: EightBitTimings | None = None,
    quantize: Quantize = "none",
) -> tuple[LayerPlan, ...]:
    """For each layer the cheapest way within the budget.

    Args:
        choices: of the layers in 16 bit.
        losses: what pruning a layer costs, where known.
        over_budget: layers that may not be 2:4, or are not, and why.
        eight_bit: timings of the layers in 8 bit.
        quantize: the format that layers may use.
    """
    return tuple(
        _plan_layer(
            choice,
            losses.get(choice.name),
            over_budget.get(choice.name, ""),
            dict((eight_bit or {}).get(choice.name, {})),
            quantize,
        )
        for choice in choices
    )


def _plan_layer(
    choice: LayerChoice,
    loss: Estimate | None,
    over_budget: str,
    eight_bit: dict[GemmFormat, tuple[GemmTiming, ...]],
    quantize: Quantize,
) -> LayerPlan:
    ways: dict[Quantize, Way] = {}
    if choice.timings:
        half = choice.timings[0].format
        timings = {half: choice.timings, **eight_bit}
        kinds: list[Quantize] = ["none", *(kind for kind in EIGHT_BITS if kind in eight_bit)]
        ways = {kind: cheapest(timings, half, kind, sparse=not over_budget) for kind in kinds}
    # An 8-bit model has layers that have no 8-bit kernels.
    way = ways.get(quantize, ways.get("none"))
    layer = LayerPlan(
        choice=choice,
        loss=loss,
        prune=bool(way and way.sparse),
        reason=over_budget or choice.reason,
        eight_bit=eight_bit,
        ways=ways,
    )
    if over_budget or way is None or quantize == "none":
        return layer
    rows = [timing.shape.m for timing in choice.timings]
    gains = zip(layer.gains(way), rows, strict=True)
    said = ", ".join(f"{gain:.2f}× at {m} rows" for gain, m in gains)
    return replace(layer, reason=f"fastest as {way}: {said}")


def plan_shapes(
    shapes: Sequence[Shape],
    layers: Sequence[LayerPlan],
    dense_ms: Sequence[float | None],
    quantize: Quantize = "none",
) -> tuple[ShapePlan, ...]:
    """Expected times: what layers save is taken off the time of the dense model."""
    plans = []
    for i, (shape, whole) in enumerate(zip(shapes, dense_ms, strict=True)):
        models = _models(layers, i, whole)
        own = next(model for model in models if model.quantize == quantize and model.sparse)
        plans.append(
            ShapePlan(
                batch=shape.batch,
                sequence=shape.sequence,
                past=shape.past,
                dense_ms=whole,
                linear_ms=models[0].linear_ms,
                expected_linear_ms=own.linear_ms,
                speedup=own.speedup,
                models=models,
            )
        )
    return tuple(plans)


def _models(layers: Sequence[LayerPlan], i: int, whole: float | None) -> tuple[ModelTime, ...]:
    """Every model that was timed, at input shape number `i`; the dense 16-bit one is first."""
    timed = [layer for layer in layers if layer.ways]
    kinds: list[Quantize] = ["none"]
    kinds += [kind for kind in EIGHT_BITS if any(kind in layer.ways for layer in timed)]
    before = sum(layer.choice.timings[i].dense_us for layer in timed) / 1e3
    base = before if whole is None else whole
    found = []
    for kind in kinds:
        for sparse in (False, True):
            ways = [(layer, _way(layer, kind, sparse=sparse)) for layer in timed]
            taken = sum(times_us(layer.timings, way)[i] for layer, way in ways) / 1e3
            speedup = base / (base - before + taken) if base else 1.0
            found.append(ModelTime(quantize=kind, sparse=sparse, linear_ms=taken, speedup=speedup))
    return tuple(found)


def _way(layer: LayerPlan, quantize: Quantize, *, sparse: bool) -> Way:
    """How a layer runs in a model: the cheapest way, or dense in the format of the model."""
    half = layer.choice.timings[0].format
    if sparse:
        return layer.ways.get(quantize, layer.ways["none"])
    return cheapest(layer.timings, half, quantize, sparse=False)


_RECORD = TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """Read what `plan -o` wrote.

    Raises:
        UsageError: the file cannot be read, is no plan of this version, or prunes nothing.
    """
    plan = read_record(
        _RECORD,
        path,
        f"Plan {path}",
        SCHEMA_VERSION,
        missing="write one with plan -o",
        again="plan -o",
    )
    if not any(layer.prune for layer in plan.layers):
        raise UsageError(
            f"Plan {path} prunes no layer, because 2:4 does not pay on {plan.profile.gpu} at the "
            "planned shapes; build without --plan to prune all the same."
        )
    return plan


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan atomically."""
    write_atomic(path, _RECORD.dump_json(plan, indent=1) + b"\n")


def plan_json(plan: Plan) -> object:
    """The plan as JSON values."""
    return _RECORD.dump_python(plan, mode="json")
