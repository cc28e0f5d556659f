"""The two kinds of metric, in memory and in files."""

import json

from pydantic import TypeAdapter

from prox24_deploy.core.records import DirectMetric, Estimate, Metric, PairedMetric

ONE, OTHER = (Estimate(value=value, standard_error=0.1) for value in (2.0, 3.0))
PAIRED = PairedMetric(
    name="perplexity",
    higher_is_better=False,
    samples=4,
    dense=ONE,
    sparse=OTHER,
    difference=None,
    values=(3.0,),
)
DIRECT = DirectMetric(name="embedding cosine", higher_is_better=True, samples=4, agreement=ONE)
ADAPTER: TypeAdapter[tuple[Metric, ...]] = TypeAdapter(tuple[Metric, ...])


def test_each_kind_tells_its_figure_and_its_change() -> None:
    assert (PAIRED.estimate, PAIRED.change) == (OTHER, None)
    assert (DIRECT.estimate, DIRECT.change) == (ONE, ONE)


def test_both_kinds_have_the_same_keys_in_files_and_are_read_as_what_they_were() -> None:
    text = ADAPTER.dump_json((PAIRED, DIRECT))
    rows = json.loads(text)
    assert [list(row) for row in rows] == 2 * [
        ["name", "higher_is_better", "samples", "dense", "sparse", "difference", "agreement",
         "values"]
    ]  # fmt: skip
    assert (rows[0]["agreement"], rows[1]["dense"], rows[1]["sparse"]) == (None, None, None)
    assert ADAPTER.validate_json(text) == (PAIRED, DIRECT)
