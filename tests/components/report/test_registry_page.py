"""The pages of a registry, read as a browser reads them: what they tell, and that nothing in them runs."""

from datetime import datetime, timedelta
from itertools import count

import pytest

from components.records import runs
from components.records.steps import Decision, Evaluation, Measured, RuleResult
from components.registry.aliases import PIPELINE, Cause, promote, read_alias, rollback
from components.registry.cache import forget
from components.registry.event_log import append_event
from components.report.registry_page import build_pages, gains, read_adapter, sentence, write_pages
from components.report.report import run_report
from components.shared.metrics import metric_of
from components.store.store import Store
from tests.components.registry.adapters import published, requests_of
from tests.components.report.example_runs import CONFIG, night
from tests.components.report.page import Page

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def decide(store: Store, version: str, lower: float | None, upper: float | None) -> None:
    """The decision of run r1, with these bounds of the gain over the champion."""
    compared = {"metric": "loss", "against": "champion", "candidate": 0.25, "other": 0.3, "gain": 0.05, "bound": 0.02}
    rule = RuleResult(
        name="not_worse_than_champion", field="f", lower=lower, upper=upper, confidence=0.95, passed=True, text="",
        **compared,
    )  # fmt: skip
    about = {"adapter": "icd", "alias": "production", "run_id": "r1", "version": version, "reasons": ()}
    runs.write(store, "r1", Decision(decision="promote", verdict="promote", rules=(rule,), **about))


@pytest.fixture
def ids(store: Store) -> list[str]:
    """Two versions that were in production one after the other, the second compared with the first."""
    made = [
        published(store, b"%d" % n, run_id=f"r{n}", config={"train": {"learning_rate": rate}, "x": HOSTILE}).version
        for n, rate in enumerate((1e-4, 2e-4))
    ]
    models = {
        "candidate": Measured(version=made[1], metrics={"loss": 0.25}),
        "champion": Measured(version=made[0], metrics={"loss": 0.3}),
    }
    runs.write(store, "r1", Evaluation(run_id="r1", records=250, models=models))
    decide(store, made[1], 0.01, 0.09)
    promote(store, "icd", made[0], cause=Cause("r0", "ann", "first"))
    promote(store, "icd", made[1], cause=Cause("r1", HOSTILE, HOSTILE))
    return made


def test_the_page_says_what_is_in_production_how_much_better_how_sure_who_decided_and_how_to_go_back(
    store: Store, ids: list[str]
) -> None:
    page = read_adapter(store, "icd")[0]
    assert "On 250 held-out records its loss was better" in sentence(page)
    drawn = gains(page)
    (gain,) = drawn.gains
    assert (gain.name, gain.lower, gain.gain, gain.upper, gain.bad) == (ids[1], 0.01, 0.05, 0.09, False)
    assert gain.text == "+0.050 (between +0.010 and +0.090)"
    assert drawn.bound == -0.02
    built = build_pages([page], [read_adapter(store, "icd")[1]], generated_at="now", address="s3://bucket/")
    assert set(built) == {"index.html", "icd.html"}
    text = Page(built["icd.html"]).text
    assert f"fineloop adapters rollback icd --to {ids[0]} --expect {ids[1]}" in text
    assert f"What changed from {ids[0]}" in text
    assert "config.train.learning_rate 0.0001 0.0002" in text
    assert "measured.loss 0.300 0.250" in text
    assert "In run r1" in text
    assert f"{ids[0]} promoted to production ann r0 first" in text
    assert ids[1] in Page(built["index.html"]).text


def test_each_event_names_a_person_or_the_pipeline_and_links_to_the_run_s_report(store: Store, ids: list[str]) -> None:
    promote(store, "icd", ids[0], "staging", cause=Cause("r7", "fineloop pipeline", "better"))
    append_event(store, "icd", "refused", {"version": ids[1], "run_id": "r8", "reasons": ["Too bad.", "Too few."]})
    write_pages(store, "icd", generated_at="now")
    page, index = (Page(store.get(f"pages/{name}.html").decode()) for name in ("icd", "index"))
    text = page.text
    assert f"{ids[0]} promoted to staging the pipeline r7 better" in text
    assert f"{ids[1]} refused by the gate the pipeline r8 Too bad. Too few." in text
    links = {value for name, value in page.attributes if name == "href"}
    assert {"../runs/r1/report.html", "../runs/r7/report.html", "../runs/r8/report.html"} <= links
    assert f"{ids[1]} refused by the gate," in index.text
    elsewhere = Page(pages_of(store)["icd.html"])  # of a folder, beside which no runs lie
    assert not any("report.html" in str(value) for name, value in elsewhere.attributes if name == "href")


def test_the_page_says_how_production_fares_on_what_came_since(store: Store, ids: list[str]) -> None:
    pointer = read_alias(store, "icd", "production")
    look = {"version": pointer.version, "alias": "production", "metric": "loss", "held_out": 0.25, "run_id": "r9"}
    body = {**look, "fresh": 0.5, "reasons": ["It is worse."]}
    append_event(store, "icd", "checked", body, at="2026-11-30T00:00:00Z")
    page = build_pages([read_adapter(store, "icd")[0]], [], generated_at="now", address="s3://b/")["icd.html"]
    fresh, tested = (metric_of("loss").text(value) for value in (0.5, 0.25))
    assert f"loss {fresh}, and {tested} when it was tested. It is worse." in " ".join(page.split())
    assert f"{pointer.version}, which production held, looked at on records that came since" in page
    for forged in ("a lot", float("nan"), {"x": 1}):
        at = f"2099-01-01T00:00:0{len(str(forged))}Z"
        append_event(store, "icd", "checked", {**look, "fresh": str(forged)}, at=at)
        page = build_pages([read_adapter(store, "icd")[0]], [], generated_at="now", address="s3://b/")["icd.html"]
        assert "On what came since" not in page


def test_a_decision_of_the_pipeline_is_told_once_and_its_confidence_too(store: Store, ids: list[str]) -> None:
    sure = ", each with 95 % confidence."
    promote(store, "icd", ids[0], cause=Cause("r7", PIPELINE, f"The gain lies above +1{sure} It helps, 3{sure}"))
    text = Page(pages_of(store)["icd.html"]).text
    assert f"The gain lies above +1{sure} It helps, 3." in text
    assert text.count("The gain lies") == 1
    assert "Every rule of the gate was kept" in text


def test_the_versions_table_leaves_out_what_says_the_same_on_another_scale(store: Store, ids: list[str]) -> None:
    measured = {"loss": 0.25, "perplexity": 1.28, "prompt_gain": 1.7, "prompt_gain_of_answer": 5.7}
    models = {"candidate": Measured(version=ids[1], metrics=measured)}
    runs.write(store, "r1", Evaluation(run_id="r1", records=250, models=models))
    assert [metric.key for metric in read_adapter(store, "icd")[0].metrics] == ["loss", "prompt_gain"]


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0.01, 0.09), "between +0.010 and +0.090, each with 95 % confidence, so that it is hardly chance."),
        ((0.01, None), "the gain lies above +0.010, with 95 % confidence, so that it is hardly chance."),
        ((None, 0.09), "the gain lies below +0.090, with 95 % confidence, so that it may be chance."),
        ((None, None), "The gate compared it with no version in production before it."),
    ],
)
def test_how_sure_the_gain_is_follows_from_its_bounds(store: Store, ids: list[str], bounds, words) -> None:
    decide(store, ids[1], *bounds)
    assert sentence(read_adapter(store, "icd")[0]).endswith(words)


def test_the_list_says_for_how_long_and_what_the_gate_said_last(store: Store, ids: list[str]) -> None:
    about = {"adapter": "icd", "alias": "production", "reasons": ()}
    runs.write(store, "r2", Decision(decision="hold", verdict="hold", run_id="r2", **about))
    append_event(store, "icd", "refused", {"version": ids[1], "run_id": "r2", "alias": "production"})
    pointer = read_alias(store, "icd", "production")
    listed = read_adapter(store, "icd")[1]
    later = datetime.fromisoformat(pointer.since) + timedelta(days=3, hours=1)
    assert (listed.held(later).split(",")[0], listed.verdict, listed.run_id) == ("for 3 days", "hold", "r2")
    assert "hold r2" in Page(pages_of(store)["index.html"]).text


def pages_of(store: Store) -> dict[str, str]:
    page, listed = read_adapter(store, "icd")
    return build_pages([page], [listed], generated_at="now", address="s3://b/")


def test_nothing_that_came_from_the_registry_becomes_markup(store: Store, ids: list[str]) -> None:
    for page in pages_of(store).values():
        read = Page(page)
        assert not {"script", "img", "iframe"} & {tag for tag, _ in read.tags}
        assert [name for name, _ in read.attributes if name.startswith("on")] == []
        (policy,) = [value for name, value in read.attributes if name == "content" and "default-src" in str(value)]
        assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert HOSTILE in Page(pages_of(store)["icd.html"]).text


def test_an_adapter_that_nothing_was_promoted_of_says_so(store: Store) -> None:
    published(store, b"1")
    assert sentence(read_adapter(store, "icd")[0]) == "Nothing is in production."
    assert "Nothing in production" in pages_of(store)["icd.html"]


def test_pages_in_the_store_are_the_adapter_s_own_the_list_and_of_others_what_was_missing(store: Store, ids) -> None:
    for name in ("other", "broken"):
        promote(store, name, published(store, b"1", name=name).version)
    assert write_pages(store, "icd", generated_at="a week ago") == store.uri("pages/index.html")
    store.put("adapters/broken/aliases/production.json", b"{}")
    store.delete(["pages/index.json"])
    rollback(store, "icd")
    write_pages(store, "icd", generated_at="this morning")
    found = {info.key: Page(store.get(info.key).decode()).text for info in store.list("pages/") if "html" in info.key}
    assert {key for key, text in found.items() if "this morning" in text} == {"pages/icd.html", "pages/index.html"}
    assert {key for key, text in found.items() if "a week ago" in text} == {"pages/other.html", "pages/broken.html"}
    assert f"production went back to {ids[0]}" in found["pages/icd.html"]
    assert "unknown: the alias is damaged" in found["pages/index.html"]


def test_what_a_person_moved_is_in_the_list_with_the_next_run_of_any_adapter(store: Store, ids: list[str]) -> None:
    made = [published(store, weights, name="other").version for weights in (b"1", b"2")]
    for version in made:
        promote(store, "other", version)
        write_pages(store, "other", generated_at="a week ago")
    rollback(store, "other")
    forget(store, "other")
    write_pages(store, "icd", generated_at="this morning")
    index = Page(store.get("pages/index.html").decode()).text
    assert made[0] in index
    assert made[1] not in index


def test_the_index_shows_what_reading_all_of_it_would(store: Store) -> None:
    for number in range(6):
        night(store, number, promotes=number % 3 == 0)
        if number == 4:
            write_pages(store, "icd", generated_at="then")
    write_pages(store, "icd", generated_at="now")
    shown = {key: store.get(f"pages/{key}") for key in ("icd.html", "index.html", "index.json")}
    store.delete([info.key for info in store.list("adapters/icd/index/")])
    write_pages(store, "icd", generated_at="now")
    assert {key: store.get(f"pages/{key}") for key in shown} == shown
    assert Page(shown["icd.html"].decode()).text.count("night-5") > 1


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
