"""A length that is not the one that is run is said to the user."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prox24_deploy.config.options import BuildOptions, EngineOptions
from prox24_deploy.core.modalities import IMAGES
from prox24_deploy.pipeline.context import ModelContext, read_context, warn_of_lengths


@pytest.fixture
def model(tiny_bert: Path) -> ModelContext:
    return read_context(tiny_bert, None, BuildOptions()).model


def said(model: ModelContext, caplog: pytest.LogCaptureFixture, *lengths: int) -> str:
    options = EngineOptions(sequences=lengths) if lengths else EngineOptions()
    warn_of_lengths(options, model)
    return caplog.text


def test_a_length_that_the_model_does_not_accept(
    model: ModelContext, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(model, config={**model.config, "max_position_embeddings": 64})
    assert said(short, caplog) == said(short, caplog, 64, 8) == ""
    assert "sequence=65,4096 is longer than the 64 tokens" in said(short, caplog, 8, 65, 4096)


def test_a_length_of_what_has_none(
    model: ModelContext, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = model.recipe
    monkeypatch.setattr(type(recipe), "modality", IMAGES)
    assert said(model, caplog) == ""
    assert "--shapes sequence has no effect on a model of images." in said(model, caplog, 8)
