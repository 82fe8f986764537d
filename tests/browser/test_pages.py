"""The pages that Fineloop writes, in a real browser."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from components.report.report import build_report
from components.report.run_files import Wrong
from components.store.store import Store
from tests.browser import pages
from tests.browser.looks import check, patient

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


def go_to(file: Path, page: "Page") -> None:
    page.goto(file.as_uri())


def test_every_page_reads_well_on_every_screen(browser: "Browser", store: Store, tmp_path: Path) -> None:
    for name, html in pages.all_pages(store):
        file = tmp_path / f"{name}.html"
        file.write_text(html, encoding="utf-8")
        check(browser, partial(go_to, file))


def test_a_search_leaves_the_wrong_answers_that_have_every_word(browser: "Browser", tmp_path: Path) -> None:
    file, wrong = tmp_path / "report.html", pages.wrong_answers(pages.WRONG)
    file.write_text(pages.reports()["report"], encoding="utf-8")
    context = patient(browser)
    page = context.new_page()
    page.goto(file.as_uri())
    page.get_by_text(f"All {pages.WRONG} wrong answers").click()
    page.get_by_label("Search").fill("SKIN femur")
    shown = page.locator("#wrong tr:visible")
    texts = [f"{each.id} {each.prompt} {each.reference} {each.answer}".lower() for each in wrong]
    expected = sum("skin" in text and "femur" in text for text in texts)
    assert 0 < expected < 5
    assert shown.count() == expected
    assert page.locator(".search output").inner_text() == f"{expected} of {pages.WRONG}"
    page.get_by_label("Search").fill("")
    assert shown.count() == pages.WRONG
    context.close()


def test_ten_thousand_wrong_answers_are_searched_and_drawn_as_they_are_asked_for(
    browser: "Browser", tmp_path: Path
) -> None:
    wrong = pages.wrong_answers(10_000)
    file = tmp_path / "report.html"
    file.write_text(build_report(replace(pages.full_run(), wrong=wrong)), encoding="utf-8")
    context = patient(browser)
    page = context.new_page()
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
    context.close()


def test_a_script_that_came_with_data_does_not_run(browser: "Browser", tmp_path: Path) -> None:
    """Even where it had got past the escaping: the page's policy names its own script alone."""
    file = tmp_path / "report.html"
    injected = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"></main>"
    file.write_text(pages.reports()["report"].replace("</main>", injected), encoding="utf-8")
    context = patient(browser)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.title().startswith("Promoted")
    assert page.get_by_label("Search").count() == 1
    context.close()
