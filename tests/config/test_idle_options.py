"""Options that have no effect together are named, and no others."""

from pathlib import Path
from typing import Any

import pytest

from prox24_deploy.config.options import PruneOptions


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"method": "none", "preset": "fast", "reconstruct": True, "include": ("*.q",)},
            "--preset, --reconstruct, --include have no effect with --method none.",
        ),
        ({"method": "none", "max_layers": 3}, "--layers has no effect with --method none."),
        ({"method": "wanda", "preset": "fast"}, "--preset fast has no effect with --method wanda"),
        ({"mask": Path("masks"), "preset": "fast"}, "--preset fast has no effect with --mask"),
    ],
)
def test_what_has_no_effect_is_named(asked: dict[str, Any], said: str) -> None:
    assert PruneOptions(**asked).idle(overridden=False).startswith(said)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"method": "none"},
        {"preset": "fast"},
        {"method": "wanda", "preset": "best"},
        {"method": "wanda", "preset": "fast", "reconstruct": True},
        {"mask": Path("masks"), "target": "symmetric"},
    ],
)
def test_what_has_an_effect_is_not(asked: dict[str, Any]) -> None:
    assert PruneOptions(**asked).idle(overridden=False) == ""


def test_a_recipe_may_prune_some_layers_by_the_prox() -> None:
    assert PruneOptions(method="wanda", preset="fast").idle(overridden=True) == ""
