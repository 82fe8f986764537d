"""The documentation's pictures: of runs of the built-in example, through the commands that its pages show."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.looks import HEIGHT, WIDTHS, check, opened, patient, take
from tests.pipelines.command_line import ROOT, body, fineloop
from tests.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOME = os.environ.get("FINELOOP_PICTURED", "")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not HOME, reason="`make screenshots` names the home of the runs that it takes pictures of"),
]
NOTE = "two epochs, does it help?"


@pytest.fixture(scope="module")
def two_runs() -> list[str]:
    """Ids of two runs in the home, the first of a new adapter; they are started here if the home has none yet."""
    home = Path(HOME)
    for options in ([], ["--set", "train.epochs=2", "--note", NOTE])[len([*home.glob("runs/*")]) :]:
        done = fineloop("run", "--home", home, *options, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    listed = fineloop("runs", "list", "--store", "--home", HOME, "--json", cwd=ROOT)
    runs: list[dict[str, str]] = body(listed)["runs"]
    return [run["run_id"] for run in reversed(runs)]


def test_pictures_of_the_pages_of_two_runs(
    browser: "Browser", two_runs: list[str], pictures: Path, tmp_path: Path
) -> None:
    home, beside = Path(HOME), tmp_path / "side-by-side.html"
    done = fineloop("compare", *two_runs, "--home", home, "--html", beside, "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = {
        "report": home / "runs" / two_runs[0] / "report.html",
        "compare": beside,
        "registry": home / "pages" / "index.html",
        "adapter": home / "pages" / "icd10-chapters.html",
    }
    for name, file in pages.items():
        check(browser, opened(file), pictures / f"{name}.png")


@contextmanager
def served() -> Iterator[str]:
    """The page's address, as `fineloop serve` prints it."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", "icd10-chapters", "--port", "0", "--home", HOME]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        yield next(line for line in process.stderr if "a page at http://" in line).split()[-1]
    finally:
        process.terminate()
        process.communicate()


def test_a_picture_of_a_conversation_with_the_adapter(browser: "Browser", two_runs: list[str], pictures: Path) -> None:
    """Of one prompt, stopped in the midst of what the base says. `test_chat_page` judges the page."""
    context = patient(browser, viewport={"width": WIDTHS[0], "height": HEIGHT}, color_scheme="light")
    context.set_default_timeout(600_000)
    with served() as address:
        page = context.new_page()
        page.goto(address)
        page.get_by_label("Message (Enter sends").fill("ICD-10 chapter: Kwashiorkor")
        page.get_by_role("button", name="Send").click()
        base = page.locator("section").nth(1)
        wait_until(lambda: len(base.inner_text()) > 250, base.inner_text)
        page.get_by_role("button", name="Stop this answer").click()
        page.locator("#send:enabled").wait_for()
        page.evaluate("scrollTo(0, 0)")
        take(page, pictures / "chat.png")
    context.close()
