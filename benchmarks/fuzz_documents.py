"""Spoil sound JSON, TOML and plain text in a place or a few, and tell each change in words.

Everything is drawn from a `random.Random`, so that a seed and a number give the same input again.
"""

import itertools
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, nan
from random import Random
from typing import Any

Spoiled = tuple[bytes, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Raw:
    """Text that stands in a document as it is, because no value of Python is written like it."""

    text: str


# Strings that are wrong as a name, a path, a number, a text or a line of a terminal.
STRINGS = (
    "", " ", "0", "null", "a" * 300, "x" * 100_000, "a/" * 3000, "\ud800", "a\udfffb", "a\x00b",
    "line\nline", "\x1b[31mred\x1b[0m", "\x1b]8;;http://x.invalid\x07link", "\x9b31m", "\u202eabc",
    "[/b]", "[bold]", "[link=http://x.invalid]", "../../outside", "/etc/passwd", "..", ".", "%s%n",
    "<script>alert(1)</script>", "{{ 7 * 7 }}", "](http://x.invalid)", "é" * 200, "𝔘",
    "float16", "gelu", "True", "1e999", "nan", "*", "[", "**/*", "(?P<", "-1", "１２",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 5, 7, 8, 64, 255, 256, 1000, 65_536, 100_000, 2**31 - 1, 2**31, 2**32, 10**9,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, 10**400, -(2**31), -(2**63), -(10**18),
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e-12, 1e308, -1e308, inf, -inf, nan,
)  # fmt: skip
_EMPTY: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": None},
    {"a": {"b": {}}},
)
_RAW = (
    Raw("9" * 5000), Raw("-" + "9" * 300), Raw("1e999"), Raw("1E-999"), Raw("0x10"), Raw("01"),
    Raw('{"a": 1, "a": 2}'), Raw("[1, 2"), Raw("'a'"), Raw('"\\ud800"'), Raw('"\\u0000"'),
    Raw("undefined"), Raw("1979-05-27"), Raw("1979-05-27T07:32:00Z"), Raw("NaN"), Raw("-Infinity"),
)  # fmt: skip
# Twice what a reader takes, and little enough to be written in a moment; what is repeated is one
# value in many places, which a later change may make large in all of them.
_MOST_WRITTEN = 2**26
_DEPTHS = (20, 200, 990, 3000, 100_000)


def hostile_value(draw: Random) -> Any:
    """A value that hardly anything expects."""
    kind = draw.random()
    if kind < 0.35:
        return draw.choice(NUMBERS)
    if kind < 0.65:
        return draw.choice(STRINGS)
    if kind < 0.82:
        return json.loads(json.dumps(draw.choice(_EMPTY)))
    if kind < 0.92:
        return draw.choice(_RAW)
    return deep_value(draw)


def deep_value(draw: Random) -> Raw:
    """Lists or objects in each other."""
    depth = draw.choice(_DEPTHS)
    begin, end = draw.choice((("[", "]"), ('{"a":', "}"), ("[{},", "]"), ("{a=", "}")))
    return Raw(begin * depth + "1" + end * depth)


def spoil_json(text: bytes, draw: Random) -> Spoiled:
    """A JSON document with a few changed values, or with broken text."""
    value, story = spoil_value(json.loads(text), draw)
    return _maybe_spoil_text(to_json(value).encode("utf-8", "surrogatepass"), story, draw)


def spoil_lines(text: bytes, draw: Random) -> Spoiled:
    """JSON lines of which a few are changed, or whose text is broken."""
    lines = text.splitlines()
    story: list[str] = []
    for at in draw.sample(range(len(lines)), min(len(lines), draw.choice((1, 1, 2, 4)))):
        lines[at], told = draw.choice((spoil_json, spoil_text))(lines[at], draw)
        story += [f"line {at + 1}: {part}" for part in told]
    between = draw.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", "\u2028".encode()))
    return _maybe_spoil_text(between.join(lines), story, draw)


def spoil_toml(text: bytes, draw: Random) -> Spoiled:
    """A TOML document with a few changed values, or with broken text."""
    value, story = spoil_value(tomllib.loads(text.decode()), draw)
    return _maybe_spoil_text(to_toml(value).encode("utf-8", "surrogatepass"), story, draw)


def spoil_value(value: Any, draw: Random) -> tuple[Any, list[str]]:
    """A parsed document with one to three changes."""
    holder = {"$": value}
    story = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        container, key, path = _descend(holder, draw)
        names, weights = zip(*((change, weight) for change, weight in _CHANGES), strict=True)
        change = draw.choices(names, weights)[0]
        story.append(f"{path} {change(container, key, draw, holder)}")
        # What a change took away or put around the document is there again.
        holder = {"$": holder.get("$", Raw(""))}
    return holder["$"], story


def to_json(value: Any) -> str:
    """As `json.dumps`, but for `Raw` parts, and cut where it grows beyond all measure."""
    return _joined(_written(value, ": ", json.dumps, _scalar))


def to_toml(value: Any) -> str:
    """A document of one line a key, all below it inline; what TOML cannot say is left as it is."""
    if not isinstance(value, dict):
        return _joined(_inline(value))
    lines = ((f"{_toml_text(str(key))} = ", *_inline(part), "\n") for key, part in value.items())
    return _joined(itertools.chain.from_iterable(lines))


def _joined(parts: Iterable[str]) -> str:
    kept, left = [], _MOST_WRITTEN
    for part in parts:
        kept.append(part[:left])
        left -= len(part)
        if left <= 0:
            break
    return "".join(kept)


def _written(
    value: Any, between: str, text: Callable[[str], str], scalar: Callable[[Any], str]
) -> Iterator[str]:
    """The parts of a text in order, by what writes keys and what writes all that holds nothing."""
    if isinstance(value, dict):
        yield "{"
        for number, (key, part) in enumerate(value.items()):
            yield (", " if number else "") + text(str(key)) + between
            yield from _written(part, between, text, scalar)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for number, part in enumerate(value):
            yield ", " if number else ""
            yield from _written(part, between, text, scalar)
        yield "]"
    else:
        yield value.text if isinstance(value, Raw) else scalar(value)


def _inline(value: Any) -> Iterator[str]:
    return _written(value, " = ", _toml_text, _toml_scalar)


def _toml_scalar(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return _toml_text(value) if isinstance(value, str) else _scalar(value)


def _toml_text(text: str) -> str:
    # Of escapes, TOML knows none for pairs of surrogates and needs one for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    # Integers beyond the digits that Python writes.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return ("-" if value < 0 else "") + "1" + "0" * 400
    return json.dumps(value, default=str)


def _descend(value: Any, draw: Random) -> tuple[Any, Any, str]:
    """A container, a key of it, and where that is; high places are met more often than deep."""
    container: Any = value
    key: Any = "$"
    path = "$"
    while True:
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.15:
            return container, key, path
        container = inner
        key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
        path += f".{key}" if isinstance(inner, dict) else f"[{key}]"


def _replace(container: Any, key: Any, draw: Random, _: Any) -> str:
    container[key] = hostile_value(draw)
    return f"= {shown(container[key])}"


def _retype(container: Any, key: Any, draw: Random, _: Any) -> str:
    old = container[key]
    wraps: tuple[Callable[[Any], Any], ...] = (
        lambda v: [v], lambda v: [v, v], lambda v: {"0": v}, lambda v: str(v)[:1000],
        lambda _: None,
    )  # fmt: skip
    container[key] = draw.choice(wraps)(old)
    return f"becomes {shown(container[key])}"


def _nudge(container: Any, key: Any, draw: Random, whole: Any) -> str:
    old = container[key]
    if isinstance(old, bool) or not isinstance(old, int | float | str):
        return _retype(container, key, draw, whole)
    if isinstance(old, str):
        words = (old[:-1], old + old, old.upper(), old + " ", old[::-1], "/" + old, old + "\x00")
        container[key] = draw.choice(words)
    else:
        container[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1000, old // 3))
    return f"was {shown(old)}, is {shown(container[key])}"


def _delete(container: Any, key: Any, _: Random, __: Any) -> str:
    del container[key]
    return "deleted"


def _add(container: Any, key: Any, draw: Random, _: Any) -> str:
    inner, value = container[key], hostile_value(draw)
    if isinstance(inner, list):
        inner.insert(draw.randint(0, len(inner)), value)
    elif isinstance(inner, dict):
        inner[draw.choice(STRINGS)] = value
    else:
        container[key] = [inner, value]
    return f"with {shown(value)} added"


def _rename(container: Any, key: Any, draw: Random, _: Any) -> str:
    new = draw.choice(STRINGS)
    if isinstance(container, dict):
        container[new] = container.pop(key)
    else:
        container[key] = new
    return f"named {shown(new)}"


def _copy(container: Any, key: Any, draw: Random, whole: Any) -> str:
    other, name, path = _descend(whole, draw)
    # A copy, because a document that holds itself cannot be written.
    container[key] = _duplicate(other[name])
    return f"= {path}"


def _repeat(container: Any, key: Any, draw: Random, _: Any) -> str:
    inner, times = container[key], draw.choice((2, 50, 2000))
    if isinstance(inner, list | str):
        container[key] = inner * min(times, 100_000 // max(len(inner), 1) + 1)
    else:
        container[key] = [inner] * 3
    return f"repeated {times} times"


def _duplicate(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _duplicate(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_duplicate(part) for part in value]
    return value


_CHANGES: tuple[tuple[Callable[[Any, Any, Random, Any], str], int], ...] = (
    (_replace, 45), (_nudge, 15), (_retype, 10), (_delete, 12), (_add, 6), (_rename, 5), (_copy, 5),
    (_repeat, 2),
)  # fmt: skip


def shown(value: Any) -> str:
    """A value in a few letters."""
    text = value.text if isinstance(value, Raw) else _scalar_or_repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


def _scalar_or_repr(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    return ascii(_scalar(value))[1:-1]


def spoil_text(text: bytes, draw: Random) -> Spoiled:
    """Text in another encoding, cut, or with bytes that do not belong there."""
    at = draw.randint(0, len(text))
    junk = draw.choice(
        (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"{", b"]", b'"')
    )
    ways: tuple[tuple[str, bytes], ...] = (
        (f"cut at {at}", text[:at]),
        ("empty", b""),
        ("with a byte order mark", b"\xef\xbb\xbf" + text),
        ("as UTF-16", text.decode("utf-8", "replace").encode("utf-16")),
        ("as UTF-32", text.decode("utf-8", "replace").encode("utf-32")),
        (f"with {junk!r} at {at}", text[:at] + junk + text[at:]),
        ("twice", text + text),
        ("behind 100 kB of spaces", b" " * 100_000 + text),
        ("gzip's magic", b"\x1f\x8b\x08" + text),
        ("open brackets alone", b"[" * draw.choice(_DEPTHS)),
        ("a bare word", draw.choice((b"null", b"1", b"true", b'"a"', b"NaN", b"[]", b"{}", b"\n"))),
    )
    story, data = draw.choice(ways)
    return data, (f"text {story}",)


def _maybe_spoil_text(data: bytes, story: list[str], draw: Random) -> Spoiled:
    if draw.random() >= 0.1:
        return data, tuple(story)
    spoiled, told = spoil_text(data, draw)
    return spoiled, (*story, *told)
