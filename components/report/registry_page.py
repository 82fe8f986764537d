"""The registry as static pages that need nothing else: what is in production, since when and why, and what was."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from components.records import runs
from components.records.runs import PAGES
from components.records.steps import Evaluation, finite
from components.registry import versions
from components.registry.aliases import PIPELINE, PRODUCTION, Pointer, read_alias
from components.registry.cache import LISTING, Entries, read_entries, write_entries
from components.registry.collect import Summary
from components.registry.event_log import Event
from components.report.adapter_files import AdapterFiles, Published
from components.report.charts import Forest, Gain
from components.report.comparison import amounts_of
from components.report.html import parse_moment, template, what, when, who, why
from components.shared.errors import IntegrityError
from components.shared.metrics import Metric, is_metric, metric_of, metrics_of
from components.store.store import Store

MOST_VERSIONS = 60
MOST_GAINS = 20
MOST_EVENTS = 200
DECIDED = ("promoted", "refused", "proposed")


@dataclass(frozen=True)
class Listed:
    """A row of the list of adapters."""

    name: str
    in_production: str
    """The version in production, or the text to show in its place."""
    since: str
    """Since when it is in production, in UTC, as stored in the alias; empty if nothing is in production."""
    num_versions: int
    last: str = ""
    """What happened last, and when."""
    verdict: str = ""
    """Verdict of the last decision; empty if there is none."""
    run_id: str = ""
    """The run of the last decision."""

    def held(self, now: datetime | None = None) -> str:
        """Return for how many days it has been in production, and since when; empty if nothing is."""
        began = parse_moment(self.since)
        if began is None:
            return ""
        days = max(((now or datetime.now(UTC)) - began).days, 0)
        age = f"for {days} day{'s' * (days > 1)}" if days else "for less than a day"
        return f"{age}, since {when(self.since)}"


_LISTED = TypeAdapter(Listed)


@dataclass(frozen=True)
class AdapterPage:
    """The page of one adapter, newest first."""

    name: str
    pointer: Pointer | None
    current: Published | None
    since: str
    before: str | None
    published: tuple[Published, ...]
    num_versions: int
    events: tuple[Event, ...]
    changes: tuple[tuple[str, str, str], ...]
    """Path in the lineage or what was measured on the same records, in the version before, in production."""

    @property
    def metrics(self) -> list[Metric]:
        """What was measured of any version, without what says the same on another scale."""
        measured = [version.evaluation.model("candidate") for version in self.published if version.evaluation]
        keys = {key for model in measured if model for key, value in model.metrics.items() if value is not None}
        return [metric for metric in metrics_of(keys) if metric.repeats not in keys]


def _listed(files: AdapterFiles, page: AdapterPage) -> Listed:
    log = page.events[::-1]
    decided = [
        str(event.body["run_id"])
        for event in log
        if event.kind in DECIDED and event.body.get("alias", PRODUCTION) == PRODUCTION and event.body.get("run_id")
    ]
    decisions = {entry.run_id: entry.decision for entry in files.entries.values()}
    run_id = decided[-1] if decided else ""
    decision = decisions.get(run_id) or (runs.decision_of(files.store, run_id, to_show=True) if run_id else None)
    return Listed(
        page.name,
        in_production=page.pointer.version if page.pointer else "nothing",
        since=page.pointer.since if page.pointer else "",
        num_versions=page.num_versions,
        last=f"{what(log[-1].kind, log[-1].body)}, {when(log[-1].time)}" if log else "",
        verdict=decision.verdict or decision.decision if decision else "",
        run_id=decision.run_id if decision else "",
    )


def write_pages(store: Store, name: str, *, generated_at: str, files: AdapterFiles | None = None) -> str:
    """Write the page of the adapter and the list of all to pages/ in the store; returns the list's address.

    Of another adapter page and entry are written only where there are none yet: its own runs write them. `files` is
    what has been read of the adapter so far. Raises IntegrityError: the adapter's alias is damaged.
    """
    files = files or AdapterFiles(store, name)
    own = _page_of(files)
    new: Entries = {name: asdict(_listed(files, own))}
    if files.mark is not None:
        by_alias = {pointer.alias: pointer.version for pointer in files.aliases}
        new[name][LISTING] = asdict(Summary(next(iter(files.entries), None), own.num_versions, by_alias, files.mark))
    files.keep()
    names, was = versions.list_adapters(store), read_entries(store)
    pages, listed = [own], _sound(was[0])
    missing = [other for other in names if other != name and other not in listed]
    there = {info.key for info in store.list(PAGES)} if missing else ()
    for other in missing:
        try:
            page, row = read_adapter(store, other)
            pages += [page] if f"{PAGES}{other}.html" not in there else []
        except IntegrityError:
            row = Listed(other, "unknown: the alias is damaged", "", len(versions.version_ids(store, other)))
        new[other] = asdict(row)
    # With what others wrote meanwhile.
    written = write_entries(store, lambda old: {name: old.get(name, {}) | new.get(name, {}) for name in names}, was)
    entries = [*_sound(written).values()]
    for file, text in build_pages(
        pages, entries, generated_at=generated_at, address=store.uri(""), runs_at="../runs/"
    ).items():
        store.put(f"{PAGES}{file}", text.encode(), content_type="text/html; charset=utf-8")
    return store.uri(f"{PAGES}index.html")


def _sound(entries: Entries) -> dict[str, Listed]:
    """What the pages show of each adapter that a run has listed; an entry that cannot be read is made anew."""
    sound = {}
    for name, entry in entries.items():
        with contextlib.suppress(ValidationError):
            sound[name] = _LISTED.validate_python(entry)
    return sound


def read_adapter(store: Store, name: str) -> tuple[AdapterPage, Listed]:
    """What the adapter's page shows, and its row in the list. Raises IntegrityError: the alias is damaged."""
    files = AdapterFiles(store, name)
    page = _page_of(files)
    row = _listed(files, page)
    files.keep()
    return page, row


def _page_of(files: AdapterFiles) -> AdapterPage:
    store, name = files.store, files.name
    # Of the other aliases a damaged one is passed over, and this one must not be.
    production = (pointer for pointer in files.aliases if pointer.alias == PRODUCTION)
    pointer = next(production, None) or read_alias(store, name, PRODUCTION)
    before: str | None = pointer.event["from"] if pointer else None
    shown = [files.published(version) for version in [*files.entries][:MOST_VERSIONS]]
    changes = files.changes(before, pointer.version) if pointer else []
    current = None
    by_version = {version.version.version: version for version in shown}
    if pointer is not None and (current := by_version.get(pointer.version)) is None:
        version = versions.resolve(store, f"{name}@{pointer.version}")
        current = Published(version, *versions.of_run(store, version))
    measured = _measured(current.evaluation, before) if current and before else ()
    return AdapterPage(
        name=name,
        pointer=pointer,
        current=current,
        since=when(pointer.since) if pointer else "",
        before=before,
        published=tuple(shown),
        num_versions=len(files.entries),
        events=tuple(reversed(files.log[-MOST_EVENTS:])),
        changes=(*measured, *changes),
    )


def _measured(evaluation: Evaluation | None, before: str) -> Iterator[tuple[str, str, str]]:
    champion = evaluation.model("champion") if evaluation else None
    if evaluation is None or champion is None or champion.version != before:
        return
    for metric in metrics_of(champion.metrics):
        old, new = evaluation.metric("champion", metric.key), evaluation.metric("candidate", metric.key)
        if old is not None and new is not None:
            yield f"measured.{metric.key}", metric.text(old), metric.text(new)


def sentence(page: AdapterPage) -> str:
    """Whether what is in production is better than what it replaced, and how sure that is."""
    if page.current is None:
        return "Nothing is in production."
    rule, evaluation = page.current.against_champion, page.current.evaluation
    if rule is None or evaluation is None:
        return "The gate compared it with no version in production before it."
    gain, amounts = rule.gain or 0.0, amounts_of(rule)
    better = "better" if gain > 0 else "worse" if gain < 0 else "neither better nor worse"
    by = f", by {amounts.amount_text(gain)}" if gain else ""
    sure = "it is hardly chance" if (rule.lower or 0) > 0 or (rule.upper or 0) < 0 else "it may be chance"
    return (
        f"On {evaluation.records} held-out records its {metric_of(rule.metric or '').label} was {better} than the "
        f"champion's of that day{by}; the gain lies "
        f"{amounts.range_text(rule.lower, rule.upper, confidence=rule.confidence)}, so that {sure}."
    )


def freshness(page: AdapterPage) -> str:
    """How production fares on the records of the last look beside its own test, and what the look said; empty if there
    was none. An event may hold anything: whoever trains may write some."""
    holder = page.pointer.version if page.pointer else ""
    last = next(
        (event.body for event in page.events if event.kind == "checked" and event.body.get("version") == holder), {}
    )
    fresh, own = finite(last.get("fresh")), finite(last.get("held_out"))
    if fresh is None or not is_metric(key := str(last.get("metric"))):
        return ""
    metric = metric_of(key)
    tested = "" if own is None else f", and {metric.text(own)} when it was tested"
    return f"{metric.label} {metric.text(fresh)}{tested}. {why(last)}"


def gains(page: AdapterPage) -> Forest | None:
    """The versions' gains over the champion of their day, in the newest one's metric, newest first; None without
    any."""
    compared = [(version, rule) for version in page.published if (rule := version.against_champion)]
    if not compared:
        return None
    newest = compared[0][1]
    amounts = amounts_of(newest)
    shown = [
        Gain(
            version.version.version,
            version.published,
            rule.gain or 0.0,
            rule.lower,
            rule.upper,
            f"{amounts.signed_text(rule.gain or 0.0)} ({amounts.range_text(rule.lower, rule.upper)})",
            bad=version.decision is not None and not version.decision.promoted,
        )
        for version, rule in compared[:MOST_GAINS]
        if (rule.metric, rule.relative) == (newest.metric, newest.relative)
    ]
    bound = -(newest.bound or 0.0)
    note = (
        f"Each version's gain in {metric_of(newest.metric or '').label} over what was in production when it was "
        "compared, between the bounds that the gate decided by. Solid: no difference. Dashed: "
        f"{amounts.signed_text(bound)}, what the newest had to stay above."
    )
    return Forest(shown, bound, note)


def build_pages(
    pages: Sequence[AdapterPage], listed: Sequence[Listed], *, generated_at: str, address: str, runs_at: str = ""
) -> dict[str, str]:
    """File name to HTML: index.html with what is listed, and each page. Every text from the registry is escaped.

    `runs_at` is where the runs' folders lie, seen from a page; without it none is linked.
    """
    page_template = template("registry.html")
    common: dict[str, Any] = {"generated_at": generated_at, "address": address, "runs_at": runs_at}
    common |= {"pipeline": PIPELINE, "what": what, "who": who, "why": why, "when": when}
    built = {"index.html": page_template.render(**common, listed=listed, page=None)}
    for page in pages:
        content = {
            "sentence": sentence(page),
            "freshness": freshness(page),
            "gains": gains(page),
            "metrics": page.metrics,
        }
        built[f"{page.name}.html"] = page_template.render(**common, **content, page=page)
    return built
