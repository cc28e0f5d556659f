"""Figures that cannot be worse gate nothing; those that can do."""

from dataclasses import replace

import pytest
from builders import all_skipped, make_records

from prox24_deploy.config.limits import GivenLimits, MetricLimits
from prox24_deploy.regression.baseline import Baseline
from prox24_deploy.regression.compare import compare_reports
from prox24_deploy.report.schema import Change, Comparison, Report


def with_files(report: Report, **sizes: int) -> Report:
    files = {name.replace("__", "/").replace("_json", ".json"): n for name, n in sizes.items()}
    files = {f"engines/onnxruntime/sparse/{name}": size for name, size in files.items()}
    sizes_of = report.sizes.model_copy(update={"files": files})
    return report.model_copy(update={"sizes": sizes_of})


def change_of(found: Comparison, name: str) -> Change:
    return next(change for change in found.changes if change.name == name)


def compared(new: Report, old: Report, **limits: float) -> Comparison:
    given = GivenLimits()
    if limits:
        table = {"size/engine*": MetricLimits.model_validate({"threshold": limits["threshold"]})}
        given = GivenLimits(source="limits.toml", metrics=table)
    return compare_reports(new, Baseline(source="before", report=old), limits=given)


def test_the_record_of_an_engine_that_is_the_onnx_file_gates_nothing() -> None:
    report = make_records().report()
    name = "size/engine onnxruntime"
    small, large = (with_files(report, engine_json=size) for size in (297, 400))
    change = change_of(compared(large, small), name)
    assert (change.verdict, change.before, change.after) == ("not gated", 297, 400)
    assert change_of(compared(large, small, threshold=300.0), name).verdict == "fail"
    with_plan = [with_files(report, engine_json=297, plan=size) for size in (10_000, 20_000)]
    assert change_of(compared(with_plan[1], with_plan[0]), name).verdict == "fail"
    assert change_of(compared(with_plan[0], with_plan[0]), name).verdict == "pass"


def test_none_of_none_gates_nothing_and_none_of_some_fails() -> None:
    some, none = make_records().report(), all_skipped(make_records()).report()
    same = compared(none, none)
    for name in ("layers/pruned", "layers/proven", "kernels/onnxruntime"):
        assert change_of(same, name).verdict == "not gated", name
    lost = compared(none, some)
    assert change_of(lost, "layers/proven").verdict == "fail"
    assert change_of(lost, "layers/pruned").verdict == "fail"
    gated = make_records(gated=True).report()
    (evidence,) = gated.sparsity.engines
    sparsity = gated.sparsity.model_copy(update={"engines": (replace(evidence, chosen=0),)})
    without = gated.model_copy(update={"sparsity": sparsity})
    assert change_of(compared(without, gated), "kernels/onnxruntime").verdict == "fail"


@pytest.mark.parametrize("samples", [1, 2])
def test_fewer_than_three_samples_decide_nothing_against_a_baseline_either(samples: int) -> None:
    report = make_records().report()

    def few(value: float) -> Report:
        metric = next(m for m in report.accuracy.metrics if m.name == "embedding cosine")
        assert metric.agreement is not None
        made = replace(
            metric,
            samples=samples,
            agreement=replace(metric.agreement, value=value, standard_error=0.0),
            values=(value,) * samples,
        )
        accuracy = report.accuracy.model_copy(update={"metrics": (made,)})
        return report.model_copy(update={"accuracy": accuracy})

    for after in (0.97, 0.5):
        change = change_of(compared(few(after), few(0.97)), "embedding cosine")
        assert change.verdict == "inconclusive"
        assert "fewer than 3 samples decide nothing" in change.message
