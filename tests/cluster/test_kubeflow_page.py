"""A run in Kubeflow's own page, in the browser of `make browser`; `--host` is the page's address.

Judged by what upstream's page shows and does: it is not ours.
"""

from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import browser
from tests.cluster.live import Live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["browser"]
pytestmark = pytest.mark.cluster

SHOWN_MS = 60_000  # the page asks Kubeflow's metadata for each layer of a graph


def opened(browser: "Browser", live: Live, run_id: str) -> "Page":
    """The run's graph."""
    page = browser.new_page(viewport={"width": 1900, "height": 1000})
    page.set_default_timeout(SHOWN_MS)
    page.goto(f"{live.host}/#/runs/details/{run_id}")
    return page


def test_the_training_is_two_clicks_away_and_the_report_one(live: Live, browser: "Browser") -> None:
    promoted = live.submit()
    assert promoted.body["decision"] == "promote", promoted.stderr
    page = opened(browser, live, promoted.body["run_id"])
    nodes = page.locator(".react-flow__node")
    for graph in ("Prepare, train, compare, decide", "New data: train, compare, decide"):
        nodes.filter(has_text=graph).get_by_test_id("expand-button").click()
    training = nodes.filter(has_text="Fine-tune the adapter")
    training.get_by_test_id("CheckCircleIcon").wait_for()  # before it has its state the page shows nothing of a step
    training.click()
    page.get_by_role("button", name="Logs").click()
    page.get_by_text("[finetune] finished in").wait_for()
    page.get_by_role("button", name="root", exact=True).click()
    nodes.get_by_text("page", exact=True).click()
    page.get_by_role("button", name="Visualization").click()
    title = page.frame_locator("iframe").get_by_role("heading", level=1)
    assert title.inner_text() == f"{live.adapter}: a new version is in production"
