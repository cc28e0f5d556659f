"""Spoil sound binary files: any bytes, and the structures of safetensors, WAV, PNG and ONNX."""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import onnx
from fuzz_documents import STRINGS, Spoiled, spoil_json, spoil_value, to_json
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "C64",
)
_LENGTH = 8


def spoil_bytes(data: bytes, draw: Random, *, head: int = 64) -> Spoiled:
    """A file with a few changed bytes, half of the changes in its first `head` bytes."""
    story: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        end = len(data) if draw.random() < 0.5 else min(head, len(data))
        at = draw.randrange(end) if end else 0
        data, told = _change_bytes(data, at, draw)
        story.append(told)
    return data, tuple(story)


def _change_bytes(data: bytes, at: int, draw: Random) -> tuple[bytes, str]:
    span = draw.choice((1, 2, 4, 8, 16, 64, 1024))
    number = draw.choice(_INTEGERS)
    order = draw.choice(("little", "big"))
    written = (number % 256**span).to_bytes(span, order)
    flipped = bytes([(data[at] if at < len(data) else 0) ^ 1 << draw.randrange(8)])
    ways: tuple[tuple[str, bytes], ...] = (
        ("flip a bit", data[:at] + flipped + data[at + 1 :]),
        (f"write {number} in {span} bytes, {order}", data[:at] + written + data[at + span :]),
        (f"write {number} in {span} bytes, {order}", data[:at] + written + data[at + span :]),
        (f"random {span} bytes", data[:at] + draw.randbytes(span) + data[at + span :]),
        (f"insert {span} random bytes", data[:at] + draw.randbytes(span) + data[at:]),
        (f"delete {span} bytes", data[:at] + data[at + span :]),
        (f"repeat {span} bytes", data[: at + span] + data[at:]),
        ("cut", data[:at]),
        (f"append {span} bytes", data + b"\x00" * span),
    )
    told, changed = draw.choice(ways)
    return changed, f"at {at}: {told}"


def spoil_safetensors(data: bytes, draw: Random) -> Spoiled:
    """A safetensors file with another header, another length of it, or other bytes."""
    kind = draw.random()
    if kind < 0.2:
        return spoil_bytes(data, draw)
    length = int.from_bytes(data[:_LENGTH], "little")
    header, body = data[_LENGTH : _LENGTH + length], data[_LENGTH + length :]
    if kind < 0.3:
        wrong = draw.choice((0, 1, length - 1, length + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
        return wrong.to_bytes(_LENGTH, "little") + header + body, (f"header of {wrong} bytes",)
    text, story = draw.choice((spoil_json, spoil_json, _spoil_entries))(header, draw)
    if draw.random() < 0.1:
        body, story = body + b"\x00" * 8, (*story, "8 bytes more")
    return len(text).to_bytes(_LENGTH, "little") + text + body, story


def _spoil_entries(header: bytes, draw: Random) -> Spoiled:
    """Entries that are of the right form and do not fit the bytes or each other."""
    value = json.loads(header)
    names = [name for name in value if name != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    entry: dict[str, Any] = value[name]
    begin, end = entry["data_offsets"]
    huge = draw.choice((2**31, 2**62, 10**30))
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("dtype", {"dtype": draw.choice(_DTYPES)}),
        ("overlap", {"data_offsets": value[other]["data_offsets"]}),
        ("hole", {"data_offsets": [begin + 4, end + 4]}),
        ("backwards", {"data_offsets": [end, begin]}),
        ("fractions", {"data_offsets": [float(begin), float(end)]}),
        ("text offsets", {"data_offsets": [str(begin), str(end)]}),
        ("transposed", {"shape": entry["shape"][::-1]}),
        ("flat", {"shape": [-1]}),
        ("rank 80", {"shape": entry["shape"] + [1] * 80}),
        ("huge by zero", {"shape": [huge, 0], "data_offsets": [begin, begin]}),
        ("product overflows", {"shape": [huge, huge, *entry["shape"]]}),
        ("20000 dims", {"shape": [10**18] * 20_000}),
        ("scalar", {"shape": []}),
    )
    told, change = draw.choice(ways)
    text = to_json(value | {name: entry | change})
    if draw.random() < 0.2:
        twice = f"{json.dumps(other)}: {to_json(value[other])}"
        text, told = f"{{{twice}, {text[1:]}", f"{told}, {other} twice"
    return text.encode(), (f"{name}: {told}",)


def declare_sparse(data: bytes, draw: Random, key: str) -> Spoiled:
    """A safetensors file whose own declaration of 2:4 tensors is spoilt."""
    length = int.from_bytes(data[:_LENGTH], "little")
    value = json.loads(data[_LENGTH : _LENGTH + length])
    declared = json.loads(value.get("__metadata__", {}).get(key, "{}")) or {"w": 1}
    spoilt, story = spoil_value(declared, draw)
    value["__metadata__"] = {key: to_json(spoilt)}
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(_LENGTH, "little") + text + data[_LENGTH + length :], tuple(story)


def spoil_wave(data: bytes, draw: Random) -> Spoiled:
    """A WAV file with another number in its header, or other bytes."""
    if draw.random() < 0.4:
        return spoil_bytes(data, draw, head=48)
    # Offset and format of what a plain header holds.
    fields = {
        "riff size": (4, "<I"), "fmt size": (16, "<I"), "format": (20, "<H"),
        "channels": (22, "<H"), "rate": (24, "<I"), "bytes a second": (28, "<I"),
        "frame": (32, "<H"), "bits": (34, "<H"), "data size": (40, "<I"),
    }  # fmt: skip
    changed, story = bytearray(data), []
    for name in draw.sample(sorted(fields), draw.choice((1, 1, 2, 3))):
        at, form = fields[name]
        small = (0, 1, 2, 3, 4, 5, 8, 12, 16, 20, 24, 32, 40, 64, 3, 0xFFFE, 44100)
        value = draw.choice((*small, *_INTEGERS)) % 256 ** struct.calcsize(form)
        struct.pack_into(form, changed, at, value)
        story.append(f"{name} {value}")
    return bytes(changed), tuple(story)


def spoil_image(data: bytes, draw: Random) -> Spoiled:
    """An image with other bytes; a PNG also with other sizes or chunks, whose sums are right."""
    if not data.startswith(b"\x89PNG") or draw.random() < 0.4:
        return spoil_bytes(data, draw)
    chunks = list(_png_chunks(data))
    at = draw.randrange(len(chunks))
    kind, body = chunks[at]
    if draw.random() < 0.5:
        at, (kind, body) = 0, chunks[0]
        sides = [draw.choice((0, 1, 8, 4000, 13_000, 13_377, 30_000, 2**31 - 1)) for _ in "wh"]
        rest = draw.choice((body[8:], draw.randbytes(5)))
        chunks[0], told = (kind, struct.pack(">II", *sides) + rest), f"sides {sides}"
    else:
        names = (b"zTXt", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"eXIf", b"IEND", kind)
        body, _ = spoil_bytes(body, draw)
        chunks[at] = (draw.choice(names), body)
        told = f"chunk {at} as {chunks[at][0].decode()}"
    return _as_png(chunks), (told,)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _as_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        sum_ = zlib.crc32(kind + body)
        parts += [len(body).to_bytes(4, "big"), kind, body, sum_.to_bytes(4, "big")]
    return b"".join(parts)


def spoil_onnx(data: bytes, draw: Random) -> Spoiled:
    """An ONNX file with other fields, or with other bytes."""
    if draw.random() < 0.15:
        return spoil_bytes(data, draw, head=len(data))
    model = onnx.ModelProto.FromString(data)
    story = [_change_message(model, draw) for _ in range(draw.choice((1, 1, 2, 3, 4)))]
    return model.SerializeToString(), tuple(story)


def _change_message(model: onnx.ModelProto, draw: Random) -> str:
    """Change one field somewhere; what is repeated counts as often as it is there."""
    every = list(_messages(model, "model"))
    # Each node has notes of its own, which would be most of what is changed.
    weights = [0.1 if isinstance(part, onnx.StringStringEntryProto) else 1 for _, part in every]
    path, message = draw.choices(every, weights)[0]
    # Fields that are not set are hostile too, but most of them mean nothing where they are.
    fields: list[Any] = [field for field, _ in message.ListFields()]
    if not fields or draw.random() < 0.1:
        fields = list(message.DESCRIPTOR.fields)
    field = draw.choice(fields)
    change = _change_list if field.is_repeated else _change_single
    return f"{path}.{field.name} {change(message, field, draw, model)}"


def _messages(message: Message, path: str) -> Iterator[tuple[str, Message]]:
    yield path, message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = value if field.is_repeated else [value]
        for i, part in enumerate(inner):
            yield from _messages(part, f"{path}.{field.name}[{i}]")


def _change_list(message: Message, field: FieldDescriptor, draw: Random, model: Any) -> str:
    values = getattr(message, field.name)
    kept = list(values)
    at = draw.randrange(len(kept)) if kept else 0
    ways: tuple[tuple[str, Callable[[], list[Any]]], ...] = (
        ("cleared", list),
        (f"without {at}", lambda: kept[:at] + kept[at + 1 :]),
        (f"with {at} twice", lambda: kept[: at + 1] + kept[at:]),
        ("reversed", lambda: kept[::-1]),
        (f"with {at} a hundred times", lambda: kept + kept[at : at + 1] * 100),
    )
    if field.message_type is None and draw.random() < 0.6:
        value = _scalar(field, draw, model)
        told, new = f"with {value!r:.60} at {at}", [*kept[:at], value, *kept[at + 1 :]]
    else:
        told, make = draw.choice(ways)
        new = make()
    copies = [_copied(part) for part in new]
    del values[:]
    values.extend(copies)
    return told


def _change_single(message: Message, field: FieldDescriptor, draw: Random, model: Any) -> str:
    if field.message_type is not None:
        message.ClearField(field.name)
        return "cleared"
    value = _scalar(field, draw, model)
    setattr(message, field.name, value)
    return f"= {value!r:.60}"


def _copied(value: Any) -> Any:
    return (
        type(value).FromString(value.SerializeToString()) if isinstance(value, Message) else value
    )


def _scalar(field: FieldDescriptor, draw: Random, model: onnx.ModelProto) -> Any:
    """A value that the field can hold."""
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        known = [
            name for node in model.graph.node for name in (*node.input, *node.output, node.op_type)
        ]
        known += [tensor.name for tensor in model.graph.initializer] + [
            "Concat",
            "If",
            "Loop",
            "Scan",
        ]
        text = draw.choice(known if draw.random() < 0.6 else STRINGS)
        data = text.encode("utf-8", "replace")
        return data if field.type == FieldDescriptor.TYPE_BYTES else data.decode()
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return draw.choice((0.0, -1.0, 1e38, float("inf"), float("nan")))
    if field.enum_type is not None:
        return draw.choice(field.enum_type.values).number
    small = (-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 23, 99, -2)
    wide = field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
    large = (2**62, -(2**63)) if wide else (2**31 - 1, -(2**31))
    number = draw.choice(small if draw.random() < 0.7 else (*large, 10**6, 2**24))
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_UINT32)
    return abs(number) if unsigned else number
