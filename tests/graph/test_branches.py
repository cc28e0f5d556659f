"""A model that branches on whether its activations are finite can be traced."""

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from graph_models import toy_recipe
from torch import nn

from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.export.branches import AllFinite
from prox24_deploy.graph.export.export import export_onnx


class Clamped(nn.Module):
    """Clamps what has overflowed, in Python, as the layers of BART do; (batch, 8) to (batch, 4)."""

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question
        self.dense = nn.Linear(8, 4)
        self.eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        hidden = self.dense(x)
        asked = {
            "finite": lambda: not torch.isfinite(hidden).all(),
            "positive": lambda: bool((hidden > 0).any()),
        }
        if asked[self.question]():
            hidden = hidden.clamp(-1, 1)
        return SimpleNamespace(last_hidden_state=hidden)


def test_the_branch_for_finite_values_is_what_is_exported(tmp_path: Path) -> None:
    path = export_onnx(Clamped("finite"), toy_recipe(), tmp_path / "onnx", dtype="float16")
    assert {node.op_type for node in onnx.load(path).graph.node} <= {"Gemm", "MatMul", "Add"}


def test_any_other_question_to_the_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="data-dependent"):
        export_onnx(Clamped("positive"), toy_recipe(), tmp_path / "onnx", dtype="float32")


def test_tensors_keep_their_values_within() -> None:
    bad = torch.tensor([1.0, float("inf")])
    with AllFinite():
        finite = torch.isfinite(bad)
        assert finite.tolist() == [True, False]
        assert finite.all().item() is False
        assert bool(finite.all())
        assert not bool((bad > 2).all())
    assert not bool(torch.isfinite(bad).all())
