"""What 2:4 would gain on one GPU: layer by layer, and for the model as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from prox24_deploy.core.atomic import write_atomic
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.records import Estimate
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import DType
from prox24_deploy.engines.cusparselt.choice import LayerChoice
from prox24_deploy.engines.cusparselt.plan_file import read_record
from prox24_deploy.engines.cusparselt.profile import GpuProfile

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer: whether to prune it, what that costs and what it gains.

    `loss` is the rise of the model's loss when this layer alone is pruned, None where it was not
    measured. The times of the layer's GEMM are in `choice`.
    """

    choice: LayerChoice
    loss: Estimate | None
    prune: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePlan:
    """One input shape.

    `dense_ms` is the measured time of the dense model, None without its GPU. `linear_ms` and
    `expected_linear_ms` are those of all layers that were looked at, before and after pruning.
    `speedup` is dense over expected time: of the whole model where `dense_ms` is known, else of
    these layers alone, which bounds it from above.
    """

    batch: int
    sequence: int
    dense_ms: float | None
    linear_ms: float
    expected_linear_ms: float
    speedup: float
    past: int = 0

    @property
    def shape(self) -> Shape:
        """Batch, new tokens and those before them."""
        return Shape(batch=self.batch, sequence=self.sequence, past=self.past)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which layers of a model to prune for one GPU.

    `source` says whether times were measured on the GPU at hand or come from a saved profile.
    `metric` names the loss of the layers, "" where it was not measured.
    """

    model_sha256: str
    source: Literal["measured", "profile"]
    metric: str
    shapes: tuple[ShapePlan, ...]
    layers: tuple[LayerPlan, ...]
    profile: GpuProfile
    schema_version: int = SCHEMA_VERSION

    @property
    def dtype(self) -> DType:
        """Of the engines that the plan is for."""
        return self.profile.dtype

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
) -> tuple[LayerPlan, ...]:
    """Prune what pays and is within the budget."""
    plans = []
    for choice in choices:
        reason = choice.reason
        if choice.chosen and choice.name in over_budget:
            reason = over_budget[choice.name]
        prune = choice.chosen and choice.name not in over_budget
        plans.append(
            LayerPlan(choice=choice, loss=losses.get(choice.name), prune=prune, reason=reason)
        )
    return tuple(plans)


def plan_shapes(
    shapes: Sequence[Shape],
    layers: Sequence[LayerPlan],
    dense_ms: Sequence[float | None],
) -> tuple[ShapePlan, ...]:
    """Expected times: what pruned layers save is taken off the time of the dense model."""
    plans = []
    for i, (shape, whole) in enumerate(zip(shapes, dense_ms, strict=True)):
        timed = [(layer, layer.choice.timings[i]) for layer in layers if layer.choice.timings]
        before = sum(timing.dense_us for _, timing in timed) / 1e3
        after = sum(t.sparse_us if layer.prune else t.dense_us for layer, t in timed) / 1e3
        base = before if whole is None else whole
        speedup = base / (base - before + after) if base else 1.0
        plans.append(
            ShapePlan(
                batch=shape.batch,
                sequence=shape.sequence,
                past=shape.past,
                dense_ms=whole,
                linear_ms=before,
                expected_linear_ms=after,
                speedup=speedup,
            )
        )
    return tuple(plans)


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
