"""Which safetensors files are refused, against the library that loaders open them with."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from graph_models import array_24
from graph_models import write_safetensors as write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from prox24_deploy.core.errors import SparsityLostError, SparsityUnprovenError, UsageError
from prox24_deploy.graph.check import tensor_files
from prox24_deploy.graph.check.check import check_path, check_safetensors, require_24


def write(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(shape: list[Any], begin: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opens(path: Path) -> bool:
    """Whether the library opens a file."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False


FOUR = b"\0\0\0\0"


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        ([], b""),
        ({"w": {"dtype": "F32", "shape": [1]}}, FOUR),
        ({"w": []}, FOUR),
        ({"w": entry([2], 0, 8)}, FOUR),
        ({"w": entry([-1, -1], 0, 4)}, FOUR),
        ({"w": entry([4, 4], 0, 4)}, FOUR),
        ({"w": entry([1], 0, 4)}, FOUR * 2),
        ({"w": entry([1], 4, 8)}, FOUR * 2),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, FOUR * 3),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"\0" * 6),
        ({"w": entry([1], 0.0, 4)}, FOUR),
        ({"w": entry([1], -4, 0)}, FOUR),
        ({"w": entry([10**30, 0], 0, 0)}, b""),
        ({"w": entry([2**63, 2**63], 0, 0)}, b""),
        ({"w": entry([1], 0, 4, "F99")}, FOUR),
        ({"__metadata__": {"a": 1}, "w": entry([1], 0, 4)}, FOUR),
    ],
)
def test_what_the_library_does_not_open_is_refused(
    tmp_path: Path, header: object, body: bytes
) -> None:
    path = write(tmp_path / "m.safetensors", header, body)
    assert not opens(path)
    with pytest.raises(UsageError, match=r"m\.safetensors is not .* or is damaged: .+; copy"):
        check_safetensors(path)


ONE = json.dumps(entry([1], 0, 4))


@pytest.mark.parametrize(
    "header",
    [
        f'{{"w":{ONE},"w":{ONE}}}',
        f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{ONE}}}',
    ],
)
def test_a_key_that_is_there_twice_is_refused_though_the_library_takes_the_last(
    tmp_path: Path, header: str
) -> None:
    path = write(tmp_path / "m.safetensors", header.encode(), FOUR)
    assert opens(path)
    with pytest.raises(UsageError, match=r"header: the key '[aw]' is given twice; copy it again"):
        check_safetensors(path)


def test_metadata_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    header = f'{{"__metadata__":{{"a":"1"}},"__metadata__":{{"a":"2"}},"w":{ONE}}}'
    with pytest.raises(UsageError, match="duplicate field `__metadata__`"):
        check_safetensors(write(tmp_path / "m.safetensors", header.encode(), FOUR))


def test_more_axes_than_numpy_has_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": entry([0] * 80, 0, 0)})
    with pytest.raises(UsageError, match="tensor 'w' has 80 axes, and none has more than 64"):
        check_safetensors(path)


def test_a_header_out_of_proportion_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_MAX_HEADER", 99)
    path = write(tmp_path / "m.safetensors", b"{" + b" " * 98 + b"}")
    with pytest.raises(UsageError, match=r"has a header of 100 bytes; the check reads up to 99"):
        check_safetensors(path)


@pytest.mark.timeout(20)
def test_shapes_of_thousands_of_digits_are_refused_at_once(tmp_path: Path) -> None:
    shape = ", ".join(["9" * 4000] * 2000)
    header = f'{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'
    with pytest.raises(UsageError, match="is damaged"):
        check_safetensors(write(tmp_path / "m.safetensors", header.encode(), FOUR))


@pytest.mark.parametrize("cut", [1, 100])
def test_truncated_safetensors_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_tensors(tmp_path / "m.safetensors", {"a.weight": array_24((4, 8), 1)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UsageError, match=r"m\.safetensors is not .* or is damaged"):
        check_safetensors(path)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UsageError, match="or is damaged"):
        check_safetensors(path)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_a_type_that_is_not_read_is_named_and_not_proven(tmp_path: Path, dtype: str) -> None:
    size = {"F4": 4, "F8_E8M0": 8}[dtype]
    path = write(tmp_path / "m.safetensors", {"w": entry([2, 4], 0, size, dtype)}, b"\0" * size)
    (check,) = check_safetensors(path)
    assert (check.unproven, check.dtype) == (True, dtype)
    assert check.reason == f"the check does not read its type {dtype}"


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "1"}', '{"a": true}', "[" * 100_000])
def test_damaged_safetensors_declaration_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"prox24.sparse_weights": text}})
    with pytest.raises(UsageError, match=r"must be a JSON object from tensor name to axis, got"):
        check_safetensors(path)


NUMBERS = st.one_of(st.integers(-2, 12), st.just(2**63), st.just(1.5), st.none(), st.just("4"))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "U8", "F8_E4M3", "F4", "nope"]),
        "shape": st.lists(st.one_of(st.integers(0, 4), NUMBERS), max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)
NAMES = st.sampled_from(["a.weight", "b.weight", "w.qweight", "experts.down_proj", "__metadata__"])


def laid_out(sizes: list[int]) -> tuple[dict[str, object], int]:
    """A sound header of float32 vectors and matrices."""
    header: dict[str, object] = {}
    end = 0
    for number, size in enumerate(sizes):
        shape = [2, size // 2] if size % 2 == 0 else [size]
        header[f"t{number}.weight"] = entry(shape, end, end + 4 * size)
        end += 4 * size
    return header, end


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(NAMES, st.one_of(ENTRIES, NUMBERS), max_size=2),
    st.integers(-1, 1),
)
def test_no_header_raises_anything_but_a_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    more: dict[str, object],
    longer: int,
) -> None:
    header, end = laid_out(sizes)
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    write(path, header | more, b"\x01" * (end + longer))
    refused = False
    try:
        report = check_path(path)
    except UsageError:
        refused = True
    else:
        with contextlib.suppress(SparsityLostError, SparsityUnprovenError):
            require_24(report)
    assert refused or opens(path)
