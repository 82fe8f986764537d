"""The registry as static pages that need nothing else: what is in production, since when and why, and what was."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.records import runs
from components.records.steps import Evaluation, PairedDifference
from components.registry import event_log, versions
from components.registry.aliases import PIPELINE, PRODUCTION, read_alias
from components.report.html import template
from components.report.numbers import moment, parse_moment
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import Metric, is_metric, metric_of, metrics_of

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.registry.event import Event
    from components.registry.versions import Version
    from components.store.store import Store

PAGES = "pages/"
MOST_VERSIONS = 60
MOST_EVENTS = 200
DIFFERS = ("config", "dataset", "base", "environment")
"""Parts of the lineage whose changes between versions are shown."""
HAPPENED = {
    "published": "published",
    "promoted": "promoted",
    "overridden": "promoted although the gate refused it",
    "rolled_back": "gone back to",
    "refused": "refused by the gate",
    "proposed": "left to a person by the gate",
    "collected": "removed, since nothing needed it",
}


@dataclass(frozen=True)
class Published:
    """A version with what its run measured."""

    version: "Version"
    evaluation: Evaluation | None

    @property
    def published(self) -> str:
        return _when(self.version.created_at)

    def metric(self, key: str) -> str:
        """As people read it; a dash where it was not measured."""
        value = self.evaluation.metric("candidate", key) if self.evaluation else None
        return "-" if value is None else metric_of(key).text(value)

    @property
    def against_champion(self) -> PairedDifference | None:
        """How much better it was than what was in production when it was compared."""
        return self.evaluation.paired.get("champion") if self.evaluation else None


@dataclass(frozen=True)
class Dot:
    """A version's gain over the champion of its day, in per cent of the picture; `low` and `high` end its interval."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Picture:
    """Gains over time; heights in per cent of the picture, from its top."""

    dots: tuple[Dot, ...]
    zero: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Listed:
    """An adapter in the list of adapters."""

    name: str
    in_production: str
    """The version, or what to say in its place."""
    since: str
    num_versions: int
    last: str = ""
    """What happened last, and when."""


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
        """All that was measured of any version."""
        measured = [each.evaluation.model("candidate") for each in self.published if each.evaluation]
        return metrics_of(key for model in measured if model for key in model.metrics)


def list_adapter(store: "Store", name: str) -> Listed:
    """Read what the list shows of the adapter; a damaged alias is shown as damaged."""
    num_versions = len(versions.version_ids(store, name))
    log = event_log.events(store, name)
    last = f"{what(log[-1].kind, log[-1].body)}, {_when(log[-1].time)}" if log else ""
    try:
        pointer = read_alias(store, name, PRODUCTION)
    except IntegrityError:
        return Listed(name, "unknown: the alias is damaged", "", num_versions, last)
    if pointer is None:
        return Listed(name, "nothing", "", num_versions, last)
    return Listed(name, pointer.version, _when(pointer.since), num_versions, last)


def what(kind: str, body: Mapping[str, Any]) -> str:
    """What happened to which version, and under which alias: of an event."""
    version, alias = body.get("to") or body.get("version") or "", body.get("alias")
    return f"{version} {HAPPENED[kind]}{f' at {alias}' if alias else ''}".strip()


def who(kind: str, body: Mapping[str, Any]) -> str:
    """By name: a person, or the machine."""
    if kind in ("published", "refused", "proposed") or body.get("actor") == PIPELINE:
        return "the pipeline"
    return body.get("actor") or "nobody named"


def why(body: Mapping[str, Any]) -> str:
    """The reason that was given, or the gate's sentences."""
    return str(body.get("reason") or " ".join(body.get("reasons") or []))


def write_pages(store: "Store", name: str, *, generated_at: str) -> str:
    """Write the page of the adapter and the list of all to pages/ in the store; returns the list's address.

    Of another adapter a page is written only where there is none yet: its own runs write it.

    Raises:
        IntegrityError: the adapter's alias is damaged.
    """
    names = versions.list_adapters(store)
    there = {info.key for info in store.list(PAGES)}
    wanted = [each for each in names if each == name or f"{PAGES}{each}.html" not in there]
    pages = [read_adapter(store, each) for each in wanted]
    listed = [list_adapter(store, each) for each in names]
    for file, page in build_pages(
        pages, listed, generated_at=generated_at, address=store.uri(""), runs_at="../runs/"
    ).items():
        store.put(f"{PAGES}{file}", page.encode(), content_type="text/html; charset=utf-8")
    return store.uri(f"{PAGES}index.html")


def read_adapter(store: "Store", name: str) -> AdapterPage:
    """Read what the page of the adapter shows.

    Raises:
        IntegrityError: the alias is damaged.
    """
    pointer = read_alias(store, name, PRODUCTION)
    found = versions.list_versions(store, name)
    log = event_log.events(store, name)
    shown = [Published(version, _evaluation(store, version)) for version in found[:MOST_VERSIONS]]
    by_id = {each.version.version: each for each in shown}
    held = None
    if pointer is not None and (held := by_id.get(pointer.version)) is None:
        version = versions.resolve(store, f"{name}@{pointer.version}")
        held = Published(version, _evaluation(store, version))
    before: str | None = pointer.event["from"] if pointer else None
    changes: list[tuple[str, str, str]] = []
    if pointer is not None and held is not None and before is not None:
        changes += _measured(held.evaluation, before)
        changes += _changes(_lineage(store, name, before), _lineage(store, name, pointer.version))
    return AdapterPage(
        name=name,
        pointer=pointer,
        held=held,
        since=_when(pointer.since) if pointer else "",
        before=before,
        published=tuple(shown),
        num_versions=len(found),
        events=tuple(reversed(log[-MOST_EVENTS:])),
        changes=tuple(changes),
    )


def sentence(page: AdapterPage) -> str:
    """Whether what is in production is better than what it replaced, and how sure that is."""
    if page.held is None:
        return "Nothing is in production."
    paired = page.held.against_champion
    if paired is None or not is_metric(paired.metric):
        return "It was compared with no version in production before it."
    metric = metric_of(paired.metric)
    better = "better" if paired.difference > 0 else "worse" if paired.difference < 0 else "neither better nor worse"
    text = f"On {paired.records} held-out records its {metric.label} was {better} than the champion's of that day"
    if paired.difference:
        text += f", by {metric.amount_text(paired.difference)}"
    if paired.ci95 is None:
        return f"{text}; no interval was measured."
    low, high = paired.ci95
    sure = "which leaves out no difference" if low > 0 or high < 0 else "so that it may be chance"
    gain = f"{metric.signed_text(low)} to {metric.signed_text(high)}"
    return f"{text}; the 95 % interval of the gain is {gain}, {sure}."


def picture(page: AdapterPage) -> Picture | None:
    """The paired differences over time, oldest left, on one axis that holds every interval and zero; None without."""
    compared = [
        (each, paired, paired.ci95)
        for each in reversed(page.published)
        if (paired := each.against_champion) and paired.ci95
    ]
    if not compared:
        return None
    ends = [0.0, *(end for _, _, interval in compared for end in interval)]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def height(value: float) -> float:
        return round(95 - 90 * (value - low) / span, 2)

    dots = tuple(
        Dot(
            x=round(5 + 90 * position / max(len(compared) - 1, 1), 2),
            y=height(paired.difference),
            low=height(interval[0]),
            high=height(interval[1]),
            text=f"{each.version.version}, {each.published}: {paired.difference:+.4g}",
        )
        for position, (each, paired, interval) in enumerate(compared)
    )
    ticks = tuple((height(end), f"{end:+.2g}" if end else "0") for end in sorted({0.0, low, max(ends)}))
    return Picture(dots, height(0.0), ticks)


def build_pages(
    pages: Sequence[AdapterPage], listed: Sequence[Listed], *, generated_at: str, address: str, runs_at: str = ""
) -> dict[str, str]:
    """File name to HTML: index.html with what is listed, and each page. Every text from the registry is escaped.

    `runs_at` is where the runs' folders lie, seen from a page; without it none is linked.
    """
    page_template = template("registry.html")
    common: dict[str, Any] = {"generated_at": generated_at, "address": address, "runs_at": runs_at}
    common |= {"what": what, "who": who, "why": why, "when": _when}
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


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    old = {path: text for part in DIFFERS for path, text in _leaves(before.get(part), part)}
    new = {path: text for part in DIFFERS for path, text in _leaves(after.get(part), part)}
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            yield path, old.get(path, "-"), new.get(path, "-")


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif value is not None:
        yield path, str(value)


def _lineage(store: "Store", name: str, version: str) -> Mapping[str, Any]:
    try:
        return versions.read_lineage(store, versions.resolve(store, f"{name}@{version}"))
    except (IntegrityError, ObjectMissing):  # an audit reports it; the page shows what there is
        return {}


def _evaluation(store: "Store", version: "Version") -> Evaluation | None:
    try:
        found = runs.find(store, version.run_id, Evaluation) if version.run_id else None
    except IntegrityError:
        return None
    candidate = found.model("candidate") if found else None
    return found if candidate is not None and candidate.version == version.version else None


def _when(time: str) -> str:
    parsed = parse_moment(time)
    return moment(parsed) if parsed else time
