"""A step in static buffers gives what the same model gives with a cache that grows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import tiny_model
from torch import Tensor, nn

from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.errors import EngineError
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt import cuda_graph
from prox24_deploy.engines.cusparselt.inductor import CompiledModule, try_compiling, with_another
from prox24_deploy.engines.cusparselt.torch_model import TorchModel, as_engine

CACHED = [name for name, text in shipped_recipes().items() if parse_recipe(text, name).cache]
STEP = Shape(batch=3, sequence=1, past=20)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")


def opened(family: str) -> TorchModel:
    """In float32, so that no rounding hides a fault."""
    recipe = parse_recipe(shipped_recipes()[family], family)
    model = tiny_model(family).eval().requires_grad_(requires_grad=False)
    return TorchModel(as_engine(model, recipe), "float32", 90)


@pytest.mark.parametrize("family", CACHED)
def test_a_step_gives_what_a_growing_cache_gives(family: str) -> None:
    """Outputs, and keys and values of all tokens with the new one behind them."""
    twin = opened(family)
    feeds = twin.feeds(STEP, seed=1)
    for expected, found in zip(twin.run(feeds), twin.run_as_engine(feeds), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_step_can_be_run_again_and_looks_at_nothing_behind_it() -> None:
    """As a CUDA graph replays it: same buffers, the same token written again."""
    twin = opened("llama")
    inputs = twin.inputs(twin.feeds(STEP))
    position, keys = inputs[1], inputs[2]
    assert (position.tolist(), keys.shape[2]) == ([20], 32)
    first, again = (twin.runner(*inputs)[0].clone() for _ in range(2))
    assert torch.equal(first, again)
    for slots in inputs[2:]:
        slots[:, :, 21:] = 1e3
    assert torch.equal(twin.runner(*inputs)[0], first)


@torch.inference_mode()
def test_a_token_decoded_in_turn_is_one_read_at_once() -> None:
    twin = opened("qwen3")
    ids = np.random.default_rng(0).integers(90, size=(2, 24))
    empty = twin.feeds(Shape(batch=2, sequence=20))
    outputs = twin.run({**empty, "input_ids": ids[:, :20]})
    for position in range(20, 24):
        past = dict(zip(twin.output_names, outputs, strict=True))
        feeds = {
            name.replace("present.", "past_key_values."): tensor.numpy()
            for name, tensor in past.items()
            if name.startswith("present.")
        }
        feeds["input_ids"] = ids[:, position : position + 1]
        feeds["attention_mask"] = np.ones((2, position + 1), np.int64)
        outputs = twin.run_as_engine(feeds)
    whole = twin.feeds(Shape(batch=2, sequence=24))
    expected = twin.run({**whole, "input_ids": ids})[0][:, -1]
    torch.testing.assert_close(outputs[0][:, 0], expected, atol=2e-5, rtol=1e-4)


def test_padded_rows_and_other_positions_are_refused() -> None:
    twin = opened("gpt2")
    feeds = dict(twin.feeds(STEP))
    mask = feeds["attention_mask"].copy()
    mask[0, 0] = 0
    with pytest.raises(EngineError, match="decodes rows of equal length, but these are padded"):
        twin.inputs({**feeds, "attention_mask": mask})
    with pytest.raises(EngineError, match="position_ids are not 20, behind the past"):
        twin.inputs({**feeds, "position_ids": feeds["position_ids"] - 1})


def test_keys_are_not_copied_for_every_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []
    attention = nn.functional.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.append((query.shape, key.shape))
        return attention(query, key, value, **options)  # type: ignore[arg-type]

    twin = opened("llama")
    config: Any = twin.wrapped.config
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    assert heads > shared
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    twin.run_as_engine(twin.feeds(STEP))
    assert {(query[1], query[2], key[1]) for query, key in seen} == {
        (shared, heads // shared, shared)
    }


def test_every_kind_of_shape_has_one_more_for_all_others() -> None:
    prefill = [Shape(batch=1, sequence=8), Shape(batch=2, sequence=8)]
    assert with_another(prefill) == [*prefill, Shape(batch=2, sequence=5)]
    both = [*prefill, Shape(batch=2, sequence=1, past=9)]
    assert with_another(both)[len(both) :] == [
        Shape(batch=2, sequence=5),
        Shape(batch=3, sequence=1, past=5),
    ]
    images = [Shape(batch=2, sequence=0)]
    assert with_another(images) == [*images, Shape(batch=3, sequence=0)]


@pytest.mark.large
def test_a_step_compiles_without_a_break_for_one_shape_and_for_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Inductor on the CPU; the buffers are written in place and the outputs are the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    twin = opened("llama")
    shapes = [Shape(batch=2, sequence=4), STEP]
    feeds = twin.trial_feeds(shapes)
    runs = [twin.inputs(one) for one in feeds]
    compiled: CompiledModule = twin.compiled(shapes)
    outputs, compilation = try_compiling(compiled, runs)
    assert (compilation.reason, compilation.graphs) == ("", 5)
    for one, inputs, found in zip(feeds, runs, outputs, strict=True):
        for expected, own in zip(twin.run(one), twin.trim(inputs, found), strict=True):
            torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-3)
    compiled.close()
