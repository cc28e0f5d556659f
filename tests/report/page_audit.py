"""What is wrong with a page, as a browser and a reader with any senses meet it."""

import importlib.resources
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, Page

AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js")
GRAVE = {"serious", "critical"}
LOUD = {"error", "warning"}
MOST_TABS = 60
OPEN_ALL = "() => document.querySelectorAll('details').forEach(part => part.open = true)"
# Overflow of the page, plots that nobody sees, and tables that no key scrolls.
GEOMETRY = """() => {
  const faults = [], room = document.documentElement.clientWidth;
  const wide = document.documentElement.scrollWidth;
  if (wide > room) faults.push(`page: ${wide} px wide in ${room}`);
  for (const plot of document.querySelectorAll('svg[role=img]')) {
    const box = plot.getBoundingClientRect(), name = plot.querySelector('title')?.textContent;
    if (box.width < 100 || box.height < 40)
      faults.push(`plot ${name}: ${box.width} x ${box.height}`);
    if (box.left < 0 || box.right > room) faults.push(`plot ${name}: beyond the page`);
    for (const text of plot.querySelectorAll('text')) {
      const words = text.getBoundingClientRect();
      if (words.left < box.left - 1 || words.right > box.right + 1 || words.top < box.top - 1
          || words.bottom > box.bottom + 1)
        faults.push(`plot ${name}: '${text.textContent}' is cut`);
    }
    const texts = [...plot.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (across > 1 && down > 3)
        faults.push(`plot ${name}: '${a.textContent}' overlaps '${b.textContent}'`);
    }));
  }
  for (const part of document.querySelectorAll('body *')) {
    const scrolls = ['auto', 'scroll'].includes(getComputedStyle(part).overflowX);
    const fits = part.scrollWidth <= part.clientWidth && part.scrollHeight <= part.clientHeight;
    if (!scrolls || fits || !part.checkVisibility()) continue;
    const label = part.getAttribute('aria-label');
    // Not by focus(): Chromium lets every scroller take it, other browsers do not.
    if (part.tabIndex < 0) faults.push(`scrolling ${label}: not focusable`);
    if (part.getAttribute('role') !== 'region' || !label)
      faults.push(`scrolling ${part.className}: no region with a label`);
  }
  return faults;
}"""
HIDDEN_IN_PRINT = """() => [...document.querySelectorAll('table')].filter(
  table => !table.checkVisibility({contentVisibilityAuto: true}) || !table.clientHeight
).map(table => `table ${table.parentElement.getAttribute('aria-label')}: not printed`)"""
FOCUS = """() => {
  const now = document.activeElement;
  if (now === document.body) return null;
  const name = now.getAttribute('aria-label') || now.textContent.trim().replace(/\\s+/g, ' ');
  const style = getComputedStyle(now);
  return [name, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1];
}"""


@dataclass(frozen=True, slots=True)
class View:
    """How a page is looked at; axe-core sees it as it opens, or with every table unfolded.

    Contrast is by far the slowest of its rules; width does not change `colours`.
    """

    width: int
    scheme: Literal["light", "dark"] = "light"
    media: Literal["screen", "print"] = "screen"
    unfolded: bool = False
    colours: bool = True


@dataclass(frozen=True, slots=True)
class Audit:
    """Every fault in words; `advice` is what axe finds that keeps nobody out."""

    faults: tuple[str, ...]
    advice: tuple[str, ...]


@contextmanager
def opened(browser: Browser, path: Path, view: View) -> Iterator[tuple[Page, list[str]]]:
    """The page, and what it said and asked for until now."""
    context = browser.new_context(
        viewport={"width": view.width, "height": 900}, color_scheme=view.scheme
    )
    page = context.new_page()
    page.emulate_media(media=view.media, color_scheme=view.scheme)
    heard: list[str] = []
    page.on(
        "console",
        lambda said: heard.append(f"console: {said.text}") if said.type in LOUD else None,
    )
    page.on("pageerror", lambda error: heard.append(f"script: {error}"))
    page.on(
        "request",
        lambda sent: heard.append(f"request: {sent.url}") if sent.url != path.as_uri() else None,
    )
    try:
        page.goto(path.as_uri())
        yield page, heard
    finally:
        context.close()


def audit(browser: Browser, path: Path, view: View) -> Audit:
    """Look at a page, go through it with the tabulator key, and let axe-core look."""
    with opened(browser, path, view) as (page, heard):
        found = [*page.evaluate(GEOMETRY), *_unnamed_plots(page)]
        found += unprinted(page) if view.media == "print" else _unseen_focus(page)
        if view.unfolded:
            page.evaluate(OPEN_ALL)
        violations = _axe(page, colours=view.colours)
        page.evaluate(OPEN_ALL)
        found += page.evaluate(GEOMETRY)
        faults = [*heard, *found, *(_words(v) for v in violations if v["impact"] in GRAVE)]
        advice = [_words(v) for v in violations if v["impact"] not in GRAVE]
    return Audit(tuple(dict.fromkeys(faults)), tuple(advice))


def unprinted(page: Page) -> list[str]:
    """The tables that stay folded on paper."""
    found: list[str] = page.evaluate(HIDDEN_IN_PRINT)
    return found


def axe_version() -> str:
    """Version of the axe-core at hand."""
    found = re.match(r"/\*! axe v([0-9.]+)", AXE.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def _unnamed_plots(page: Page) -> Iterator[str]:
    plots = page.locator("svg[role=img]").count()
    named = page.get_by_role("img", name=re.compile(r"\w")).count()
    if named != plots:
        yield f"plots: {named} of {plots} have a name"


def _unseen_focus(page: Page) -> Iterator[str]:
    """Where the tabulator key goes and shows nothing."""
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS)
        if focus is None:
            return
        name, outlined = focus
        if not outlined:
            yield f"focus on {name}: no outline"


def _axe(page: Page, *, colours: bool) -> list[dict[str, Any]]:
    page.evaluate(AXE.read_text(encoding="utf-8"))
    rules = {"color-contrast": {"enabled": colours}}
    options = json.dumps({"resultTypes": ["violations"], "rules": rules})
    found: list[dict[str, Any]] = page.evaluate(f"axe.run({options}).then(r => r.violations)")
    return found


def _words(violation: dict[str, Any]) -> str:
    places = ", ".join(str(node["target"][0]) for node in violation["nodes"][:3])
    return f"axe, {violation['impact']}, {violation['id']}: {violation['help']} ({places})"
