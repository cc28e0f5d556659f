"""What is taken from config.json has the type that it must have, or is refused by its key."""

import json
from pathlib import Path
from typing import Any

import pytest

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.config_file import labels_of, read_config, whole_number
from prox24_deploy.model.processor_file import require_usable_sizes


def written(folder: Path, value: Any, name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "names", [{}, {"0": "BertModel"}, "BertModel", 7, [7], [None], [["BertModel"]], True]
)
def test_architectures_are_a_list_of_names(names: object, tmp_path: Path) -> None:
    folder = written(tmp_path, {"model_type": "bert", "architectures": names})
    if not names:
        read_config(folder)
        return
    with pytest.raises(ModelDirError, match=r"config\.json has architectures .*, expected a list"):
        read_config(folder)


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "limit": [0.0, Infinity]}')
    assert read_config(tmp_path)["limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("value", ["12", -1, 1.5, [3], {"a": 1}, True, float("inf")])
def test_a_number_of_another_kind_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(ModelDirError, match=r"config\.json has vocab_size .*, expected a whole nu"):
        whole_number({"vocab_size": value}, "vocab_size", 1)


@pytest.mark.parametrize("config", [{}, {"n": None}, {"n": 0}])
def test_a_number_that_is_not_said_is_the_default(config: dict[str, Any]) -> None:
    assert whole_number(config, "n", 7) == 7
    assert whole_number({"n": 3}, "n", 7) == 3


def test_labels_are_by_name() -> None:
    assert labels_of({}) == labels_of({"id2label": None}) == {}
    assert labels_of({"id2label": {"0": "cat", "1": "dog"}}) == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    "named",
    [
        ["cat"],
        [],
        "cat",
        7,
        {"LABEL_0": "cat"},
        {"-1": "cat"},
        {"²": "x"},
        {"9" * 5000: "x"},
        {"0": ["cat"]},
    ],
)
def test_labels_of_another_form_are_refused(named: object) -> None:
    with pytest.raises(ModelDirError, match=r"has id2label .*, expected an object from numbers of"):
        labels_of({"id2label": named})


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"size": 10**7}, "size 10000000, expected 1 to 2048"),
        ({"size": 0}, "size 0, expected 1 to 2048"),
        ({"size": {"height": 30_000, "width": 224}}, "height 30000, expected 1 to 2048"),
        ({"size": {"shortest_edge": -1}}, "shortest_edge -1, expected"),
        ({"crop_size": [224, 9999]}, "crop_size 9999, expected"),
        ({"image_processor": {"size": {"longest_edge": 1e9}}}, "longest_edge 1000000000"),
        ({"feature_size": 10**9}, "feature_size 1000000000, expected 2 to 1024"),
        ({"feature_size": 1}, "feature_size 1, expected 2 to 1024"),
        ({"feature_size": True}, "feature_size True, expected 2 to 1024"),
        ({"feature_size": False}, "feature_size False, expected 2 to 1024"),
        ({"chunk_length": 10**9}, "chunk_length 1000000000, expected 1 to 60"),
        ({"sampling_rate": 0}, "sampling_rate 0, expected 1 to 192000"),
        ({"n_fft": 10**9}, "n_fft 1000000000, expected 1 to 65536"),
        ({"feature_extractor": {"hop_length": 0}}, "hop_length 0, expected 1 to 65536"),
        ([], "is no JSON object"),
    ],
)
def test_sizes_of_a_processor_are_bounded(
    name: str, described: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelDirError, match=rf"{name}.* {message}.*; restore it\.$"):
        require_usable_sizes(written(tmp_path, described, name))


def test_sizes_in_use_are_let_through(tmp_path: Path) -> None:
    require_usable_sizes(tmp_path)
    described = {
        "size": {"shortest_edge": 384, "default_to_square": False}, "crop_size": 224,
        "do_resize": True, "rescale_factor": 0.1,
        "feature_size": 128, "n_samples": 480_000, "sampling_rate": 16_000, "chunk_length": 30,
    }  # fmt: skip
    require_usable_sizes(written(tmp_path, described, "preprocessor_config.json"))
