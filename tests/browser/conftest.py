"""Debian's Chromium, driven by playwright, for `make browser`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.looks import patient

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
ALONE = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
ALONE = [f"--{each}" for each in (*ALONE, "disable-component-update", "disable-sync")]
"""It runs as root in containers, and asks nobody for anything."""


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """One for the session, with a profile of its own that is thrown away."""
    if not CHROMIUM:
        pytest.skip("no chromium is installed: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser installs it")
    with driver.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield running
        running.close()


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    context = patient(browser)
    yield context.new_page()
    context.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures of real runs go: `make screenshots` names docs/images."""
    folder = Path(os.environ.get("FINELOOP_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
