"""What README and docs/ tell a reader to type, write and open is really there."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import typer
import yaml
from command_line import run_cli
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_pytest_plugin import write_pair

from prox24_deploy.cli.main import app
from prox24_deploy.cli.options import hoist_common, join_shapes
from prox24_deploy.config.limits import read_limits
from prox24_deploy.config.recipe import parse_recipe
from prox24_deploy.model.blocks import find_blocks, target_layers
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.pruning.selection import require_matches
from prox24_deploy.pytest_plugin import AssertNoRegression

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
# Also written for readers, and linked from the pages.
ROOMS = ("docker", "benchmarks", "examples")
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "PACKAGE.md")]
OTHERS += [ROOT / room / "README.md" for room in ROOMS]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PROGRAM = "prox24-deploy"
MOST_LINES = 120
# Options of other programs that the pages name.
FOREIGN = {"--backend-config", "--detach-sign", "--type"}
# An option, not the end of another word.
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=page_id)


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return tuple(t for token in parsed for t in (token, *(token.children or ())))


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language; `toml limits` is one of its own."""
    return [t.content for t in tokens(page) if t.type == "fence" and t.info == language]


def inline_code(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def commands_in(page: Path) -> Iterator[list[str]]:
    """The words of every line of a block for the shell that calls this program."""
    for block in (
        *blocks(page, "sh"),
        *(t.content for t in tokens(page) if t.type == "code_block"),
    ):
        for line in block.replace("\\\n", " ").splitlines():
            # Behind `||` stands what a failure may be, behind `|` what reads the output.
            words = shlex.split(line.partition("|")[0], comments=True)
            if PROGRAM in words and not {"docker", "pip"} & set(words):
                yield words[words.index(PROGRAM) + 1 :]
            for i, word in enumerate(words):
                if re.fullmatch(r"examples/\w+\.sh", word):
                    assert (ROOT / word).is_file(), word
                    yield ["build", "model", *words[i + 1 :]]


def command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words select, and the rest of the words."""
    found: Any = ROOT_COMMAND
    for i, word in enumerate(words):
        # Commands of typer are of no public class.
        if not hasattr(found, "commands"):
            return found, words[i:]
        assert word in found.commands, f"{PROGRAM} has no command {' '.join(words)}"
        found = found.commands[word]
    return found, []


def leaves(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by what is typed for it."""
    if not hasattr(group, "commands"):
        yield path, group
        return
    for name, inner in group.commands.items():
        yield from leaves(inner, f"{path} {name}".strip())


def options_of(found: Any) -> set[str]:
    options = [p for p in found.params if p.param_type_name == "option"]
    return {name for option in options for name in (*option.opts, *option.secondary_opts)}


ROOT_COMMAND: Any = typer.main.get_command(app)
LEAVES = dict(leaves(ROOT_COMMAND))
OPTIONS = {"--help"}.union(options_of(ROOT_COMMAND), *map(options_of, LEAVES.values()))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_a_job_of_kubernetes_starts_a_command_that_is_there() -> None:
    shown = [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml job")]
    containers = [each for job in shown for each in job["spec"]["template"]["spec"]["containers"]]
    assert len(containers) == 1
    for container in containers:
        command, *given = container["args"][container["args"].index("prox24_deploy") + 1 :]
        options = {word.partition("=")[0] for word in given if word.startswith("-")}
        assert options <= options_of(LEAVES[command])


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_a_line_for_the_shell_is_understood_by_the_command_line(page: Path) -> None:
    for words in commands_in(page):
        found, rest = command([w for w in hoist_common(join_shapes(words)) if w != "--debug"])
        # Parses types, ranges and choices, and misses what is required.
        found.make_context(PROGRAM, rest)


def test_the_pages_show_every_way_to_the_shell() -> None:
    shown = [words[0] for page in PAGES for words in commands_in(page)]
    assert {"build", "verify", "check", "compare", "baseline", "plan", "package"} <= set(shown)


@pages
def test_code_in_a_sentence_names_options_and_commands_that_are_there(page: Path) -> None:
    for code in inline_code(page):
        assert set(OPTION.findall(code)) <= OPTIONS | FOREIGN, code
        if code.startswith(f"{PROGRAM} "):
            command(shlex.split(code)[1:])


def test_the_pages_name_every_command_and_option() -> None:
    named = {name for page in DOCS for code in inline_code(page) for name in OPTION.findall(code)}
    assert {option for option in OPTIONS if option.startswith("--")} <= named
    said = inline_code(ROOT / "docs" / "cli.md")
    for name in LEAVES:
        assert any(f"{code} ".startswith(f"{name} ") for code in said), name


@pages
def test_limits_in_toml_are_read(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml limits"):
        file = tmp_path / "limits.toml"
        file.write_text(text, encoding="utf-8")
        given = read_limits(file)
        assert given.metrics or given.against_dense


@pages
def test_runs_in_toml_are_read(page: Path, tmp_path: Path) -> None:
    (tmp_path / "my-llama").mkdir()
    for text in blocks(page, "toml run"):
        file = tmp_path / "run.toml"
        file.write_text(text, encoding="utf-8")
        run = run_cli("build", "--config", file, "--print-config")
        assert run.code == 0, run.err
        assert f'model = "{tmp_path}/my-llama"' in run.out


def test_the_recipe_fits_the_model_that_it_is_for(tiny_bert: Path) -> None:
    """Parts of it follow the whole one to which they are added."""
    text = "\n".join(blocks(ROOT / "docs" / "recipes.md", "toml recipe"))
    recipe = parse_recipe(text, "docs/recipes.md")
    assert recipe.model_fields_set >= {"embedding", "overrides", "limits"}
    model = load_model(open_model_dir(tiny_bert), recipe, torch.device("cpu"))
    require_matches(recipe, model)
    assert len(target_layers(find_blocks(model, recipe)[0], recipe)) == 6


def test_recipes_stand_on_their_page() -> None:
    assert [page.name for page in PAGES if blocks(page, "toml recipe")] == ["recipes.md"]


@pages
def test_json_is_json_line_by_line(page: Path) -> None:
    for line in (line for text in blocks(page, "json") for line in text.splitlines()):
        assert isinstance(json.loads(line), dict)


@pages
def test_no_block_goes_untested_for_want_of_a_language(page: Path) -> None:
    known = {"sh", "text", "json", "python", "yaml action", "yaml job"}
    known |= {f"toml {kind}" for kind in ("limits", "recipe", "run")}
    assert {token.info for token in tokens(page) if token.type == "fence"} <= known


@pytest.mark.parametrize(
    # `test_python.py` runs the page of the Python API, `test_tutorials.py` those that go together.
    "page",
    [page for page in PAGES if page.name != "python.md" and page not in TUTORIALS],
    ids=page_id,
)
def test_python_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_no_regression: AssertNoRegression,
) -> None:
    """In a folder with a release, its baseline and limits; a test in it is run as pytest does."""
    write_pair(tmp_path, after=0.95, before=0.95)
    (tmp_path / "release").mkdir()
    (tmp_path / "report.json").rename(tmp_path / "release" / "report.json")
    (tmp_path / "limits.toml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "python"):
        names: dict[str, object] = {}
        exec(compile(ast.parse(text), page.name, "exec"), names)
        for name, found in names.items():
            if name.startswith("test_") and callable(found):
                found(assert_no_regression)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found = tokens(page)
    titles = [found[i + 1].content for i, t in enumerate(found) if t.type == "heading_open"]
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    targets = [str(t.attrs["href"]) for t in tokens(page) if t.type == "link_open"]
    targets += [str(t.attrs["src"]) for t in tokens(page) if t.type == "image"]
    for target in targets:
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = unquote(target).partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS:
        linked = [
            (other.parent / str(t.attrs["href"]).partition("#")[0]).resolve()
            for other in DOCS
            if other != page
            for t in tokens(other)
            if t.type == "link_open"
        ]
        assert f"({page_id(page)}" in text or page in linked, page.name


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_files_and_targets_of_make_that_a_page_names_are_there(page: Path) -> None:
    made = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    for code in inline_code(page):
        for target in re.findall(r"^make (\w+)$", code):
            assert target in made, code
        for name in re.findall(r"(?<![\w/])(?:benchmarks|tests|docs|docker)/[\w/.-]+\.\w+", code):
            assert (ROOT / name).exists(), code


def test_pages_that_the_code_cites_are_there() -> None:
    """In messages, docstrings, recipes and templates."""
    for folder in ("prox24_deploy", "export"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".toml", ".jinja"}:
                text = file.read_text(encoding="utf-8")
                assert "README, " not in text, file
                for name in re.findall(r"\b(?:docs|docker)/[\w-]+\.md\b", text):
                    assert (ROOT / name).is_file(), file


@pages
def test_the_site_reads_lists_and_blocks_as_github_does(page: Path) -> None:
    """Its reader of Markdown wants four columns, and a blank line before a list."""
    item, before, fenced = re.compile(r"(?:[*-]|\d+\.) "), "", False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            assert len(line) - len(line.lstrip()) in (0, 4), line
            fenced = not fenced
        elif not fenced and item.match(line):
            assert not before or before.startswith(" ") or item.match(before), line
        before = line


def test_the_site_has_every_page_once() -> None:
    """`make docs` builds it; its own checks are not needed for this one."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- ([\w/-]+\.md)$", text, flags=re.M)
    assert len(set(listed)) == len(listed)
    made = {name for name in listed if name.startswith(("reference/", "project/"))}
    assert set(listed) - made == {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}
    hooks = (ROOT / "docs" / "site" / "hooks.py").read_text(encoding="utf-8")
    for name in made:
        assert f'"{name}"' in hooks, name
