"""No name of an option that a tokenizer does not know is printed by the library that reads it."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model.processors import open_tokenizer
from prox24_deploy.model.token_files import require_readable

UNKNOWN = {"content": "<s>", "\x1b[31m": True}
KNOWN = {
    "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
    "special": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_bytes()) if file.is_file() else {}
    file.write_text(json.dumps(value | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 0, **UNKNOWN}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": UNKNOWN}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"\x1b[31m": 1}}}),
        ("tokenizer_config.json", {"bos_token": {"__type": "AddedToken", **UNKNOWN}}),
        ("tokenizer_config.json", {"extra_special_tokens": [{"a": [UNKNOWN]}]}),
        ("special_tokens_map.json", {"bos_token": UNKNOWN}),
        ("special_tokens_map.json", {"additional_special_tokens": [UNKNOWN]}),
    ],
)
def test_an_option_that_nobody_knows_is_refused_and_not_printed(
    name: str, changes: dict[str, Any], model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model / name, **changes)
    with pytest.raises(ModelDirError, match=rf"{name} gives the added token .* the option .*\[31m"):
        open_tokenizer(model)
    # The library itself would have printed it on the file that Python's own output goes to.
    assert capfd.readouterr().out == ""


def test_what_files_of_tokenizers_hold_is_no_obstacle(model: Path) -> None:
    edit(model / "tokenizer_config.json", added_tokens_decoder={"0": KNOWN})
    edit(model / "tokenizer_config.json", bos_token={"__type": "AddedToken", **KNOWN})
    edit(model / "special_tokens_map.json", bos_token=KNOWN, eos_token="</s>")
    replaced = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
    edit(model / "tokenizer.json", normalizer=replaced)
    require_readable(model)
    open_tokenizer(model)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x49\xea\xae\xf5", "of 0 bytes that claims to have 4,121,881,161"),
        (b"\x09\0\0\0" + b"\0" * 8, "of 8 bytes that claims to have 9"),
    ],
)
def test_a_map_of_characters_may_not_claim_more_than_it_has(
    model: Path, data: bytes, told: str
) -> None:
    """The library would take as much memory, and end the process where there is none."""
    text = base64.b64encode(data).decode()
    maps = [{"type": "Precompiled", "precompiled_charsmap": text}]
    edit(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": maps})
    with pytest.raises(ModelDirError, match=f"has a precompiled_charsmap {told}"):
        require_readable(model)


def test_a_map_of_characters_that_is_whole_is_left_to_the_library(model: Path) -> None:
    for data in (b"\x08\0\0\0" + b"\0" * 8, b"\0\0\0\0rest"):
        text = base64.b64encode(data).decode()
        edit(model / "tokenizer.json", normalizer={"precompiled_charsmap": text})
        require_readable(model)
    edit(model / "tokenizer.json", normalizer={"precompiled_charsmap": "no base64"})
    require_readable(model)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "null", '{"added_tokens": {}}', "\xff"])
def test_a_file_of_another_form_is_left_to_the_library(text: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    require_readable(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    require_readable(tmp_path)


def test_a_schema_of_answers_is_no_token(model: Path) -> None:
    schema = {"properties": {"role": {"const": "assistant"}, "content": {"type": "string"}}}
    edit(model / "tokenizer_config.json", response_schema=schema)
    require_readable(model)
