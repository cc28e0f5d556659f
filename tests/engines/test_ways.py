"""The way that pays most for each layer, and what every model then gains."""

from collections.abc import Mapping

import pytest

from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Quantize
from prox24_deploy.engines.cusparselt.choice import choose
from prox24_deploy.engines.cusparselt.linear import LayerUse
from prox24_deploy.engines.cusparselt.planning import (
    LayerPlan,
    ModelTime,
    ShapePlan,
    plan_layers,
    plan_shapes,
)
from prox24_deploy.engines.cusparselt.profile import (
    GemmFormat,
    GemmShape,
    GemmTiming,
    GpuProfile,
)
from prox24_deploy.engines.cusparselt.ways import Way, cheapest, times_us, ways_of

ROWS = (16, 4096)
SHAPES = [Shape(batch=16, sequence=1, past=1024), Shape(batch=2, sequence=2048)]
# Microseconds dense and 2:4 at 16 and at 4096 rows.
Times = Mapping[GemmFormat, tuple[tuple[float, float], tuple[float, float]]]
WIDE: Times = {
    "float16": ((20.0, 16.0), (180.0, 120.0)),
    "fp8": ((13.0, 12.0), (100.0, 70.0)),
    "int8": ((25.0, 12.0), (160.0, 65.0)),
}

SHAPES = [Shape(batch=16, sequence=1), Shape(batch=2, sequence=2048)]


def timings(times: Times, size: int = 4096) -> dict[GemmFormat, tuple[GemmTiming, ...]]:
    return {
        format: tuple(
            GemmTiming(
                shape=GemmShape(n=size, k=size, m=m), format=format, dense_us=pair[0],
                sparse_us=pair[1],
            )
            for m, pair in zip(ROWS, pairs, strict=True)
        )
        for format, pairs in times.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quantize", "sparse", "expected"),
    [
        ("none", True, "float16 2:4"),
        ("none", False, "float16 dense"),
        ("fp8", True, "fp8 2:4"),
        ("fp8", False, "fp8 dense"),
        # Dense int8 loses at few rows, 2:4 int8 does not.
        ("int8", True, "int8 2:4"),
        ("int8", False, "float16 dense"),
    ],
)
def test_the_fastest_way_at_every_shape_is_taken(
    quantize: Quantize, expected: str, *, sparse: bool
) -> None:
    assert str(cheapest(timings(WIDE), "float16", quantize, sparse=sparse)) == expected


def test_accuracy_is_not_given_up_for_less_than_two_percent() -> None:
    close: Times = {
        "float16": ((20.0, 19.8), (180.0, 178.0)),
        "fp8": ((19.7, 19.5), (177.0, 175.0)),
    }
    assert str(cheapest(timings(close), "float16", "fp8", sparse=True)) == "fp8 2:4"
    close = {"float16": ((20.0, 19.8), (180.0, 178.0)), "fp8": ((19.7, 19.7), (177.0, 177.0))}
    assert str(cheapest(timings(close), "float16", "fp8", sparse=True)) == "float16 dense"


def test_a_format_that_was_not_timed_is_no_way() -> None:
    known = timings({"float16": WIDE["float16"]})
    assert ways_of(known, "float16", "fp8") == [
        Way(format="float16", sparse=False), Way(format="float16", sparse=True),
    ]  # fmt: skip
    assert times_us(known, Way(format="float16", sparse=True)) == (16.0, 120.0)


def layers(
    quantize: Quantize, over_budget: Mapping[str, str] | None = None
) -> tuple[LayerPlan, ...]:
    """Two layers that gain by everything, and one with no 8-bit kernels that gains by nothing."""
    held = timings(WIDE)
    narrow = timings({"float16": ((5.0, 6.0), (20.0, 22.0))}, 768)
    profile = GpuProfile(
        gpu="a card", driver="1", versions={}, gemms=(*held["float16"], *narrow["float16"])
    )
    uses = [
        LayerUse(
            name=name, n=size, k=size, gemms=tuple(GemmShape(n=size, k=size, m=m) for m in ROWS)
        )
        for name, size in (("first", 4096), ("second", 4096), ("narrow", 768))
    ]
    choices = choose(uses, profile, {use.name for use in uses}, "float16")
    eight: dict[str, dict[GemmFormat, tuple[GemmTiming, ...]]] = {
        name: {"fp8": held["fp8"], "int8": held["int8"]} for name in ("first", "second")
    }
    return plan_layers(choices, {}, over_budget or {}, eight, quantize)


def test_the_plan_of_a_quantised_model_says_how_each_layer_is_fastest() -> None:
    first, second, narrow = layers("fp8", {"second": "over the budget of --max-loss 0.1"})
    assert first.prune
    assert first.reason == "fastest as fp8 2:4: 1.67× at 16 rows, 2.57× at 4096 rows"
    assert {quantize: str(way) for quantize, way in first.ways.items()} == {
        "none": "float16 2:4", "fp8": "fp8 2:4", "int8": "int8 2:4",
    }  # fmt: skip
    assert first.algorithms(first.ways["fp8"]) == {16: 0, 4096: 0}
    # A layer over the budget is not pruned, and may be quantised all the same.
    assert not second.prune
    assert second.reason == "over the budget of --max-loss 0.1"
    assert str(second.ways["fp8"]) == "fp8 dense"
    assert not narrow.prune
    assert narrow.reason == "fastest as float16 dense: 1.00× at 16 rows, 1.00× at 4096 rows"
    assert list(narrow.ways) == ["none"]


def model(shape: ShapePlan, quantize: Quantize, *, sparse: bool) -> ModelTime:
    (found,) = (m for m in shape.models if (m.quantize, m.sparse) == (quantize, sparse))
    return found


def test_every_model_is_held_against_dense_16_bit_and_dense_fp8() -> None:
    planned = layers("fp8")
    few, many = plan_shapes(SHAPES, planned, [1.0, None], "fp8")
    # 45 us of 1 ms are spent in the layers, of which 2:4 fp8 leaves 29.
    assert few.linear_ms == pytest.approx(0.045)
    assert few.expected_linear_ms == pytest.approx(0.029)
    assert few.speedup == pytest.approx(1 / (1 - 0.016))
    sparse, dense = model(few, "fp8", sparse=True), model(few, "fp8", sparse=False)
    assert dense.linear_ms == pytest.approx(0.031)
    assert few.over(sparse, "fp8") == pytest.approx((1 - 0.014) / (1 - 0.016))
    assert few.over(sparse, "none") == pytest.approx(sparse.speedup)
    # Of the layers alone where the model was not timed.
    assert model(many, "none", sparse=False).speedup == 1
    assert model(many, "int8", sparse=True).speedup == pytest.approx(380 / 150)
    assert [(m.quantize, m.sparse) for m in many.models] == [
        (quantize, sparse) for quantize in ("none", "fp8", "int8") for sparse in (False, True)
    ]


def test_what_was_not_timed_is_not_compared() -> None:
    known = [layer for layer in layers("none") if layer.choice.name == "narrow"]
    (shape, _) = plan_shapes(SHAPES, known, [None, None])
    assert [m.quantize for m in shape.models] == ["none", "none"]
    assert shape.over(shape.models[0], "fp8") is None
