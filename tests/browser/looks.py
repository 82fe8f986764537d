"""What every page is held to, in both colour schemes and at both widths: axe-core finds nothing, nothing scrolls
sideways, and nothing goes wrong in the console."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
HEIGHT = 900
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def patient(browser: "Browser", **how: Any) -> "BrowserContext":
    """Pages of their own, which wait as long as a busy machine needs."""
    context = browser.new_context(**how)
    context.set_default_timeout(120_000)
    return context


def opened(file: Path) -> "Callable[[Page], object]":
    return lambda page: page.goto(file.as_uri())


def take(page: "Page", picture: Path) -> None:
    """The top of the page."""
    box = page.locator("main").bounding_box()
    assert box
    page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": WIDTHS[0], "height": min(box["height"], HEIGHT)})


def check(browser: "Browser", begin: "Callable[[Page], object]", picture: Path | None = None) -> None:
    """`begin` brings a page to where it is judged. What folds may be closed or open; axe-core looks when it is open."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme, width in product(SCHEMES, WIDTHS):
        context = patient(browser, viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
        page, complaints = context.new_page(), list[str]()
        page.on("console", lambda message, to=complaints: to.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
        begin(page)
        if picture is not None and (scheme, width) == ("light", 1280):
            take(page, picture)
        wide = [page.evaluate(OVERFLOW)]
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        wide.append(page.evaluate(OVERFLOW))
        found = Axe().run(page).response["violations"]
        said = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
        assert (said, wide, complaints) == ([], [0, 0], []), f"{page.url}, {scheme}, {width} px"
        context.close()
