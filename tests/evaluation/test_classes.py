"""Classifiers: opened with their head by architecture, pruned below it, compared without labels."""

from pathlib import Path

import pytest
import torch
from opened import open_tiny
from tiny_models import write_tiny_classifier
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.evaluation.classes import evaluate_classes
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.pruning.prune import prune_model


def quiet(*_: object) -> None:
    """No progress."""


class Fixed(nn.Module):
    """Gives the same logits for every batch."""

    def __init__(self, logits: list[object]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"num_labels": self.logits.shape[-1]})

    def forward(self, input_ids: Tensor) -> object:
        return type("Result", (), {"logits": self.logits})


def batch(real: list[list[bool]]) -> Batch:
    mask = torch.tensor(real)
    return Batch({"input_ids": mask.long()}, mask)


TWO_TEXTS = batch([[True, True], [True, False]])


def test_agreement_and_divergence_are_means_over_texts() -> None:
    dense, sparse = Fixed([[0.0, 1.0], [2.0, 0.0]]), Fixed([[0.0, 3.0], [0.0, 2.0]])
    agreement, divergence = evaluate_classes(dense, sparse, (TWO_TEXTS,), quiet)
    assert (agreement.name, agreement.higher_is_better, agreement.samples) == (
        "top-1 agreement", True, 2,
    )  # fmt: skip
    assert agreement.agreement is not None
    assert agreement.agreement.value == 0.5
    expected = torch.nn.functional.kl_div(
        sparse.logits.log_softmax(-1), dense.logits.log_softmax(-1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
    assert divergence.agreement is not None
    assert divergence.agreement.value == pytest.approx(float(expected))
    assert not divergence.higher_is_better


def test_values_per_text_are_kept_for_every_figure() -> None:
    dense, sparse = Fixed([[0.0, 1.0], [2.0, 0.0]]), Fixed([[0.0, 3.0], [0.0, 2.0]])
    accuracy, agreement, divergence = evaluate_classes(
        dense, sparse, (TWO_TEXTS,), quiet, torch.tensor([1, 0])
    )
    assert (accuracy.values, agreement.values) == ((1.0, 0.0), (1.0, 0.0))
    assert divergence.agreement is not None
    assert sum(divergence.values) / 2 == pytest.approx(divergence.agreement.value)
    assert divergence.values[0] != divergence.values[1]


def test_padding_counts_for_no_token() -> None:
    same, other = [[1.0, 0.0]], [[0.0, 1.0]]
    dense = Fixed([same * 2, same * 2])
    # The second text differs at its padding only, the first at one of two tokens.
    sparse = Fixed([same + other, same + other])
    agreement, _ = evaluate_classes(dense, sparse, (TWO_TEXTS,), quiet)
    assert agreement.agreement is not None
    assert agreement.agreement.value == pytest.approx((0.5 + 1.0) / 2)


def test_a_single_score_has_no_classes_to_agree_on() -> None:
    dense, sparse = Fixed([[1.0], [3.0]]), Fixed([[1.5], [2.5]])
    (change,) = evaluate_classes(dense, sparse, (TWO_TEXTS,), quiet)
    assert (change.name, change.higher_is_better) == ("score change", False)
    assert change.agreement is not None
    assert change.agreement.value == pytest.approx(0.5 / 2**0.5)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ModelDirError, match=r"A logit is NaN or infinite; check the checkpoint"):
        evaluate_classes(Fixed([[1.0, 0.0]]), Fixed([[float("nan"), 0.0]]), (TWO_TEXTS,), quiet)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("Sequence", "text-classification"), ("Token", "token-classification")],
)
def test_a_directory_with_a_head_is_opened_and_pruned_with_it(
    kind: str, task: str, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(write_tiny_classifier(tmp_path / "model", kind), prose)
    assert opened.recipe.task == task
    assert type(opened.model).__name__ == f"BertFor{kind}Classification"
    before = {name: p.clone() for name, p in opened.model.named_parameters()}
    batches = opened.batches[:1]
    state = prune_model(
        opened.model, opened.recipe, batches, batches, PruneOptions(method="magnitude"),
        stored_dtype=lambda _: torch.float32, store=BlockStore(tmp_path / "solved"),
        progress=quiet,
    )  # fmt: skip
    assert len(state.weights) == 12
    assert all(name.startswith("bert.encoder.layer.") for name in state.weights)
    changed = {n for n, p in opened.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(state.weights)
    reasons = {layer.name: layer.reason for layer in state.layers if layer.status == "skipped"}
    assert reasons["classifier"] == "not a target of recipe bert"
