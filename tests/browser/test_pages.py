"""The pages that Fineloop writes, in a real browser."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from components.report.report import build_report
from components.report.run_files import Wrong
from components.store.store import Store
from tests.browser import pages
from tests.browser.looks import check, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


def test_every_page_reads_well_on_every_screen(browser: "Browser", store: Store, tmp_path: Path) -> None:
    for name, html in pages.all_pages(store):
        file = tmp_path / f"{name}.html"
        file.write_text(html, encoding="utf-8")
        check(browser, opened(file))


def test_ten_thousand_wrong_answers_are_searched_and_drawn_as_they_are_asked_for(page: "Page", tmp_path: Path) -> None:
    wrong = pages.wrong_answers(10_000)
    file = tmp_path / "report.html"
    file.write_text(build_report(replace(pages.full_run(), wrong=wrong)), encoding="utf-8")
    page.goto(file.as_uri())
    page.get_by_text("All 10,000 wrong answers").click()
    rows, more = page.locator("#wrong tr"), page.get_by_role("button", name="Show more")

    def texts(each: Wrong) -> list[str]:
        return [f"{each.prompt}{each.id}", each.reference, each.answer]

    def drawn() -> list[list[str]]:
        return rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")

    assert drawn() == [*map(texts, wrong[:100])]
    more.click()
    assert drawn() == [*map(texts, wrong[:200])]
    page.get_by_label("Search").fill("icd-9999")
    assert drawn() == [texts(wrong[9999])]
    assert more.count() == 0
    page.get_by_label("Search").fill("skin FEMUR")
    found = [each for each in wrong if "Skin" in each.reference + each.answer and "femur" in each.prompt]
    assert drawn() == [*map(texts, found[:100])]
    assert page.locator(".search output").inner_text() == f"{len(found)} of 10000"
    more.click()
    assert drawn() == [*map(texts, found[:200])]
    page.get_by_label("Search").fill("")
    assert drawn()[:100] == [*map(texts, wrong[:100])]


def test_a_script_that_came_with_data_does_not_run(page: "Page", tmp_path: Path) -> None:
    """Even where it had got past the escaping: the page's policy names its own script alone."""
    file = tmp_path / "report.html"
    injected = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"></main>"
    file.write_text(pages.reports()["report"].replace("</main>", injected), encoding="utf-8")
    page.goto(file.as_uri())
    assert page.title().startswith("Promoted")
    assert page.get_by_label("Search").count() == 1
