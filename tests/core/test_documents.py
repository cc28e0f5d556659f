"""JSON and TOML of others: what is refused is refused in one sentence, whatever it is."""

import io
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prox24_deploy.core.documents import (
    MOST_DEPTH,
    MOST_TOML_BYTES,
    Document,
    files_below,
    is_file_name,
    open_regular,
    parse_json,
    parse_toml,
    read_at_most,
    read_json,
    read_toml_text,
    replace_infinite,
)
from prox24_deploy.core.errors import UsageError

PAGE = Document("Page p.json", UsageError, "write it again")

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@settings(max_examples=60)
@given(value=VALUES, ascii_only=st.booleans())
@example(value=[float("nan")], ascii_only=True)
@example(value={"a": {"b": float("inf")}}, ascii_only=True)
def test_a_json_text_gives_its_value_or_a_sentence(value: Any, *, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    if finite(value):
        assert parse_json(data, PAGE) == value
        assert parse_json(b"\xef\xbb\xbf" + data, PAGE) == value
    else:
        with pytest.raises(UsageError, match=r"\(it holds a number that is not finite\); write it"):
            parse_json(data, PAGE)
    # NaN is no equal of itself.
    assert repr(parse_json(data, PAGE, finite=False)) == repr(value)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0dDeE+-.19 \n', max_size=60))
@example(b"\xff\xfe{\x00}\x00")
@example('"\\ud83d"')
@example('"\\ud83d\\ude00"')
@example("1" * 5000)
def test_whatever_is_no_json_is_one_sentence(data: bytes | str) -> None:
    for parse in (parse_json, lambda text, page: parse_toml(as_text(text), page)):
        try:
            parse(data, PAGE)
        except UsageError as error:
            text = str(error)
            assert text.startswith("Page p.json ")
            assert text.endswith("; write it again.")


def as_text(data: bytes | str) -> str:
    return data.decode("latin-1") if isinstance(data, bytes) else data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "Expecting property name"),
        (b'{"a": 1, "b": {"c": 2, "c": 2}}', "the key 'c' is given twice"),
        (b"1e999", "it holds a number that is not finite"),
        (b"[1, -Infinity]", "it holds a number that is not finite"),
        (b"[" + b"9" * 309 + b"]", "it holds a number that is larger than any float"),
        (b"-1" + b"0" * 400, "it holds a number that is larger than any float"),
        (b'{"\\uDFFF": 1}', r"a string holds \\udfff, half of a surrogate pair"),
        (b'["\\u005cud800", "\\ud83d\\ud83d"]', r"a string holds \\ud83d, half of"),
        (b"\xff", "not UTF-8, see byte 0"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 but UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "not UTF-8 but UTF-32"),
        (b"1 2", "something follows its value, at character 1"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_wrong_with_json_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(
        UsageError, match=rf"is not readable JSON \({reason}.*\); write it again\.$"
    ):
        parse_json(data, PAGE)


def test_whole_numbers_that_a_float_holds_are_read() -> None:
    largest = int(sys.float_info.max)
    assert parse_json(str(largest), PAGE) == largest
    assert parse_json("9" * 400, PAGE, finite=False) == int("9" * 400)


def test_every_number_that_is_not_finite_is_replaced_and_nothing_else() -> None:
    value = {"a": [1, math.inf, ("x", -math.inf)], "b": {"c": math.nan}, "d": True, "e": 10**400}
    assert replace_infinite(value, str) == {
        "a": [1, "inf", ["x", "-inf"]], "b": {"c": "nan"}, "d": True, "e": 10**400,
    }  # fmt: skip


def test_a_backslash_before_the_escape_makes_no_half_pair() -> None:
    assert parse_json(rb'"\\ud800"', PAGE) == r"\ud800"


@pytest.mark.parametrize("wrap", ["[{}]", '{{"a":{}}}'])
def test_nesting_is_bounded_at_one_depth(wrap: str) -> None:
    def nested(depth: int) -> str:
        opened, closed = wrap.format("\0").split("\0")
        return opened * depth + "1" + closed * depth

    assert parse_json(nested(MOST_DEPTH), PAGE)
    for depth in (MOST_DEPTH + 1, 990, 3000, 100_000):
        with pytest.raises(UsageError, match=r"\(it nests deeper than 100 levels\)"):
            parse_json(nested(depth), PAGE)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        "a = " + "{b = " * 5000 + "1" + "}" * 5000,
        "a = " + "[" * 150 + "]" * 150,
        ".".join(["a"] * 120) + " = 1",
        "[" + " . ".join(['"b c"'] * 50 + ["'d'"] * 70) + "]",
        "a." * 100_000 + "a = 1",
        "[[" + "a." * 50_000 + "a]]",
    ],
    ids=["lists", "tables", "some lists", "keys", "quoted", "many keys", "array of tables"],
)
def test_toml_that_nests_deeply_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError, match=r"^Page p\.json nests deeper than 100 levels; write"):
        parse_toml(text, PAGE)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["a" * 200_000, "'" * 200_000, '"' * 200_001, "a b " * 50_000])
def test_keys_are_looked_at_in_time_that_grows_with_their_length(text: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError, match="is not valid TOML"):
        parse_toml(text, PAGE)
    assert time.process_time() - began < 5


def test_toml_gives_what_the_library_gives() -> None:
    text = 'a.b = [1, 2.5]\n[c."d.e"]\nf = "x.y.z"\n'
    assert parse_toml(text, PAGE) == tomllib.loads(text)
    with pytest.raises(UsageError, match=r"is not valid TOML: .*\(at line 1, column 7\); wr"):
        parse_toml("a = 1 2", PAGE)


def make_folder(path: Path) -> None:
    path.mkdir()


READERS: list[Callable[[Path, Document], Any]] = [read_json, read_toml_text]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (make_folder, "Is a directory"),
        (os.mkfifo, "it is a pipe, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, expected a file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "folder", "pipe", "device", "circle"],
)
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_told_and_not_waited_for(
    tmp_path: Path,
    make: Callable[[Path], None],
    reason: str,
    read: Callable[[Path, Document], Any],
) -> None:
    path = tmp_path / "p"
    make(path)
    with pytest.raises(UsageError, match=rf"^Page p\.json cannot be read \({reason}\); write"):
        read(path, PAGE)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^Page p\.json cannot be read \(.*\); write it again"):
        read_json(tmp_path / name, PAGE)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"#" * (MOST_TOML_BYTES + 1))
    with pytest.raises(UsageError, match=r"is larger than the 262,144 bytes that are read; write"):
        read_toml_text(path, PAGE)
    path.write_bytes(b"#" * MOST_TOML_BYTES)
    assert len(read_toml_text(path, PAGE)) == MOST_TOML_BYTES


def test_an_unreadable_file_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    # Root, which tests may be, reads everything.
    monkeypatch.setattr("os.open", closed)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        read_json(tmp_path / "p", PAGE)


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"12")
    with open_regular(path) as file:
        assert file.read() == b"12"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0", "é" * 128, "x" * 256])
def test_no_file_beside_has_this_name(name: str) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["a", "...", "a b\n", "é" * 127, "model-00001-of-2.safetensors"])
def test_a_file_beside_may_have_this_name(name: str) -> None:
    assert is_file_name(name)


def test_files_below_a_folder_are_all_found_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/c/d.txt", "a.txt", ".hidden/e.txt", ".f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path)]
    assert found == [".f", "a.txt", "b/c/d.txt"]
    whole = os.scandir

    def closed(path: str) -> Any:
        if Path(path).name == "c":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    # Root, which tests may be, reads everything.
    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(PermissionError, match="Permission denied"):
        files_below(tmp_path)


def test_no_more_memory_is_taken_than_a_file_has() -> None:
    """Python reserves as much as it is asked to read."""
    asked: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    assert read_at_most(Counted(b"abc"), 2**40) == b"abc"
    assert max(asked) == 2**20
    data = bytes(2**20 + 5)
    assert read_at_most(Counted(data), 2**40) == data
    assert read_at_most(Counted(data), 2**20 + 2) == data[:-3]
    assert read_at_most(Counted(data), 0) == b""
