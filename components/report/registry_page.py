"""The registry as static pages that need nothing else: what is in production, since when and why, and what was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.registry import event_log, runs, versions
from components.registry.aliases import PRODUCTION, read_alias
from components.registry.records import Evaluation, PairedDifference
from components.report.html import template
from components.report.numbers import moment, parse_moment
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import METRICS

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.registry.event_log import Event
    from components.registry.store import Store
    from components.registry.versions import Version

MOST_VERSIONS = 60
MOST_EVENTS = 200
DIFFERS = ("config", "dataset", "base", "environment")
"""Parts of the lineage that a change from one version to the next is told of."""
HAPPENED = {
    "published": "published",
    "promoted": "promoted by its run or by a person",
    "overridden": "promoted by a person although the gate refused it",
    "rolled_back": "gone back to",
    "refused": "refused by the gate",
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
        return "-" if value is None else METRICS[key].text(value)

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
class AdapterPage:
    """What the page of one adapter tells, newest first."""

    name: str
    pointer: "Pointer | None"
    held: Published | None
    since: str
    before: str | None
    published: tuple[Published, ...]
    num_versions: int
    events: tuple["Event", ...]
    changes: tuple[tuple[str, str, str], ...]
    """Path in the lineage, in the version before, in production."""


def read_adapter(store: "Store", name: str) -> AdapterPage:
    """Read what the page of the adapter tells.

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
    changes: Iterable[tuple[str, str, str]] = ()
    if pointer is not None and before is not None:
        changes = _changes(_lineage(store, name, before), _lineage(store, name, pointer.version))
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
    if paired is None or paired.metric not in METRICS:
        return "It was compared with no version in production before it."
    metric = METRICS[paired.metric]
    better = "better" if paired.difference > 0 else "worse" if paired.difference < 0 else "neither better nor worse"
    told = f"On {paired.records} held-out records its {metric.label} was {better} than the champion's of that day"
    if paired.difference:
        told += f", by {metric.amount_text(paired.difference)}"
    if paired.ci95 is None:
        return f"{told}; no interval was measured."
    low, high = paired.ci95
    sure = "which leaves out no difference" if low > 0 or high < 0 else "so that it may be chance"
    return f"{told}; the 95 % interval of the gain is {low:+.4g} to {high:+.4g}, {sure}."


def dots(page: AdapterPage) -> list[Dot]:
    """The paired differences over time, oldest left, on one axis that holds every interval and zero."""
    compared = [
        (each, paired) for each in reversed(page.published) if (paired := each.against_champion) and paired.ci95
    ]
    ends = [0.0, *(end for _, paired in compared if paired.ci95 for end in paired.ci95)]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def height(value: float) -> float:
        return round(95 - 90 * (value - low) / span, 2)

    return [
        Dot(
            x=round(5 + 90 * position / max(len(compared) - 1, 1), 2),
            y=height(paired.difference),
            low=height(paired.ci95[0]),
            high=height(paired.ci95[1]),
            text=f"{each.version.version}, {each.published}: {paired.difference:+.4g}",
        )
        for position, (each, paired) in enumerate(compared)
        if paired.ci95
    ]


def build_pages(pages: Sequence[AdapterPage], *, generated_at: str, address: str) -> dict[str, str]:
    """File name to HTML: index.html, and one of each adapter. Every text that came from the registry is escaped."""
    page_template = template("registry.html")
    common = {"generated_at": generated_at, "address": address, "happened": HAPPENED, "when": _when, "metrics": METRICS}
    built = {"index.html": page_template.render(**common, pages=pages, page=None)}
    for page in pages:
        told = {"sentence": sentence(page), "dots": dots(page), "zero": _zero(page)}
        built[f"{page.name}.html"] = page_template.render(**common, **told, pages=pages, page=page)
    return built


def _zero(page: AdapterPage) -> float:
    ends = [0.0, *(end for each in page.published if (p := each.against_champion) and p.ci95 for end in p.ci95)]
    return round(95 - 90 * (0.0 - min(ends)) / ((max(ends) - min(ends)) or 1.0), 2)


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
    except (IntegrityError, ObjectMissing):  # an audit tells; the page shows what there is
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
