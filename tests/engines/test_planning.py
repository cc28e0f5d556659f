"""Which layers pay, and what the whole model gains."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prox24_deploy.core.errors import EngineError, UsageError
from prox24_deploy.core.records import Estimate
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt.backend import explain
from prox24_deploy.engines.cusparselt.choice import choose
from prox24_deploy.engines.cusparselt.linear import (
    LayerUse,
    layer_uses,
    replace_layers,
    two_four_layers,
)
from prox24_deploy.engines.cusparselt.planning import (
    Plan,
    plan_layers,
    plan_shapes,
    read_plan,
    write_plan,
)
from prox24_deploy.engines.cusparselt.profile import GemmShape, GemmTiming, GpuProfile

# Microseconds dense and sparse of three layers at 128 and 1024 rows.
TIMES = {
    "wide": [(100.0, 60.0), (800.0, 500.0)],
    "narrow": [(5.0, 6.0), (20.0, 22.0)],
    "mixed": [(10.0, 11.0), (80.0, 40.0)],
}
SHAPES = [Shape(batch=1, sequence=128), Shape(batch=8, sequence=128)]
SIZES = {"wide": 4096, "narrow": 768, "mixed": 2048}


def profile() -> GpuProfile:
    timings = [
        GemmTiming(
            shape=GemmShape(n=SIZES[name], k=SIZES[name], m=m), dense_us=pair[0], sparse_us=pair[1]
        )
        for name, pairs in TIMES.items()
        for m, pair in zip((128, 1024), pairs, strict=True)
    ]
    return GpuProfile(gpu="a card", driver="1.0", versions={}, gemms=tuple(timings))


def uses() -> list[LayerUse]:
    return [
        LayerUse(
            name=name,
            n=size,
            k=size,
            gemms=tuple(GemmShape(n=size, k=size, m=m) for m in (128, 1024)),
        )
        for name, size in SIZES.items()
    ]


def test_a_layer_is_chosen_where_it_wins_at_every_shape() -> None:
    wide, narrow, mixed = choose(uses(), profile(), set(SIZES), "float16")
    assert wide.chosen
    assert wide.reason == "timed faster: 1.67× at 128 rows, 1.60× at 1024 rows"
    assert not narrow.chosen
    assert narrow.eligible
    assert narrow.reason == "timed slower: 0.83× at 128 rows, 0.91× at 1024 rows"
    # Twice as fast at one shape does not excuse a tenth slower at another.
    assert not mixed.chosen


def test_what_cannot_run_sparse_has_a_reason_and_no_timings() -> None:
    odd = LayerUse(name="odd", n=4096, k=40, gemms=(GemmShape(n=4096, k=40, m=128),))
    convolution = LayerUse(name="convolution", n=64, k=64, gemms=())
    dense = replace(uses()[0], name="dense")
    found = choose([odd, convolution, dense], profile(), {"odd", "convolution"}, "float16")
    assert [choice.reason for choice in found] == [
        "shape rule: K = 40 is not a multiple of 16",
        "a convolution, and cuSPARSELt multiplies matrices only",
        "not 2:4",
    ]
    assert not any(choice.eligible or choice.chosen for choice in found)


def test_an_estimate_is_said_to_be_one() -> None:
    other = LayerUse(name="other", n=4096, k=4096, gemms=(GemmShape(n=4096, k=4096, m=256),))
    (found,) = choose([other], profile(), {"other"}, "float16")
    assert found.reason.startswith("estimated faster: 1.")


def test_what_pays_is_pruned_within_the_budget() -> None:
    choices = choose(uses(), profile(), set(SIZES), "float16")
    losses = {"wide": Estimate(value=0.1, standard_error=0.01)}
    wide, narrow, _ = plan_layers(choices, losses, {})
    assert wide.prune
    assert wide.loss == Estimate(value=0.1, standard_error=0.01)
    assert not narrow.prune
    assert narrow.loss is None
    (wide, *_) = plan_layers(choices, losses, {"wide": "over the budget of --layers 1"})
    assert not wide.prune
    assert wide.reason == "over the budget of --layers 1"


def test_the_expected_time_is_that_of_the_dense_model_less_what_pruned_layers_save() -> None:
    layers = plan_layers(choose(uses(), profile(), set(SIZES), "float16"), {}, {})
    small, large = plan_shapes(SHAPES, layers, [1.0, None])
    assert small.linear_ms == pytest.approx(0.115)
    assert small.expected_linear_ms == pytest.approx(0.075)
    assert small.speedup == pytest.approx(1.0 / (1.0 - 0.04))
    # Without a measured model the layers stand alone: an upper bound.
    assert large.speedup == pytest.approx(0.9 / 0.6)


def plan(*, prune: bool = True) -> Plan:
    layers = plan_layers(choose(uses(), profile(), set(SIZES), "float16"), {}, {})
    kept = tuple(replace(layer, prune=layer.prune and prune) for layer in layers)
    shapes = plan_shapes(SHAPES, layers, [1.0, 2.0])
    return Plan(
        model_sha256="0" * 64,
        dtype="float16",
        source="measured",
        metric="log-perplexity",
        shapes=shapes,
        layers=kept,
        profile=profile(),
    )


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    write_plan(plan(), tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan()
    assert plan().left_dense[0] == (
        "narrow",
        "planned dense, timed slower: 0.83× at 128 rows, 0.91× at 1024 rows",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("[]", "is damaged at its start"), ("{", "is not readable JSON")],
)
def test_an_unreadable_plan_says_what_to_do(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=f"{message}.*plan -o"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_that_prunes_nothing_or_is_of_another_version_is_refused(tmp_path: Path) -> None:
    write_plan(plan(prune=False), tmp_path / "plan.json")
    with pytest.raises(UsageError, match="prunes no layer, because 2:4 does not pay on a card"):
        read_plan(tmp_path / "plan.json")
    write_plan(replace(plan(), schema_version=9), tmp_path / "plan.json")
    with pytest.raises(UsageError, match="has schema version 9, expected 3"):
        read_plan(tmp_path / "plan.json")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 16)
        self.second = Conv1D(32, 16)
        self.patches = nn.Conv2d(4, 8, 2)
        self.pooler = nn.Linear(32, 32)
        self.unused = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.patches(torch.zeros(1, 4, 4, 4))
        out: torch.Tensor = self.pooler(self.second(self.first(hidden))[:, 0])
        return out


def test_the_gemm_of_each_layer_is_noted_at_each_shape() -> None:
    model = Model()
    runs = [lambda b=b, s=s: model(torch.zeros(b, s, 32)) for b, s in ((1, 8), (2, 16))]
    found = {use.name: use for use in layer_uses(model, runs)}
    assert found["first"].gemms == (GemmShape(n=16, k=32, m=8), GemmShape(n=16, k=32, m=32))
    assert found["second"].gemms == (GemmShape(n=32, k=16, m=8), GemmShape(n=32, k=16, m=32))
    assert found["pooler"].gemms == (GemmShape(n=32, k=32, m=1), GemmShape(n=32, k=32, m=2))
    assert found["patches"].gemms == ()
    assert "unused" not in found
    assert not model.first._forward_pre_hooks


def test_two_four_layers_are_found_along_the_reduction_axis() -> None:
    model = Model()
    with torch.no_grad():
        model.first.weight.view(16, 8, 4)[..., 2:] = 0
        model.second.weight.view(4, 4, 32)[:, 2:] = 0
        model.pooler.weight.view(8, 4, 32)[:, 2:] = 0  # the wrong axis
    assert two_four_layers(model) == {"first", "second"}


def test_a_layer_that_gains_too_little_is_not_called_slower() -> None:
    gemms = [
        GemmTiming(shape=GemmShape(n=64, k=64, m=m), dense_us=1.01, sparse_us=1.0) for m in (16, 32)
    ]
    little = GpuProfile(gpu="a card", driver="1.0", versions={}, gemms=tuple(gemms))
    use = replace(uses()[0], n=64, k=64, gemms=tuple(gemm.shape for gemm in gemms))
    (found,) = choose([use], little, {use.name}, "float16")
    assert (found.chosen, found.reason) == (
        False, "timed hardly faster: 1.01× at 16 rows, 1.01× at 32 rows",
    )  # fmt: skip


def test_a_dense_weight_is_not_compressed() -> None:
    with pytest.raises(EngineError, match="Layer first is not 2:4"):
        replace_layers(Model(), {"first": {}})


def test_evidence_says_what_the_profiler_saw_and_where_that_is_not_what_was_chosen() -> None:
    choices = choose(uses(), profile(), set(SIZES), "float16")
    sparse, dense = "sm90_xmma_sparse_gemm_f16f16", "nvjet_hsh_128x256"
    wide, narrow, mixed = explain(choices, {"wide": [sparse], "narrow": [dense], "mixed": [dense]})
    assert (wide.eligible, wide.chosen) == (True, True)
    assert wide.reason.endswith(f"; kernel {sparse}")
    assert (narrow.eligible, narrow.chosen) == (True, False)
    assert narrow.reason.startswith("timed slower")
    assert not mixed.chosen
    wide, narrow, mixed = explain(
        choices, {"wide": [dense], "narrow": [sparse, dense], "mixed": []}
    )
    assert not wide.chosen
    assert wide.reason.startswith("unexpected: timed faster")
    assert wide.reason.endswith(f"but the profiler saw only {dense}")
    assert narrow.chosen
    assert narrow.reason.endswith("but the profiler saw a sparse kernel")
    assert mixed.reason.startswith("timed slower")
