"""The registry as static pages that need nothing else: what is in production, since when and why, and what was."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from components.records.runs import PAGES
from components.records.steps import Evaluation
from components.registry import versions
from components.registry.aliases import PIPELINE, PRODUCTION, read_alias
from components.registry.cache import LISTING, Entries, read_entries, write_entries
from components.registry.collect import Summary
from components.report.adapter_files import AdapterFiles
from components.report.charts import Axis, Dot, Tick, axis_of
from components.report.html import template, what, when, who, why
from components.report.published import Published
from components.report.registry_index import Listed, list_adapter, listed
from components.shared.metrics import Metric, metrics_of

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.registry.event_log import Event
    from components.store.store import Store

_LISTED = TypeAdapter(Listed)
MOST_VERSIONS = 60
MOST_EVENTS = 200
MOST_NAMED = 12
"""Dots of the picture that are named beneath it."""


@dataclass(frozen=True)
class Picture:
    """Gains over time; heights in per cent of the picture, from its top."""

    dots: tuple[Dot, ...]
    zero: float
    ticks: tuple[Tick, ...]
    metric: Metric
    bounds: str
    """What the lines through the dots are."""


@dataclass(frozen=True)
class AdapterPage:
    """The page of one adapter, newest first."""

    name: str
    pointer: "Pointer | None"
    held: Published | None
    since: str
    before: str | None
    published: tuple[Published, ...]
    num_versions: int
    events: tuple["Event", ...]
    changes: tuple[tuple[str, str, str], ...]
    """Path in the lineage or what was measured on the same records, in the version before, in production."""

    @property
    def metrics(self) -> list[Metric]:
        """What was measured of any version, without what says the same on another scale."""
        measured = [each.evaluation.model("candidate") for each in self.published if each.evaluation]
        keys = {key for model in measured if model for key, value in model.metrics.items() if value is not None}
        return [metric for metric in metrics_of(keys) if metric.repeats not in keys]


def write_pages(store: "Store", name: str, *, generated_at: str, files: AdapterFiles | None = None) -> str:
    """Write the page of the adapter and the list of all to pages/ in the store; returns the list's address.

    Of another adapter page and entry are written only where there are none yet: its own runs write them. `files` is
    what has been read of the adapter so far.

    Raises:
        IntegrityError: the adapter's alias is damaged.
    """
    files = files or AdapterFiles(store, name)
    own = _page_of(files)
    new: Entries = {name: asdict(listed(name, own.events[::-1], own.num_versions, own.pointer, files.sound_decisions))}
    if files.mark is not None:
        held = {each.alias: each.version for each in files.aliases}
        new[name][LISTING] = asdict(Summary(next(iter(files.entries), None), own.num_versions, held, files.mark))
    files.keep()
    names, was = versions.list_adapters(store), read_entries(store)
    known = _sound(was[0])
    pages = [own]
    if missing := [each for each in names if each != name and each not in known]:
        there = {info.key for info in store.list(PAGES)}
        pages += [read_adapter(store, each) for each in missing if f"{PAGES}{each}.html" not in there]
        new |= {each: asdict(list_adapter(store, each)) for each in missing}
    # With what others wrote meanwhile.
    written = write_entries(store, lambda old: {each: old.get(each, {}) | new.get(each, {}) for each in names}, was)
    entries = [*_sound(written).values()]
    for file, page in build_pages(
        pages, entries, generated_at=generated_at, address=store.uri(""), runs_at="../runs/"
    ).items():
        store.put(f"{PAGES}{file}", page.encode(), content_type="text/html; charset=utf-8")
    return store.uri(f"{PAGES}index.html")


def _sound(entries: Entries) -> dict[str, Listed]:
    """What the pages show of each adapter that a run has listed; an entry that cannot be read is made anew."""
    found = {}
    for name, entry in entries.items():
        with contextlib.suppress(ValidationError):
            found[name] = _LISTED.validate_python(entry)
    return found


def read_adapter(store: "Store", name: str) -> AdapterPage:
    """Read what the page of the adapter shows.

    Raises:
        IntegrityError: the alias is damaged.
    """
    files = AdapterFiles(store, name)
    page = _page_of(files)
    files.keep()
    return page


def _page_of(files: AdapterFiles) -> AdapterPage:
    store, name = files.store, files.name
    # Of the other aliases a damaged one is passed over, and this one must not be.
    production = (each for each in files.aliases if each.alias == PRODUCTION)
    pointer = next(production, None) or read_alias(store, name, PRODUCTION)
    before: str | None = pointer.event["from"] if pointer else None
    shown = [files.published(version) for version in [*files.entries][:MOST_VERSIONS]]
    changes = files.changes(before, pointer.version) if pointer else []
    held = None
    if pointer is not None and (held := {each.version.version: each for each in shown}.get(pointer.version)) is None:
        held = files.read_anew(versions.resolve(store, f"{name}@{pointer.version}"))
    measured = _measured(held.evaluation, before) if held and before else ()
    return AdapterPage(
        name=name,
        pointer=pointer,
        held=held,
        since=when(pointer.since) if pointer else "",
        before=before,
        published=tuple(shown),
        num_versions=len(files.entries),
        events=tuple(reversed(files.log[-MOST_EVENTS:])),
        changes=(*measured, *changes),
    )


def sentence(page: AdapterPage) -> str:
    """Whether what is in production is better than what it replaced, and how sure that is."""
    if page.held is None:
        return "Nothing is in production."
    found = page.held.against_champion
    if found is None or page.held.evaluation is None:
        return "It was compared with no version in production before it."
    better = "better" if found.gain > 0 else "worse" if found.gain < 0 else "neither better nor worse"
    records = page.held.evaluation.records
    text = f"On {records} held-out records its {found.metric.label} was {better} than the champion's of that day"
    if found.gain:
        text += f", by {found.amounts.amount_text(found.gain)}"
    if not found.bounds_text:
        return f"{text}; no interval was measured."
    sure = "so that it is hardly chance" if found.excludes_zero else "so that it may be chance"
    return f"{text}; {found.bounds_text}, {sure}."


def picture(page: AdapterPage) -> Picture | None:
    """The gains over time in the newest one's metric, oldest left, on one axis that holds every interval and zero;
    None without any."""
    gains = [(each, gain) for each in reversed(page.published) if (gain := each.against_champion)]
    newest = gains[-1][1] if gains else None
    compared = [
        (each, gain.gain, (gain.lower, gain.upper))
        for each, gain in gains
        if newest and (gain.metric, gain.amounts) == (newest.metric, newest.amounts)
        if gain.lower is not None and gain.upper is not None
    ]
    if newest is None or not compared:
        return None
    axis = axis_of([0.0, *(end for _, _, interval in compared for end in interval)], start=95, end=5)
    across = Axis(0, max(len(compared) - 1, 1), 5, 95)

    def signed(value: float) -> str:
        text = newest.amounts.signed_text(value) if newest.amounts.is_share else f"{value:+.2g}"
        return text if value else "0"

    dots = tuple(
        Dot(
            across.place(position),
            axis.place(gain),
            f"{each.version.version}, {each.published}: {newest.amounts.signed_text(gain)}",
            low=axis.place(low),
            high=axis.place(high),
            name=each.version.version[:6] if len(compared) <= MOST_NAMED else "",
        )
        for position, (each, gain, (low, high)) in enumerate(compared)
    )
    ticks = replace(axis, ticks=tuple(sorted({0.0, axis.low, axis.high}))).labels(signed)
    bounds = "its 95 % interval" if newest.confidence is None else "the bounds that the gate decided by"
    return Picture(dots, axis.place(0.0), ticks, newest.metric, bounds)


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
        content = {"sentence": sentence(page), "picture": picture(page), "metrics": page.metrics}
        built[f"{page.name}.html"] = page_template.render(**common, **content, page=page)
    return built


def _measured(evaluation: Evaluation | None, before: str) -> Iterator[tuple[str, str, str]]:
    champion = evaluation.model("champion") if evaluation else None
    if evaluation is None or champion is None or champion.version != before:
        return
    for metric in metrics_of(champion.metrics):
        old, new = evaluation.metric("champion", metric.key), evaluation.metric("candidate", metric.key)
        if old is not None and new is not None:
            yield f"measured.{metric.key}", metric.text(old), metric.text(new)
