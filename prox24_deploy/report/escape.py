"""Text of others in the views of a report: it is shown, whatever the language of the view is.

Names of modules, classes, files and folders come from whoever made the model.
"""

import keyword
import re
from typing import Any

from markupsafe import Markup, escape

from prox24_deploy.core.printable import printable

# XML 1.0 has no way to write these, not even escaped.
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNS = re.compile(r"([\\`*\[\]|<>&#~])")
# Readers of Markdown make links of these, also where their signs are escaped.
_LINK = re.compile(r"://|www\.|@|mailto:|xmpp:", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_UNKNOWN_CLASS = "AutoModel"


def markdown(text: object) -> str:
    """Text that Markdown, and the HTML in it, leaves as it is; also within a table."""
    words = str(text).split()
    return " ".join(code(word) if _LINK.search(word) else _escaped(word) for word in words)


def code(text: object) -> str:
    """A name as a code span, also within a table."""
    shown = printable(" ".join(str(text).replace("`", "'").split()))
    return f"`{shown}`".replace("|", "\\|") if shown else "–"


def plain_name(text: str) -> str:
    """A name as text where nothing in it means anything in Markdown, else as a code span."""
    plain = _PLAIN_NAME.fullmatch(text) and not text.lower().startswith("www.")
    return text if plain else code(text)


def class_name(text: str) -> str:
    """The name of a class as code may have it, where it can be one; else that of any model."""
    usable = text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
    return text if usable and text != "unknown" else _UNKNOWN_CLASS


def xml_text(text: str) -> str:
    """Text without what XML 1.0 cannot hold, and without what acts on a terminal."""
    return printable(_NOT_IN_XML.sub("\ufffd", text), keep="\t\n\r")


def shown(value: Any) -> Any:
    """A value of a template: text of others loses what hides or turns it; ours is `Markup`."""
    return printable(value, keep="\t\n\r") if type(value) is str else value


def prose(text: str) -> Markup:
    """Text on a page; no line of it ends within the name of an option."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(shown(text)))))


def drawing(svg: str) -> Markup:
    """A drawing of ours, in which names are escaped already."""
    return Markup(shown(svg))


def _escaped(text: str) -> str:
    return _SIGNS.sub(r"\\\1", printable(text))
