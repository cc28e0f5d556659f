"""What an engine answered is given again without it, bit for bit."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from prox24_deploy.config.recipe import TensorSpec
from prox24_deploy.engines.base import Array, Feeds
from prox24_deploy.engines.engine_model import EngineModel, Graph
from prox24_deploy.engines.recorded import Recorded

IDS = TensorSpec(name="input_ids", dtype="int64", axes=["batch", "sequence"])


@dataclass
class Drifting:
    """Gives another answer each time, as no engine should."""

    answers: list[Array] = field(default_factory=list)

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        self.answers.append(np.random.default_rng(len(self.answers)).standard_normal((2, 3)))
        return {"logits": self.answers[-1], "embeds": -self.answers[-1]}


def recorded(folder: Path) -> tuple[Recorded, Drifting]:
    engine = Drifting()
    graph = Graph(runs=engine, inputs=(IDS,), dtype="float32", source="engine")
    return Recorded(EngineModel([graph], {"a": 1}), folder / "answers"), engine


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    model, engine = recorded(tmp_path)
    ids = torch.arange(6).view(2, 3)
    first = model(input_ids=ids)
    again = model(input_ids=ids.clone(), use_cache=False), model(input_ids=ids, use_cache=False)
    assert len(engine.answers) == 2
    assert torch.equal(again[0].logits, again[1].logits)
    assert not torch.equal(first.logits, again[0].logits)
    for answer in (first, model(input_ids=ids)):
        assert np.array_equal(answer.logits, engine.answers[0].astype(np.float32))
        assert torch.equal(answer.embeds, -answer.logits)
    assert model.config == {"a": 1}
    assert next(model.parameters()).device == torch.device("cpu")


@pytest.mark.parametrize(
    "other", [torch.arange(6).view(3, 2), torch.ones(2, 3).long(), torch.arange(6).view(2, 3).int()]
)
def test_another_question_is_another(other: torch.Tensor, tmp_path: Path) -> None:
    model, engine = recorded(tmp_path)
    model(input_ids=torch.arange(6).view(2, 3))
    model(input_ids=other)
    assert len(engine.answers) == 2
