"""A file is read by what it holds, or refused with the real cause."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.data import text_files
from prox24_deploy.data.text import Reading, characters_for, read_texts, require_tokens
from prox24_deploy.data.text_files import json_lines, read_text

RECORDS = [{"text": f"record {i}\n\nof two parts", "id": i, "score": float(i)} for i in range(6)]
DOCUMENTS = tuple(f"record {i}\n\nof two parts" for i in range(6))
LINES = "\n".join(json.dumps(record) for record in RECORDS)


def documents(folder: Path, name: str, content: str | bytes) -> tuple[str, ...]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_texts([path], [path], 0)[0].documents


@pytest.mark.parametrize(
    "name", ["a.json", "a.txt", "A.TXT", "UPPER.JSONL", "a.ndjson", "a", "a.jsonl"]
)
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n"),
        "\ufeff" + LINES,
        f"\n\n  {LINES}\n\n",
        json.dumps(RECORDS),
    ],
    ids=["lines", "crlf", "mark", "space", "list"],
)
def test_json_is_read_as_records_whatever_its_name(tmp_path: Path, name: str, content: str) -> None:
    assert documents(tmp_path, name, content) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.jsonl"])
def test_a_list_over_many_lines_is_one_list(tmp_path: Path, name: str) -> None:
    for indent in (1, 4):
        assert documents(tmp_path, name, json.dumps(RECORDS, indent=indent)) == DOCUMENTS
    assert documents(tmp_path, name, '["a",\n "b"]') == ("a", "b")


def test_one_object_over_many_lines_is_one_record(tmp_path: Path) -> None:
    assert documents(tmp_path, "a.json", json.dumps(RECORDS[0], indent=2)) == DOCUMENTS[:1]


@pytest.mark.parametrize(
    "text",
    [
        "[1] Smith, J. 2020.\n\n[2] Miller, A. 2021.",
        "[[Category:Birds]]\n\n{{Infobox}}",
        "{x | x > 0} is a set.\n\n[a, b] is an interval.",
        '"Well," he said.\n\n"Well what?"',
        "17\n\n18",
        "null\n\ntrue",
    ],
)
def test_prose_that_begins_with_a_bracket_is_prose(tmp_path: Path, text: str) -> None:
    assert documents(tmp_path, "a.txt", text) == tuple(text.split("\n\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", LINES[:-9], r"a\.txt line 6 is not JSON \(Unterminated"),
        ("a.json", json.dumps(RECORDS)[:-9], r"a\.json item 6 is not JSON \(Unterminated"),
        ("a.txt", '[{"text": "a"} {"text": "b"}]', r"not one list .* it goes on after item 1; wr"),
        ("a.txt", '[{"text": "a"}]\n[{"text": "b"}]', r"not one list of JSON values, it goes on"),
        ("a.json", "A sentence.", r"a\.json line 1 is not JSON \(Expecting value"),
        ("a.json", '{"data": [1]}', r'item 1 has no text under "data" but a list; expected re'),
        ("a.json", '[{"messages": []}]', r'item 1 has no string "messages"; .* per item, or a'),
        ("a.json", '[{"id": "a", "body": "b"}]', r"item 1 has the columns 'id', 'body'; say which"),
        ("a.json", "[{}]", r"item 1 has the columns none at all; say which"),
        ("a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', r"a\.json line 1 is not JSON"),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}',
            r"line 1 is not JSON \(the key 'text' is given tw",
        ),
        (
            "a.jsonl",
            '"a"\n' + "[" * 3000 + "]" * 3000,
            r"line 2 is not JSON \(it nests deeper than",
        ),
        ("a.txt", '[{"a": ' + "[" * 3000, r"item 1 is not JSON \(it nests deeper than 100"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.csv", "id,body\n1,a\n", r"a\.csv has the columns 'id', 'body'; say which holds the te"),
        ("a.csv", "id;text\n1;a\n", r"a\.csv has the one column 'id;text'; separate columns by co"),
        ("a.csv", "text,id\na,1\nb,c,2\n", r"a\.csv row 2 has 3 columns, its first line names 2"),
        ("a.csv", 'text\n"a" b\n', r"a\.csv row 1 cannot be read \(',' expected after '\"'\); wri"),
        ("a.TSV", "text\tlabel\n", r"a\.TSV is empty"),
        ("a.csv", "", r"a\.csv is empty"),
    ],
)
def test_records_that_cannot_be_used_are_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        documents(tmp_path, name, content)


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", data)
    return out.getvalue()


def tarred(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


TEXT = b"one\n\ntwo"
FOREIGN: list[tuple[bytes, str]] = [
    (gzip.compress(TEXT, mtime=0), "is compressed with gzip, expected text or JSON; unpack it"),
    (bz2.compress(TEXT), "is compressed with bzip2"),
    (lzma.compress(TEXT), "is compressed with xz"),
    (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with Zstandard"),
    (zipped(TEXT), "is a ZIP archive or an Office document, .*; unpack it, or save it as plain"),
    (tarred(TEXT), "is binary or UTF-16, byte 5 is NUL; pass UTF-8 text"),
    (b"ARROW1\x00\x00", "is an Arrow table"),
    (b"%PDF-1.7\n", "is a PDF document, .*; save it as plain text"),
    (b"{\\rtf1 a}", "is an RTF document"),
    ("één\n\ntwee".encode("utf-16"), "is not UTF-8 but UTF-16; convert it"),
    ("één\n\ntwee".encode("utf-32"), "is not UTF-8 but UTF-32; convert it"),
    ("one\n\ntwo".encode("utf-16-le"), "is binary or UTF-16, byte 1 is NUL"),
    ("caf\xe9".encode("latin-1"), "is not UTF-8, see byte 3; convert it"),
    (b"\xed\xa0\x80", "is not UTF-8, see byte 0"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "is binary or UTF-16"),
]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_what_is_no_text_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(CalibrationError, match=rf"^Text .*{name} {message}"):
        documents(tmp_path, name, content)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "it is a pipe, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, expected a file"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
    ids=["pipe", "device", "folder"],
)
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "a.txt")
    with pytest.raises(CalibrationError, match=rf"a\.txt cannot be read \({reason}\)\.$"):
        read_texts([tmp_path / "a.txt"], [], 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of three bytes, and records of a hundred characters."""
    monkeypatch.setattr(text_files, "_PIECE", 3)
    monkeypatch.setattr(text_files, "MOST_RECORD", 100)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeff één\r\ntwo\r\n\r\n \r\n\n three\r\rfour"),
        ("a.jsonl", '"één\\ntwo"\r\n\r\n {"text":"three", "n": 12}\n"four"'),
        ("a.json", ' [ "één\\ntwo" , {"n": 1234567, "text": "three"},\r\n "four"\n ] '),
        ("a.csv", '\ufefftext,n\r\n"één\r\ntwo",1\r\n\r\nthree,2\r\nfour,'),
    ],
)
def test_files_are_read_in_pieces_of_any_size(tmp_path: Path, name: str, content: str) -> None:
    assert documents(tmp_path, name, content) == ("één\ntwo", "three", "four")


@pytest.mark.usefixtures("small")
def test_no_record_may_fill_the_memory(tmp_path: Path) -> None:
    for name, content in [("a.jsonl", '"' + "a" * 120), ("a.csv", "text\n" + "a" * 120)]:
        with pytest.raises(CalibrationError, match=r"line . is longer than the 100 characters of"):
            documents(tmp_path, name, content)
    with pytest.raises(CalibrationError, match=r"item 1 is not JSON \(Unterminated"):
        documents(tmp_path, "a.json", '["' + "a" * 1200)
    (tmp_path / "a.txt").write_text("a" * 120, encoding="utf-8")
    with pytest.raises(CalibrationError, match="has more than the 100 characters that are read; p"):
        read_text(tmp_path / "a.txt")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("content", ["caf\xe9", "ab\xc3\xa9\xe9"])
def test_a_byte_that_is_no_text_is_told_by_its_place(tmp_path: Path, content: str) -> None:
    data = content.encode("latin-1")
    with pytest.raises(CalibrationError, match=f"is not UTF-8, see byte {data.index(0xE9)}; conv"):
        documents(tmp_path, "a.txt", data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_of_a_large_file_no_more_is_read_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What follows is damaged, and nobody meets it."""
    monkeypatch.setattr(text_files, "_PIECE", 64)
    texts = [f"text {i:03d}" for i in range(100)]
    contents = {
        "a.txt": "\n\n".join(texts),
        "a.jsonl": "\n".join(map(json.dumps, texts)),
        "a.json": json.dumps(texts)[:-1],
        "a.csv": "\n".join(["text", *texts]),
    }
    path = tmp_path / name
    path.write_bytes(contents[name].encode() + b"\n\n\xff")
    found, held_out = read_texts([path, path], [], 0, Reading(most=300))
    assert 30 <= len(found.documents) + len(held_out.documents) <= 50
    assert set(found.documents) <= set(texts)
    with pytest.raises(CalibrationError, match="is not UTF-8"):
        read_texts([path], [], 0)


def test_the_characters_read_are_enough_for_the_tokens() -> None:
    assert characters_for(98304) == 2**25
    assert characters_for(10**8) == 64 * 10**8


def test_half_pairs_are_replaced_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [r'{"text": "sound \ud83d\ude00"}', r'{"text": "a \ud800 b"}', r'"\udc00"']
    lines.append(r'{"text": "c", "target": "\udfff"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts, _ = read_texts([tmp_path / "a.jsonl"], [tmp_path / "a.jsonl"], 0)
    assert texts.documents == ("sound \U0001f600", "a \ufffd b", "\ufffd", "c")
    assert texts.targets == (None, None, None, "\ufffd")
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told[0].endswith(
        "a.jsonl holds half of a surrogate pair in 3 records, first in line 2; each half was "
        "replaced by U+FFFD."
    )


def test_what_a_paragraph_is_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    message = r"has 1 paragraph or JSON record \(paragraphs end at blank lines\), .*; add text, put"
    with pytest.raises(CalibrationError, match=message):
        read_texts([tmp_path / "a.txt"], [], 0)
    texts, _ = read_texts([tmp_path / "a.txt"], [tmp_path / "a.txt"], 0)
    message = r"at least 1024, and it is 1 paragraph or JSON record \(paragraphs end at blank lines"
    with pytest.raises(CalibrationError, match=message):
        require_tokens(texts, 512)


def outcome(path: Path) -> tuple[str, tuple[str, ...]]:
    """Why a file is refused, or its documents."""
    try:
        return "", read_texts([path], [path], 0)[0].documents
    except CalibrationError as error:
        return str(error), ()


@settings(max_examples=80)
@given(
    st.binary(max_size=80)
    | st.text(alphabet='[]{}",:\\u0dDtex" \n', max_size=80).map(str.encode)
    | st.lists(st.text(max_size=9)).map(lambda items: json.dumps(items).encode())
)
@example(b'[{"text": "\\ud800"}]')
@example(b'{"text": "\xf0\x9f"}')
@example(b"text\r\ra\n\n")
@example(b'text\n"a\n')
def test_any_file_gives_text_for_a_tokenizer_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    for name in ("any.txt", "any.jsonl", "any.json", "any.csv", "any.tsv"):
        path = path.with_name(name)
        path.write_bytes(content)
        refusal, texts = outcome(path)
        assert all(document.strip().encode() for document in texts)
        assert not refusal or (str(path) in refusal and refusal.endswith("."))


def test_lines_are_counted_from_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('1\n\n"\u2028"\n', encoding="utf-8")
    found = [(record.number, record.value) for record in json_lines(tmp_path / "a.jsonl")]
    assert found == [(1, 1), (3, "\u2028")]
    assert read_text(tmp_path / "a.jsonl") == '1\n\n"\u2028"\n'
