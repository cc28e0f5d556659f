"""Columns are found by name or by being the only one, and chats become text by the model's form."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.data.fields import Fields, chat_of
from prox24_deploy.data.text import Reading, Texts, read_texts

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path: Path, fields: Fields = Fields()) -> Texts:  # noqa: B008 - frozen
    return read_texts([path], [path], 0, Reading(fields=fields))[0]


def written(folder: Path, records: Sequence[object]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_a_column_is_taken_by_name_before_any_other(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "a", "body": "b", "sum": "c", "target": "d"}])
    assert read(path).documents == ("a",)
    assert read(path).targets == ("d",)
    named = read(path, Fields(text="body", target="sum"))
    assert (named.documents, named.targets) == (("b",), ("c",))
    # What is the text is no target besides.
    turned = read(path, Fields(text="target"))
    assert (turned.documents, turned.targets) == (("d",), (None,))


def test_the_only_column_needs_no_name(tmp_path: Path) -> None:
    assert read(written(tmp_path, [{"body": "a"}, "b", {"text": "c"}])).documents == ("a", "b", "c")
    (tmp_path / "a.csv").write_text('body\n"a, b"\n\n"c\nd"\n', encoding="utf-8")
    assert read(tmp_path / "a.csv").documents == ("a, b", "c\nd")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            Fields(text="x"),
            r"line 1 has no column 'x' but 'id', 'body'; pass one .* as --column\.",
        ),
        (
            Fields(text="id", target="y"),
            r"no column 'y' but 'id', 'body'; .* --target-column\.$",
        ),
        (
            Fields(),
            r"line 1 has the columns 'id', 'body'; say which holds the text with --colu",
        ),
        (Fields(text="id"), r'line 1 has no string "id"; expected \{"id": "\.\.\."\} per line, or'),
    ],
)
def test_a_column_that_tells_nothing_is_refused(
    tmp_path: Path, fields: Fields, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        read(written(tmp_path, [{"id": 1, "body": "a"}]), fields)


def test_columns_of_tables_are_those_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\tbody\tsum\n1\tone\tuno\n2\t\tdue\n3\tthree\t\n", encoding="utf-8")
    found = read(path, Fields(text="body", target="sum"))
    assert (found.documents, found.targets) == (("one", "three"), ("uno", ""))
    long = "a" * 200_000
    (tmp_path / "b.csv").write_text(f"text\n{long}\n", encoding="utf-8")
    assert read(tmp_path / "b.csv").documents == (long,)


def test_columns_of_parquet_are_read_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra tables is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "id": [1, 2, 3],
        "body": ["one", None, "three"],
        "messages": [CHAT, CHAT, CHAT],
    }
    # By its content, whatever its name.
    path = tmp_path / "a.data"
    parquet.write_table(pyarrow.table(columns), path)
    assert read(path, Fields(text="body")).documents == ("one", "three")
    told = Fields(chat=lambda messages: messages[1]["content"])
    assert read(path, told).documents == ("Hello",) * 3
    with pytest.raises(CalibrationError, match=r"no column 'x' but 'id', 'body', 'messages'; pass"):
        read(path, Fields(text="x"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CalibrationError, match=r"a\.data is no Parquet table that can be read \("):
        read(path)


def test_a_chat_becomes_text_by_the_template_of_the_model(tmp_path: Path) -> None:
    path = written(tmp_path, [{"messages": CHAT, "id": 1}])
    tokenizer = SimpleNamespace(
        chat_template="...",
        bos_token="<s>",
        apply_chat_template=lambda chat, *, tokenize: (
            "<s>" + "".join(f"[{one['role']}] {one['content']}\n" for one in chat)
        ),
    )
    # The tokenizer puts its start token before any text.
    found = read(path, Fields(chat=chat_of(tokenizer)))
    assert found.documents == ("[user] Hi\n[assistant] Hello",)
    with pytest.raises(CalibrationError, match="line 1 is a chat, and the tokenizer of the mode"):
        read(path)
    tokenizer.chat_template = None
    assert chat_of(tokenizer) is None


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    def refuse(_: object) -> str:
        raise ValueError("roles must alternate")

    path = written(tmp_path, [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"line 1 does not fit .* \(roles must alternate\)"):
        read(path, Fields(chat=refuse))
    for messages in ([], [{"role": "user"}], "none"):
        (path).write_text(json.dumps({"messages": messages}), encoding="utf-8")
        if messages == "none":
            assert read(path).documents == ("none",)
            continue
        with pytest.raises(CalibrationError, match=r'has no string "messages"; .* "role" and'):
            read(path, Fields(chat=str))


def test_a_message_without_content_is_named(tmp_path: Path) -> None:
    silent = {"role": "assistant", "content": None}
    path = written(tmp_path, [{"messages": CHAT}, {"messages": [CHAT[0], silent]}])
    with pytest.raises(CalibrationError, match=r'line 2 has no "content" in message 2 of its chat'):
        read(path, Fields(chat=str))
    path = written(tmp_path, [{"messages": [CHAT[0], silent | {"tool_calls": [{}]}]}] * 2)
    assert len(read(path, Fields(chat=lambda chat: f"text {len(chat)}")).documents) == 2


def test_a_real_template_writes_a_chat(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }};{% endfor %}"
    )
    found = read(written(tmp_path, [{"messages": CHAT}]), Fields(chat=chat_of(tokenizer)))
    assert found.documents == ("user: Hi;assistant: Hello;",)
