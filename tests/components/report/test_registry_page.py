"""The pages of a registry, read as a browser reads them: what they tell, and that nothing in them runs."""

from datetime import datetime, timedelta
from html.parser import HTMLParser

import pytest

from components.records import runs
from components.records.steps import Decision, Evaluation, Measured, PairedDifference, RuleResult
from components.registry.aliases import PIPELINE, Cause, promote, read_alias, rollback
from components.registry.cache import forget
from components.registry.event_log import append_event
from components.registry.versions import publish_version
from components.report.comparison import intervals
from components.report.registry_index import list_adapter
from components.report.registry_page import build_pages, picture, read_adapter, sentence, write_pages
from components.report.run_files import RunFiles
from components.store.store import Store
from tests.components.report import example_runs
from tests.components.report.example_runs import bounded, night

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Read(HTMLParser):
    """Tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture
def ids(store: Store) -> list[str]:
    """Two versions that were in production one after the other, the second compared with the first."""
    made: list[str] = []
    for number in range(2):
        files = {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
        lineage = {"run_id": f"r{number}", "config": {"train": {"learning_rate": 1e-4 * (1 + number)}, "x": HOSTILE}}
        made.append(publish_version(store, "icd", files, lineage=lineage).version)
    paired = PairedDifference(metric="loss", difference=0.05, ci95=(0.01, 0.09), records=250)
    models = {
        "candidate": Measured(version=made[1], metrics={"loss": 0.25}),
        "champion": Measured(version=made[0], metrics={"loss": 0.3}),
    }
    runs.write(store, "r1", Evaluation(run_id="r1", records=250, models=models, paired={"champion": paired}))
    promote(store, "icd", made[0], cause=Cause("r0", "ann", "first"))
    promote(store, "icd", made[1], cause=Cause("r1", HOSTILE, HOSTILE))
    return made


def test_the_page_says_what_is_in_production_how_much_better_how_sure_who_decided_and_how_to_go_back(
    store: Store, ids: list[str]
) -> None:
    page = read_adapter(store, "icd")
    assert "On 250 held-out records its loss was better" in sentence(page)
    assert "interval of the gain is +0.010 to +0.090, so that it is hardly chance" in sentence(page)
    drawn = picture(page)
    assert drawn is not None
    (dot,) = drawn.dots
    # The axis runs from 0 (95 % down) to 0.09 (5 % down); numbers by hand.
    assert (dot.low, dot.y, dot.high) == (85.0, 45.0, 5.0)
    assert (drawn.zero, drawn.ticks) == (95.0, ((95.0, "0"), (5.0, "+0.09")))
    built = build_pages([page], [list_adapter(store, "icd")], generated_at="now", address="s3://bucket/")
    assert set(built) == {"index.html", "icd.html"}
    text = " ".join(Read(built["icd.html"]).text.split())
    assert f"fineloop adapters rollback icd --to {ids[0]} --expect {ids[1]}" in text
    assert f"What changed from {ids[0]}" in text
    assert "config.train.learning_rate 0.0001 0.0002" in text
    assert "measured.loss 0.300 0.250" in text
    assert "In run r1" in text
    assert f"{ids[0]} promoted to production ann r0 first" in text
    assert ids[1] in Read(built["index.html"]).text


def test_each_event_names_a_person_or_the_pipeline_and_links_to_the_run_s_report(store: Store, ids: list[str]) -> None:
    promote(store, "icd", ids[0], "staging", cause=Cause("r7", "fineloop pipeline", "better"))
    append_event(store, "icd", "refused", {"version": ids[1], "run_id": "r8", "reasons": ["Too bad.", "Too few."]})
    write_pages(store, "icd", generated_at="now")
    page, index = (Read(store.get(f"pages/{name}.html").decode()) for name in ("icd", "index"))
    text = " ".join(page.text.split())
    assert f"{ids[0]} promoted to staging the pipeline r7 better" in text
    assert f"{ids[1]} refused by the gate the pipeline r8 Too bad. Too few." in text
    links = {value for name, value in page.attributes if name == "href"}
    assert {"../runs/r1/report.html", "../runs/r7/report.html", "../runs/r8/report.html"} <= links
    assert f"{ids[1]} refused by the gate," in " ".join(index.text.split())
    elsewhere = Read(pages_of(store)["icd.html"])  # of a folder, beside which no runs lie
    assert not any("report.html" in str(value) for name, value in elsewhere.attributes if name == "href")


def test_a_decision_of_the_pipeline_is_told_once_and_its_confidence_too(store: Store, ids: list[str]) -> None:
    first = (
        "The gain lies between +1 and +2, each with 95 % confidence. "
        "It helps, between 3 and 4, each with 95 % confidence."
    )
    promote(store, "icd", ids[0], cause=Cause("r7", PIPELINE, first))
    text = " ".join(Read(pages_of(store)["icd.html"]).text.split())
    said = "The gain lies between +1 and +2, each with 95 % confidence. It helps, between 3 and 4."
    assert text.count(said) == 1
    assert text.count("The gain lies") == 1
    assert "Every rule of the gate was kept" in text


def test_the_versions_table_leaves_out_what_says_the_same_on_another_scale(store: Store, ids: list[str]) -> None:
    measured = {"loss": 0.25, "perplexity": 1.28, "prompt_gain": 1.7, "prompt_gain_of_answer": 5.7}
    models = {"candidate": Measured(version=ids[1], metrics=measured)}
    runs.write(store, "r1", Evaluation(run_id="r1", records=250, models=models))
    assert [metric.key for metric in read_adapter(store, "icd").metrics] == ["loss", "prompt_gain"]


def test_the_page_has_the_bounds_that_the_run_s_report_has(store: Store, ids: list[str]) -> None:
    evaluation = runs.read(store, "r1", Evaluation)
    base = Measured(metrics={"loss": 2.3, "exact_match": 0.1})
    evaluation = evaluation.model_copy(update={"models": {**evaluation.models, "base": base}})
    decided = bounded(example_runs.decision(evaluation)).model_copy(update={"version": ids[1], "run_id": "r1"})
    runs.write(store, "r1", decided)
    (shown,) = [
        each.text
        for each in intervals(RunFiles(run_id="r1", adapter="icd", evaluation=evaluation, decision=decided))
        if each.name == "Loss not worse than production's"
    ]
    said = sentence(read_adapter(store, "icd"))
    assert shown.partition("better, ")[2] in said
    assert "+0.029 and +0.071, each with 95 % confidence, so that it is hardly chance" in said


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0.01, None), "the gain lies above +0.010, with 95 % confidence, so that it is hardly chance."),
        ((None, 0.09), "the gain lies below +0.090, with 95 % confidence, so that it may be chance."),
        ((None, None), "the 95 % interval of the gain is +0.010 to +0.090, so that it is hardly chance."),
    ],
)
def test_one_bound_alone_is_shown(store: Store, ids: list[str], bounds, words) -> None:
    lower, upper = bounds
    compared = {
        "metric": "loss",
        "against": "champion",
        "candidate": 0.25,
        "other": 0.3,
        "gain": 0.05,
        "confidence": 0.95,
    }
    rule = RuleResult(
        name="not_worse_than_champion", field="f", lower=lower, upper=upper, passed=True, text="", **compared
    )
    about = {
        "adapter": "icd",
        "alias": "production",
        "run_id": "r1",
        "version": ids[1],
        "reasons": (),
        "rules": (rule,),
    }
    runs.write(store, "r1", Decision(decision="promote", verdict="promote", **about))
    assert sentence(read_adapter(store, "icd")).endswith(words)


def test_the_list_says_for_how_long_what_the_gate_said_last_and_how_it_has_gone(store: Store, ids: list[str]) -> None:
    for number, (loss, verdict) in enumerate([(0.5, "promote"), (0.25, "promote"), (0.375, "hold")]):
        rule = RuleResult(
            name="better_than_base", field="f", metric="loss", against="base", candidate=loss, passed=True, text=""
        )
        about = {"adapter": "icd", "alias": "production", "run_id": f"r{number}", "rules": (rule,), "reasons": ()}
        runs.write(store, f"r{number}", Decision(decision=verdict, verdict=verdict, **about))
    append_event(store, "icd", "refused", {"version": ids[1], "run_id": "r2", "alias": "production"})
    pointer = read_alias(store, "icd", "production")
    assert pointer is not None
    listed = list_adapter(store, "icd")
    later = datetime.fromisoformat(pointer.since) + timedelta(days=3, hours=1)
    assert (listed.held(later).split(",")[0], listed.verdict, listed.run_id) == ("for 3 days", "hold", "r2")
    drawn = listed.sparkline
    assert drawn is not None
    assert drawn.points == ((3.0, 3.0), (50.0, 21.0), (97.0, 12.0))  # 0.375 is half way, by hand
    assert drawn.text == "The last 3 candidates: loss 0.500 to 0.375; lower is better."
    index = Read(pages_of(store)["index.html"])
    assert "polyline" in index.tags
    assert "hold r2" in " ".join(index.text.split())


def pages_of(store: Store) -> dict[str, str]:
    return build_pages(
        [read_adapter(store, "icd")], [list_adapter(store, "icd")], generated_at="now", address="s3://b/"
    )


def test_nothing_that_came_from_the_registry_becomes_markup(store: Store, ids: list[str]) -> None:
    for page in pages_of(store).values():
        read = Read(page)
        assert not {"script", "img", "iframe"} & set(read.tags)
        assert [name for name, _ in read.attributes if name.startswith("on")] == []
        (policy,) = [value for name, value in read.attributes if name == "content" and "default-src" in str(value)]
        assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert HOSTILE in Read(pages_of(store)["icd.html"]).text


def test_an_adapter_that_nothing_was_promoted_of_says_so(store: Store) -> None:
    publish_version(
        store, "icd", {"adapter_model.safetensors": b"1", "adapter_config.json": b"{}"}, lineage={"run_id": "r"}
    )
    page = read_adapter(store, "icd")
    assert sentence(page) == "Nothing is in production."
    assert "Nothing in production" in pages_of(store)["icd.html"]


def test_pages_in_the_store_are_the_adapter_s_own_the_list_and_of_others_what_was_missing(
    store: Store, ids: list[str]
) -> None:
    for name in ("other", "broken"):
        files = {"adapter_model.safetensors": b"1", "adapter_config.json": b"{}"}
        promote(store, name, publish_version(store, name, files, lineage={"run_id": "r"}).version)
    assert write_pages(store, "icd", generated_at="a week ago") == store.uri("pages/index.html")
    store.put("adapters/broken/aliases/production.json", b"{}")
    store.delete(["pages/index.json"])
    rollback(store, "icd")
    write_pages(store, "icd", generated_at="this morning")
    found = {info.key: Read(store.get(info.key).decode()).text for info in store.list("pages/") if "html" in info.key}
    assert {key for key, text in found.items() if "this morning" in text} == {"pages/icd.html", "pages/index.html"}
    assert {key for key, text in found.items() if "a week ago" in text} == {"pages/other.html", "pages/broken.html"}
    assert f"production went back to {ids[0]}" in " ".join(found["pages/icd.html"].split())
    assert "unknown: the alias is damaged" in found["pages/index.html"]


def test_what_a_person_moved_is_in_the_list_with_the_next_run_of_any_adapter(store: Store, ids: list[str]) -> None:
    files = [{"adapter_model.safetensors": body, "adapter_config.json": b"{}"} for body in (b"1", b"2")]
    made = [publish_version(store, "other", each, lineage={"run_id": "r"}).version for each in files]
    for version in made:
        promote(store, "other", version)
        write_pages(store, "other", generated_at="a week ago")
    rollback(store, "other")
    forget(store, "other")
    write_pages(store, "icd", generated_at="this morning")
    index = Read(store.get("pages/index.html").decode()).text
    assert made[0] in index
    assert made[1] not in index


def test_a_run_asks_as_little_whatever_other_adapters_there_are(store: Store, ids: list[str]) -> None:
    asked: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.url) or None)
    counts = []
    for others in (1, 7):
        for number in range(others):
            files = {"adapter_model.safetensors": b"1", "adapter_config.json": b"{}"}
            publish_version(store, f"other-{others}-{number}", files, lineage={"run_id": "r"})
        write_pages(store, "icd", generated_at="first")
        asked.clear()
        write_pages(store, "icd", generated_at="later")
        counts.append(len(asked))
    assert counts[0] == counts[1] <= 20  # some are for versions that no run has decided on
    assert "other-7-6" in Read(store.get("pages/index.html").decode()).text


def test_a_night_asks_for_what_is_new_alone_and_shows_what_reading_all_of_it_would(store: Store) -> None:
    for number in range(30):
        night(store, number, promotes=number % 3 == 0)
    write_pages(store, "icd", generated_at="then")
    asked: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.url) or None)
    for number in (31, 33):  # a night that holds, and one that promotes
        night(store, number, promotes=number % 3 == 0)
        asked.clear()
        write_pages(store, "icd", generated_at="now")
        assert len(asked) <= 20
    shown = {key: store.get(f"pages/{key}") for key in ("icd.html", "index.html", "index.json")}
    store.delete([info.key for info in store.list("adapters/icd/index/")])
    write_pages(store, "icd", generated_at="now")
    assert {key: store.get(f"pages/{key}") for key in shown} == shown
    assert Read(shown["icd.html"].decode()).text.count("night-33") > 1
