"""The Chromium of this machine, without a screen."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page may ask for the network, or what it asks for drowns.
QUIET = (
    "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip


def find_chromium() -> str | None:
    """Path of the first browser found by name; None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def running_chromium() -> "Iterator[Browser]":
    """One browser; each page that is opened in it has its own settings."""
    # Not at the top: machines that run other tests may lack it, and conftest imports this.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=QUIET)
        try:
            yield browser
        finally:
            browser.close()
