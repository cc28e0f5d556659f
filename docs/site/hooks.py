"""What MkDocs does to the pages of docs/, which GitHub shows as they are; see mkdocs.yml.

Pages that lie elsewhere in the repository join the site, the reference is written from the code,
and the names of blocks that tests read are cut down to a language.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# Pages outside docs/ and their names on the site.
PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "docker/README.md": "project/container.md",
    "examples/README.md": "project/examples.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
# In a cell of a table; MkDocs would show the backslash.
BARRED = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")
BLOCK = re.compile(r"^( *)```(\w+) \w+$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the project's own pages and the reference."""
    for source, name in PROJECT.items():
        files.append(File.generated(config, name, content=_project_page(source)))
    files.append(File.generated(config, "reference/cli.md", content="\n".join(_commands())))
    files.append(File.generated(config, "reference/python.md", content="\n".join(_python())))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Cut the names of blocks, and lead links out of docs/ to the site's own pages."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def lead(link: re.Match[str]) -> str:
        label, target = link.groups()
        path, _, anchor = target.partition("#")
        if ":" in path or not path:
            return link.group()
        return _on_site(label, (folder / path).resolve(), anchor, folder) or link.group()

    return BLOCK.sub(r"\1```\2", BARRED.sub(_coded, LINK.sub(lead, markdown)))


def _coded(code: re.Match[str]) -> str:
    text = html.escape(code[1].replace("\\|", "|")).replace("|", "&#124;")
    return f"<code>{text}</code>"


def _on_site(label: str, path: Path, anchor: str, folder: Path) -> str | None:
    """A link to a file of the repository outside docs/; its label alone where it is no page."""
    docs = ROOT / "docs"
    if path.is_relative_to(docs) or not path.exists():
        return None
    name = PROJECT.get(path.relative_to(ROOT).as_posix())
    if path == ROOT / "README.md":
        name = "README.md"
    if name is None:
        return label
    up = "../" * len(folder.relative_to(docs).parts)
    return f"[{label}]({up}{name}{'#' * bool(anchor)}{anchor})"


def _project_page(source: str) -> str:
    """Its text, with links as seen from docs/project/."""
    path = ROOT / source

    def move(link: re.Match[str]) -> str:
        label, target = link.groups()
        name, _, anchor = target.partition("#")
        if ":" in name or not name:
            return link.group()
        end = f"{'#' * bool(anchor)}{anchor}"
        found = (path.parent / name).resolve()
        if found.is_relative_to(ROOT / "docs"):
            return f"[{label}](../{found.relative_to(ROOT / 'docs').as_posix()}{end})"
        return _on_site(label, found, anchor, ROOT / "docs" / "project") or link.group()

    return LINK.sub(move, path.read_text(encoding="utf-8"))


def _commands() -> Iterator[str]:
    """Every command with its arguments and options, from the application itself."""
    import typer

    from prox24_deploy.cli.main import app

    yield "# Commands and options\n\nWritten from the program. See [Command line](../cli.md).\n"
    root = typer.main.get_command(app)
    yield from _parameters(root, "prox24-deploy")
    yield from _group(root, "")


def _group(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        full = f"{path} {name}".strip()
        if hasattr(command, "commands"):
            yield from _group(command, full)
            continue
        yield f"## {full}\n\n{_plain(command.help)}\n"
        yield from _parameters(command, full)


def _parameters(command: Any, name: str) -> Iterator[str]:
    """A table for each group of options."""
    context = command.make_context(name, [], resilient_parsing=True)
    groups: dict[str, list[str]] = {}
    for given in command.params:
        shown = given.get_help_record(context)
        if shown is None:
            continue
        title = getattr(given, "rich_help_panel", None) or given.param_type_name.title() + "s"
        names, text = (_cell(part) for part in shown)
        groups.setdefault(title, []).append(f"| `{names}` | {text} |")
    for title, rows in groups.items():
        yield "\n".join([f"| {title} | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _python() -> Iterator[str]:
    """Every public name, where it is defined; mkdocstrings fills it in."""
    import prox24_deploy as p24

    yield "# Python API\n\nWritten from the docstrings. See [Python](../python.md).\n"
    for name in p24.__all__:
        if not name.startswith("__"):
            home = p24._HOME_OF.get(name, "core.errors")
            yield f"::: prox24_deploy.{home}.{name}\n"
