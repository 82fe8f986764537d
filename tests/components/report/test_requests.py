"""How often a run's report asks the store, its registry's pages included. The judge is what the S3 client sends."""

from collections import Counter
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from components.registry.versions import publish_version
from components.report.registry_page import read_adapter
from components.report.report import run_report
from components.store.store import Store
from tests.components.report.example_runs import CONFIG, night

OF_ICD = CONFIG.model_copy(update={"adapter": CONFIG.adapter.model_copy(update={"name": "icd"})})


@pytest.fixture
def sent(store: Store) -> list[str]:
    """Method and key of each request, or LIST and what was listed."""
    found: list[str] = []

    def note(request, **_: object) -> None:
        url = urlsplit(request.url)
        listed = parse_qs(url.query).get("prefix")
        key = listed[0] if listed else unquote(url.path).removeprefix(f"/{store.bucket}/")
        found.append(f"{'LIST' if listed else request.method} {key.removeprefix(f'{store.prefix}/')}")

    store._client.meta.events.register("before-send.s3", note)
    return found


def publish_others(store: Store, number: int) -> None:
    for name in range(number):
        for version in range(2):
            files = {"adapter_model.safetensors": b"%d" % version, "adapter_config.json": b"{}"}
            publish_version(store, f"other-{number}-{name}", files, lineage={"run_id": "r"})


def test_the_report_of_a_run_that_promotes_takes_at_most_20_requests_whatever_there_is_beside_it(store, sent) -> None:
    numbers, asked = count(), []
    for others, before in ((1, 1), (3, 3)):
        publish_others(store, others)
        for number in range(before):
            last = next(numbers)
            night(store, last, promotes=number % 3 == 0)
        run_report(OF_ICD, store, f"night-{last}", result={})
        night(store, next(numbers), promotes=True)
        read_adapter(store, "icd")  # as `adapters page` does: its index has the night's version, and no run by itself
        last = next(numbers)
        night(store, last, promotes=True)
        sent.clear()
        run_report(OF_ICD, store, f"night-{last}", result={})
        asked.append([*sent])
    few, many = asked
    assert len(few) == len(many) <= 20, "\n".join(many)
    assert [each for each, times in Counter(many).items() if times > 1] == []
