"""Of processes that were given different things, the first and what it has is named."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from prox24_deploy.config.options import PruneOptions, TextOptions
from prox24_deploy.core.errors import RankError
from prox24_deploy.pipeline.alike import require_alike
from prox24_deploy.pruning.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Inputs:
    source: dict[str, str] = field(default_factory=lambda: {"model.safetensors": "0" * 64})
    calibration: dict[str, Any] = field(default_factory=lambda: {"tensors": "1" * 64})
    options: PruneOptions = field(default_factory=PruneOptions)
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=lambda: {"torch": "2.13.0"})


@dataclass(frozen=True)
class OfThreads(Ranks):
    """Stands in for a process: one of several threads that tell each other what they have."""

    table: list[Any] = field(default_factory=list)
    all_here: Barrier = field(default_factory=lambda: Barrier(1))

    def of_all(self, value: Any) -> list[Any]:
        self.table[self.number] = value
        self.all_here.wait(10)
        found = list(self.table)
        self.all_here.wait(10)
        return found


def refusals(*given: tuple[Inputs, TextOptions]) -> list[str]:
    """What each of several processes is told; "" for one that is not refused."""
    table, all_here = [None] * len(given), Barrier(len(given))

    def refusal(number: int) -> str:
        own = OfThreads(number, len(given), torch.device("cpu"), 1, table, all_here)
        try:
            require_alike(given[number][0], given[number][1], own)
        except RankError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(given)) as threads:
        return list(threads.map(refusal, range(len(given))))


OTHER_TEXT = {"tensors": "2" * 64}
TEXT = TextOptions(calibration=(Path("a.txt"),))


@pytest.mark.parametrize(
    ("change", "text", "said"),
    [
        ({"options": PruneOptions(method="ista")}, TEXT, "--method ista, and process 0 has prox"),
        ({"options": PruneOptions(max_layers=3)}, TEXT, "--layers 3, and process 0 has none"),
        ({"device": "cuda"}, TEXT, "device cuda, and process 0 has cpu"),
        ({"versions": {"torch": "2.11.0"}}, TEXT, "torch 2.11.0, and process 0 has 2.13.0"),
        (
            {"source": {"model.safetensors": "3" * 64}}, TEXT,
            "another model file model.safetensors than process 0",
        ),
        (
            {"calibration": OTHER_TEXT}, replace(TEXT, calibration=(Path("b.txt"),), seed=1),
            "--seed 1, and process 0 has 0",
        ),
        (
            {"calibration": OTHER_TEXT}, replace(TEXT, calibration=(Path("b.txt"),)),
            '--calibration ["b.txt"], and process 0 has ["a.txt"]',
        ),
        ({"calibration": OTHER_TEXT}, TEXT, "another calibration tensors than process 0"),
    ],
)  # fmt: skip
def test_what_differs_is_named(change: dict[str, Any], text: TextOptions, said: str) -> None:
    same = Inputs(), TEXT
    expected = (
        f"Process 2 of this run has {said}; start all with the same command, the same files and "
        "the same versions of everything installed."
    )
    assert refusals(same, same, (replace(same[0], **change), text)) == [expected] * 3


def test_text_of_other_options_may_be_the_same() -> None:
    assert refusals((Inputs(), TEXT), (Inputs(), replace(TEXT, seed=1))) == ["", ""]
