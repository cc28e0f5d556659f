"""Equal rows of one batch, through models that treat them alike and through one that does not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prox24_deploy.core.accuracy import RowsCheck
from prox24_deploy.core.types import DType
from prox24_deploy.evaluation.equal_rows import equal_rows
from prox24_deploy.model.batch import Batch

BATCH = Batch(
    {"input_ids": torch.tensor([[5, 2, 7], [1, 1, 1]])}, torch.ones(2, 3, dtype=torch.bool)
)


class Drifting(nn.Module):
    """Says of each token three times its number, and `drift` more in each further row."""

    def __init__(self, drift: float) -> None:
        super().__init__()
        self.drift = drift
        self.seen: list[Tensor] = []

    def forward(self, **inputs: Any) -> SimpleNamespace:
        ids = inputs["input_ids"]
        self.seen.append(ids)
        late = torch.arange(len(ids))[:, None] * self.drift
        return SimpleNamespace(logits=3.0 * ids - late, nothing=torch.zeros(len(ids)), note="none")


def test_the_first_sample_fills_the_batch_and_equal_rows_pass() -> None:
    model = Drifting(0.0)
    found = equal_rows(model, BATCH, rows=4, dtype="float16", twin="sparse")
    assert found == RowsCheck(twin="sparse", rows=4, difference=0.0, tolerance=1e-2, passed=True)
    assert model.seen[0].tolist() == [[5, 2, 7]] * 4


@pytest.mark.parametrize(
    ("drift", "dtype", "passed"),
    [
        (0.003, "float32", True),
        (0.02, "float32", False),
        (0.02, "float16", True),
        (0.2, "float16", False),
        (0.2, "bfloat16", True),
        (1.0, "bfloat16", False),
    ],
)
def test_rounding_is_tolerated_by_dtype_and_no_more(
    drift: float, dtype: DType, *, passed: bool
) -> None:
    found = equal_rows(Drifting(drift), BATCH, rows=4, dtype=dtype, twin="dense")
    # Three rows after the first, of at most 3 × 7.
    assert found.difference == pytest.approx(3 * drift / 21, rel=1e-3)
    assert found.passed is passed
