"""A tokenizer that opens and cannot read is refused in a sentence, however its library fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.processors import open_tokenizer
from prox24_deploy.model.tokenizing import ids_of, text_of

# A library in Rust prints where it panics, past Python.
pytestmark = pytest.mark.usefixtures("capfd")
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def opened(folder: Path, **changes: Any) -> Any:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")
    return open_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": NO_UNKNOWN}, r"Missing \[UNK\] token"),
        # These two are panics.
        ({"normalizer": {"type": "Prepend", "prepend": ""}}, "index out of bounds"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    ],
)
def test_what_a_tokenizer_fails_on_is_its_fault(
    changes: dict[str, Any], reason: str, model: Path
) -> None:
    with pytest.raises(ModelDirError, match=rf"^The tokenizer of {model} cannot .*{reason}.*\.$"):
        ids_of("some words", opened(model, **changes))


def test_a_file_that_makes_the_library_panic_does_not_open(model: Path) -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(ModelDirError, match=r"no tokenizer that opens \(Precompiled: .*\); add"):
        opened(model, normalizer=charsmap)


def test_tokens_that_no_text_has_are_its_fault(model: Path) -> None:
    with pytest.raises(ModelDirError, match=r"cannot read or write a text \(.*\); restore"):
        text_of([2**70], opened(model))


def test_tokens_are_those_of_the_tokenizer(model: Path) -> None:
    tokenizer = opened(model)
    whole = tokenizer("sparse kernel")["input_ids"]
    assert ids_of("sparse kernel", tokenizer) == whole
    assert ids_of("sparse kernel", tokenizer, most=3) == whole[:3]
    bare = tokenizer("sparse kernel", add_special_tokens=False)["input_ids"]
    assert ids_of("sparse kernel", tokenizer, special=False) == bare
    assert ids_of("sparse kernel", tokenizer, as_target=True) == whole
    assert text_of(whole, tokenizer) == "sparse kernel"
