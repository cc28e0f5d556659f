import re
from dataclasses import replace

import pytest
from builders import make_layers, make_records, make_row, with_budget

from prox24_deploy.core.records import Estimate
from prox24_deploy.report.plots import (
    error_plots,
    latency_plot,
    nice_ticks,
    sensitivity_plot,
    split_name,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.3.attention.self.query", (3, "attention.self.query")),
        ("model.layers.12.mlp.experts.5.w1", (12, "mlp.experts.*.w1")),
        ("0.dense", (0, "dense")),
        ("pooler.dense", (None, "pooler.dense")),
        ("blocks.3", (None, "blocks.3")),
        ("block2.dense", (None, "block2.dense")),
        # More digits than Python reads.
        (f"h.{'9' * 5000}.dense", (None, f"h.{'9' * 5000}.dense")),
    ],
)
def test_layer_names_split_into_block_and_kind(name: str, expected: tuple[int, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("blocks", [1, 2, 12, 37])
def test_error_plots_hold_every_layer_once_within_the_frame(blocks: int) -> None:
    layers = make_layers(blocks)
    plots = error_plots(layers)
    assert len(plots) == 6
    marks = "".join(plots)
    for layer in layers:
        assert marks.count(f"<title>{layer.name}: ") == 1
    for x, y in re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', marks):
        assert 46 <= float(x) <= 308
        assert 44 <= float(y) <= 164


def test_error_plots_survive_extreme_errors() -> None:
    base = make_layers(1)[0]
    layers = [
        replace(base, name=f"layer.{index}.dense", relative_error=error, held_out_error=None)
        for index, error in enumerate([0.0, 1e-12, 0.1, 1.0, 250.0])
    ]
    (plot,) = error_plots(layers)
    assert plot.count("<circle") == 5
    assert "nan" not in plot
    assert len(error_plots([replace(base, relative_error=0.5, held_out_error=0.5)])) == 1
    assert error_plots([]) == []


def test_latency_plot_says_how_many_runs_lie_outside() -> None:
    row = make_row(1, 10.0, gated=True, device="GPU")
    timing = replace(row.dense, samples_ms=(*row.dense.samples_ms[1:], 500.0))
    plot = latency_plot(replace(row, dense=timing, sparse=timing), 0)
    assert re.search(r">\d+ slower</text>", plot)
    constant = replace(timing, median_ms=1.0, p90_ms=1.0, p99_ms=1.0, samples_ms=(1.0, 1.0))
    plot = latency_plot(replace(row, dense=constant, sparse=constant), 0)
    assert plot.count("<circle") == 4


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.93, 1.21) == [1.0, 1.1, 1.2]
    assert nice_ticks(0, 36, 6) == [0, 10, 20, 30]
    assert nice_ticks(0.0, 4.0) == [0, 1, 2, 3, 4]


def test_a_layer_outside_the_blocks_does_not_stretch_their_axis() -> None:
    layers = make_layers(6)
    outside = replace(layers[0], name="pooler.dense", status="skipped", relative_error=None)
    assert error_plots([*layers, outside]) == error_plots(layers)


def test_the_curve_of_a_budget_stays_in_its_frame_and_marks_what_was_chosen() -> None:
    budget = with_budget(make_records(), 0.05).prune.sensitivity
    assert budget is not None
    helped = replace(budget.curve[0], loss=Estimate(value=-0.01, standard_error=0.02))
    for found in (budget, replace(budget, curve=(helped, *budget.curve[1:]), max_loss=None)):
        plot = sensitivity_plot(found)
        assert plot.count('class="chosen"') == 1
        assert plot.count('class="p90"') == (found.max_loss is not None)
        spots = re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', plot)
        assert len(spots) == len(found.curve)
        for x, y in spots:
            assert 46 <= float(x) <= 308
            assert 12 <= float(y) <= 150
        across = [float(x) for x, _ in spots]
        assert across == sorted(across)
        assert across[-1] == 308


@pytest.mark.parametrize("errors", [(0.03, 0.031), (0.02, 1.4), (1e-7, 0.4), (0.2, 0.2)])
def test_an_axis_of_errors_has_a_title_and_three_ticks_or_more(errors: tuple[float, float]) -> None:
    first = make_layers(1)[0]
    (plot,) = error_plots([replace(first, relative_error=errors[0], held_out_error=errors[1])])
    assert ">relative squared error</text>" in plot
    ticks = re.findall(r'class="axis" text-anchor="end">([\d.e-]+)</text>', plot)
    assert 3 <= len(ticks) <= 12


def test_an_axis_never_has_fewer_than_three_ticks() -> None:
    for low, high in ((61.0, 82.0), (8.4, 9.6), (0.0, 1.0), (0.99, 1.01)):
        assert 3 <= len(nice_ticks(low, high)) <= 9
