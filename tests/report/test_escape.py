"""Names in Markdown, HTML and XML are shown as they are and mean nothing there."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from builders import make_records
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prox24_deploy.packaging.card import SourceCard, render_card
from prox24_deploy.report.assemble import Report
from prox24_deploy.report.escape import class_name, code, markdown, plain_name, prose, xml_text
from prox24_deploy.report.render import render_benchmark, render_html, render_junit, render_summary

PLAIN = SourceCard(metadata={}, text="")
HOSTILE = {
    "html": "X\n\n<script>alert(1)</script>\n\n# Owned",
    "heading": "X\n# Owned\n\nVerdict: pass",
    "heading below": "X\n=====",
    "image": "![x](https://evil.example/x.png)",
    "link": "[x](javascript:alert(1))",
    "bare link": "https://evil.example/a_b",
    "bare host": "www.evil.example",
    "mail": "a@evil.example",
    "autolink": "<https://evil.example>",
    "reference": "[x]: https://evil.example",
    "entities": "&lt;b&gt; &#58; https&#58;//evil.example",
    "fence": "X\n```\n# Owned\n",
    "tick": "a`b``c",
    "cell": "a|b\\|c",
    "indent": "X\n\n    import os\n",
    "escapes": "\x1b]8;;https://evil.example\x07\x9b2J",
    "bidi": "\u202egnp.exe\u2066",
    "comment": "<!-- a --> b",
    "front matter": "X\n---\nlicense: mit\n---\n",
}
# What only the text of others can bring into a view.
ACTIVE = {"html_inline", "html_block", "image", "link_open"}


def tokens(text: str) -> list[Token]:
    found = MarkdownIt("commonmark").enable("table").parse(text)
    return [inner for token in found for inner in (token, *(token.children or ()))]


def hostile_report(text: str) -> Report:
    """A report whose model, layers, checks and warnings are named by somebody else."""
    records = make_records()
    layers = tuple(
        replace(layer, name=f"{text}.{i}") for i, layer in enumerate(records.prune.layers)
    )
    skipped = replace(layers[-1], status="skipped", reason=text)
    model = replace(
        records.model, architecture=text, model_type=text, path=f"/models/{text.replace('/', '')}"
    )
    moved = replace(records, model=model, prune=replace(records.prune, layers=(*layers, skipped)))
    report = moved.report()
    checks = tuple(
        check.model_copy(update={"name": text, "message": text}) for check in report.checks
    )
    update = {"warnings": (text,), "checks": checks, "regressions": checks[:1]}
    return report.model_copy(update=update)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("view", ["card", "summary"])
def test_markdown_has_no_more_headings_links_or_html_than_it_has_without(
    view: str, text: str
) -> None:
    def render(report: Report) -> str:
        if view == "summary":
            return render_summary(report)
        return render_card(report, replace(PLAIN, problem=text)).split("---\n", 2)[2]

    found, known = tokens(render(hostile_report(text))), tokens(render(hostile_report("name")))
    for kind in ("heading_open", "fence", "code_block", "hr", "table_open", "td_open"):
        count = sum(token.type == kind for token in known)
        assert sum(token.type == kind for token in found) == count, kind
    links = [token for token in found if token.type in ACTIVE]
    assert links == [token for token in known if token.type in ACTIVE]
    # No reader makes a link of what is code.
    bare = " ".join(token.content for token in found if token.type == "text")
    assert not re.search(r"(://|www\.|@)evil\.example", bare)
    assert all(line.isprintable() for token in found for line in token.content.split("\n"))


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["x" * 1_000_000, "x " * 300_000, "@" * 300_000, ":/" * 300_000])
def test_a_long_text_is_escaped_in_time(text: str) -> None:
    assert markdown(text).replace("\\", "").strip("`") == text.strip()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_pages_and_lists_of_tests_show_no_more_than_text(text: str) -> None:
    report = hostile_report(text)
    page, known = Page(render_html(report)), Page(render_html(hostile_report("name")))
    assert "script" not in page.tags
    assert sorted(set(page.tags)) == sorted(set(known.tags))
    for view in (page.text, render_junit(report).decode(), render_benchmark(report).decode()):
        assert not any(ord(c) < 32 and c not in "\t\n\r" for c in view)
        assert not set(view) & set("\u202e\u2066\x9b")


def test_no_line_of_a_page_ends_within_an_option() -> None:
    found = prose("pass --calibration-tokens 9, or <b>, a -- b or well--known")
    assert found == (
        'pass <span class="option">--calibration-tokens</span> 9, or &lt;b&gt;, a -- b or '
        "well--known"
    )


@settings(max_examples=200)
@given(st.text(max_size=30) | st.text(alphabet="ab &#<>[]()!`|\\*_~:/@.w\n-=", max_size=30))
def test_a_text_is_shown_as_its_words(text: str) -> None:
    # Behind a word, as all of it stands.
    found = tokens(f"a {markdown(text)} z")
    assert not [token for token in found if token.type in ACTIVE]
    assert [token.type for token in found if token.level == 0][:1] == ["paragraph_open"]
    assert not [token for token in found if token.type in {"heading_open", "fence", "hr"}]


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_a_name_is_one_span_of_code(text: str) -> None:
    spans = [token for token in tokens(f"a {code(text)} z") if token.type == "code_inline"]
    assert len(spans) == (1 if code(text) != "–" else 0)


@pytest.mark.parametrize("name", ["bert", "bert-base-uncased", "all-MiniLM-L6-v2", "a.b_c", "7"])
def test_names_of_models_are_plain(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize("name", ["a b", "-a", "_a_", "a#", "www.a.b", "é", "", "a\n"])
def test_any_other_name_is_code(name: str) -> None:
    assert plain_name(name) == code(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertModel", "BertModel"),
        ("unknown", "AutoModel"),
        ("X\nimport os", "AutoModel"),
        ("import", "AutoModel"),
        ("Größe", "AutoModel"),
        ("a.b", "AutoModel"),
    ],
)
def test_only_a_class_is_imported_in_the_example(name: str, expected: str) -> None:
    assert class_name(name) == expected
    model = replace(make_records().model, architecture=name)
    card = render_card(replace(make_records(), model=model).report(), PLAIN)
    assert f"\n    from transformers import {expected}\n    model = {expected}.from_pre" in card


def test_text_of_the_source_card_stays_as_its_authors_wrote_it() -> None:
    text = "# Title\n\nنام\u200cه \u200fRTL [x](https://a.example)"
    assert text in render_card(make_records().report(), replace(PLAIN, text=text))


def test_xml_has_no_character_that_it_cannot_hold() -> None:
    assert xml_text("a\x00\ufffe\x1b\u202e\x9b\n") == "a\ufffd\ufffd\ufffd\\u202e\\x9b\n"
