"""The loss of a model against the dense one, per sample, for each task."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from prox24_deploy.core.records import Estimate
from prox24_deploy.evaluation.classes import evaluate_classes
from prox24_deploy.evaluation.losses import loss_against
from prox24_deploy.model.batch import Batch


class Classifier(nn.Module):
    """Logits that depend on the token and on one bias."""

    def __init__(self, classes: int, bias: float = 0.0, *, per_token: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, classes)
        self.shift = nn.Parameter(bias * torch.arange(1.0, classes + 1))
        self.per_token = per_token
        self.config = SimpleNamespace(num_labels=classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = self.table(input_ids) + self.shift
        return SimpleNamespace(logits=logits if self.per_token else logits.mean(1))


def batch() -> Batch:
    ids = torch.arange(24).view(4, 6)
    real = torch.ones(4, 6, dtype=torch.bool)
    real[0, 4:] = False
    return Batch({"input_ids": ids, "attention_mask": real.long()}, real)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda bias: Classifier(5, bias), "KL divergence"),
        (lambda bias: Classifier(5, bias, per_token=True), "KL divergence"),
        (lambda bias: Classifier(1, bias), "score change"),
    ],
)
@torch.no_grad()
def test_a_classifier_loses_what_its_evaluation_reports(
    make: Callable[[float], Classifier], name: str
) -> None:
    """Two ways to one figure: the metric of the report, and the loss that a budget bounds."""
    dense, moved, batches = make(0.0), make(0.3), (batch(), batch())
    loss = loss_against(dense, "text-classification", batches)
    assert loss.name == name
    assert float(loss.of(dense).abs().max()) < 1e-12
    values = loss.of(moved)
    assert len(values) == 8
    assert float(values.min()) > 0
    metrics = evaluate_classes(dense, moved, batches, lambda *_: None)
    reported = {metric.name: metric.agreement for metric in metrics}[name]
    assert isinstance(reported, Estimate)
    assert reported.value == pytest.approx(float(values.mean()), rel=1e-9)
