"""Inputs that engines are timed on."""

import numpy as np

from prox24_deploy.config.recipe import TensorSpec
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.feeds import random_feeds


def spec(name: str, *axes: str | int, floats: bool = False) -> TensorSpec:
    return TensorSpec(name=name, dtype="float" if floats else "int64", axes=list(axes))


DECODER = (
    spec("input_ids", "batch", "sequence"),
    spec("attention_mask", "batch", "past + sequence"),
    spec("position_ids", "batch", "sequence"),
    spec("past_key_values.0.key", "batch", 2, "past", 8, floats=True),
)


def test_a_decoder_is_timed_on_prefill_from_an_empty_past() -> None:
    feeds = random_feeds(DECODER, "float16", 50)(Shape(batch=3, sequence=7), 0)
    assert feeds["input_ids"].shape == (3, 7)
    assert 0 <= feeds["input_ids"].min() <= feeds["input_ids"].max() < 50
    assert feeds["attention_mask"].tolist() == [[1] * 7] * 3
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3
    past = feeds["past_key_values.0.key"]
    assert past.shape == (3, 2, 0, 8)
    assert past.dtype == np.float16


def test_a_step_of_decoding_is_one_token_behind_a_full_past() -> None:
    feeds = random_feeds(DECODER, "float16", 50)(Shape(batch=3, sequence=1, past=7), 0)
    assert feeds["input_ids"].shape == (3, 1)
    assert feeds["attention_mask"].tolist() == [[1] * 8] * 3
    assert feeds["position_ids"].tolist() == [[7]] * 3
    past = feeds["past_key_values.0.key"]
    assert past.shape == (3, 2, 7, 8)
    assert past.any()
    assert Shape(batch=3, sequence=1, past=7).sizes["source"] == 8


def test_a_decoder_beside_an_encoder_reads_as_much_as_it_writes() -> None:
    inputs = (
        spec("input_ids", "batch", "sequence"),
        spec("encoder_hidden_states", "batch", "source", 8, floats=True),
        spec("encoder_attention_mask", "batch", "source"),
    )
    feeds = random_feeds(inputs, "float16", 50)(Shape(batch=3, sequence=7), 0)
    assert feeds["encoder_hidden_states"].shape == (3, 7, 8)
    assert feeds["encoder_attention_mask"].tolist() == [[1] * 7] * 3


def test_floats_have_the_dtype_of_the_engine_and_other_integers_are_zero() -> None:
    inputs = (
        spec("pixel_values", "batch", 3, 4, 4, floats=True),
        spec("token_type_ids", "batch", "sequence"),
    )
    feeds = random_feeds(inputs, "bfloat16", 50)(Shape(batch=2, sequence=5), 0)
    assert feeds["pixel_values"].shape == (2, 3, 4, 4)
    assert feeds["pixel_values"].dtype.name == "bfloat16"
    assert feeds["token_type_ids"].tolist() == [[0] * 5] * 2


def test_the_seed_decides_the_tokens() -> None:
    make = random_feeds(DECODER, "float32", 50)
    shape = Shape(batch=2, sequence=9)
    assert np.array_equal(make(shape, 1)["input_ids"], make(shape, 1)["input_ids"])
    assert not np.array_equal(make(shape, 1)["input_ids"], make(shape, 2)["input_ids"])


def test_the_past_is_made_once_for_all_seeds() -> None:
    """Gigabytes of it; a session of the GPU knows it by that, and does not send it again."""
    make = random_feeds(DECODER, "float32", 50)
    step = Shape(batch=2, sequence=1, past=9)
    first, second = (make(step, seed)["past_key_values.0.key"] for seed in (1, 2))
    assert first is second
    longer = make(Shape(batch=2, sequence=1, past=10), 1)["past_key_values.0.key"]
    assert longer.shape == (2, 2, 10, 8)
