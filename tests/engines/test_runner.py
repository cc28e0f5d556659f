"""What an engine runs of a model gives what the model gives, padded or not."""

from typing import Any

import numpy as np
import pytest
import torch
from family_batches import recipe_of
from tiny_families import FAMILIES, tiny_model
from torch import Tensor, nn

from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.attention import use_fast_attention
from prox24_deploy.engines.cusparselt.runner import padded
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, as_engine

SHAPE = Shape(batch=2, sequence=5)
# Their positions come as a bias of the attention, or hide what is far away: a mask without padding.
BIASED = {"modernbert", "modernbert, text classes", "t5, encoder", "t5, gated encoder"}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")


def opened(family: str) -> TorchModel:
    """In float32, so that no rounding hides a fault."""
    model = tiny_model(family).eval().requires_grad_(requires_grad=False)
    return TorchModel(as_engine(model, recipe_of(model)), "float32", 90)


def opened_or_skipped(family: str) -> TorchModel:
    """A family that this backend runs, and that has a mask of tokens."""
    recipe = recipe_of(tiny_model(family))
    names = {spec.name for spec in recipe.inputs}
    if recipe.decoder is not None or not {"input_ids", "attention_mask"} <= names:
        pytest.skip("has no mask of tokens, or two graphs")
    return opened(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_padding_need_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None reaches attention, and the outputs are those of the model with its mask."""
    twin = opened_or_skipped(family)
    feeds = twin.feeds(SHAPE)
    masks: list[object] = []
    attention = nn.functional.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        masks.append(options["attn_mask"])
        return attention(query, key, value, **options)

    expected = twin.run(feeds)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    for one, found in zip(expected, twin.run_as_engine(feeds), strict=True):
        torch.testing.assert_close(found, one, atol=2e-5, rtol=1e-4)
    if masks:
        assert all(mask is None for mask in masks) != (family in BIASED)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_keep_their_mask(family: str) -> None:
    twin = opened_or_skipped(family)
    feeds = padded(twin.feeds(SHAPE))
    assert feeds is not None
    inputs = twin.inputs(feeds)
    assert all(tensor.numel() for tensor in inputs[:2])
    for one, found in zip(twin.run(feeds), twin.run_as_engine(feeds), strict=True):
        torch.testing.assert_close(found, one, atol=2e-5, rtol=1e-4)


def test_a_mask_that_hides_a_token_changes_what_is_computed() -> None:
    """So that running without one cannot pass unseen."""
    twin = opened("bert")
    feeds = twin.feeds(SHAPE)
    hidden = padded(feeds)
    assert hidden is not None
    full, partly = twin.run_as_engine(feeds)[0], twin.run_as_engine(hidden)[0]
    assert not torch.allclose(full[0], partly[0], atol=1e-4)
    torch.testing.assert_close(full[1], partly[1], atol=2e-5, rtol=1e-4)


def test_every_kind_of_graph_is_tried() -> None:
    decoder = opened("llama").trial_feeds([SHAPE, Shape(batch=2, sequence=1, past=4)])
    masks = [feeds["attention_mask"] for feeds in decoder]
    assert [mask.shape for mask in masks] == [(2, 5), (2, 5), (2, 3), (3, 4), (2, 3)]
    assert [bool(np.all(mask == 1)) for mask in masks] == [True, True, True, True, False]
    assert padded({"pixel_values": np.zeros((2, 3, 8, 8))}) is None


def test_another_attention_than_that_of_torch_stays() -> None:
    model = tiny_model("llama")
    config: Any = model.config
    config._attn_implementation = "eager"
    use_fast_attention(model)
    assert config._attn_implementation == "eager"
