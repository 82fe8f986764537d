"""What a run's report asks of the store, its registry's pages included. The judge is what the S3 client sends."""

from itertools import count

from components.report.registry_page import read_adapter
from components.report.report import run_report
from components.store.store import Store
from tests.components.registry.adapters import published, requests_of
from tests.components.report.example_runs import CONFIG, night

OF_ICD = CONFIG.model_copy(update={"adapter": CONFIG.adapter.model_copy(update={"name": "icd"})})


def test_the_report_of_a_run_that_promotes_asks_no_more_whatever_there_is_beside_it(store: Store) -> None:
    numbers, asked, sent = count(), [], requests_of(store)
    for others, before in ((1, 1), (3, 3)):
        for name in range(others):
            published(store, b"1", name=f"other-{others}-{name}")
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
    assert len(few) == len(many), "\n".join(many)
