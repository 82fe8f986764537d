"""Versions as the registry's page shows them: each with what its run measured and decided.

The page of a run asks for what is new alone: adapters/<name>/index/page.json.gz has the rest; see `index`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from components.records import runs
from components.records.steps import Decision, Evaluation, Record
from components.registry import versions
from components.registry.index import remembered
from components.registry.names import version_key
from components.registry.versions import Version
from components.report.happened import when
from components.report.numbers import parse_moment
from components.report.past_decisions import against_champion
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import RELATIVE, Metric, is_metric, metric_of
from components.store.store import encode_json

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.store.store import Store

R = TypeVar("R", bound=Record)
DIFFERS = ("config", "dataset", "base", "environment")
"""Parts of the lineage whose changes between versions are shown."""
LINEAGE = "lineage "
"""Before a version's id, the index's name of what is compared of its lineage."""
SETTLED = timedelta(days=7)
"""Nothing more is measured of a version that is older."""


@dataclass(frozen=True)
class Gain:
    """How much better a version was than what was in production when the two were compared."""

    metric: Metric
    amounts: Metric
    """How its numbers are written."""
    gain: float
    lower: float | None
    upper: float | None
    confidence: float | None
    """Of each bound, where the gate set them; None of an evaluation's 95 % interval."""

    @property
    def bounds_text(self) -> str:
        """The bounds in words; empty where there are none."""
        if self.lower is None or self.upper is None:
            return ""
        low, high = self.amounts.signed_text(self.lower), self.amounts.signed_text(self.upper)
        if self.confidence is None:
            return f"the 95 % interval of the gain is {low} to {high}"
        return f"the gain lies between {low} and {high}, each with {self.confidence * 100:.6g} % confidence"


@dataclass(frozen=True)
class Published:
    """A version with what its run measured."""

    version: Version
    evaluation: Evaluation | None
    decision: Decision | None = None

    @property
    def published(self) -> str:
        return when(self.version.created_at)

    def metric(self, key: str) -> str:
        """As people read it; a dash where it was not measured."""
        value = self.evaluation.metric("candidate", key) if self.evaluation else None
        return "-" if value is None else metric_of(key).text(value)

    @property
    def against_champion(self) -> Gain | None:
        """As the gate decided on it, so that the page and the run's report say the same; else as it was evaluated."""
        rule = against_champion(self.decision) if self.decision else None
        if rule is not None and is_metric(rule.metric) and rule.gain is not None:
            amounts = RELATIVE if rule.relative else metric_of(rule.metric)
            return Gain(metric_of(rule.metric), amounts, rule.gain, rule.lower, rule.upper, rule.confidence)
        found = self.evaluation.paired.get("champion") if self.evaluation else None
        if found is None or not is_metric(found.metric):
            return None
        metric, (low, high) = metric_of(found.metric), found.ci95 or (None, None)
        return Gain(metric, metric, found.difference, low, high, None)


def read(
    store: "Store", name: str, aliases: "Sequence[Pointer]", moved: tuple[str | None, str] | None, most: int
) -> tuple[list[Published], int, list[tuple[str, str, str]]]:
    """The newest versions, the newest first; how many there are; and what changed in the lineage from the first of
    `moved` to the second: path, before, after."""
    ids = versions.version_ids(store, name)
    # The index keeps that of what is in production, which will be compared with what comes after it.
    lineages = {f"{LINEAGE}{version}": version for version in moved or () if version in ids}

    def entry(key: str) -> Any | None:
        return _leaves_of(store, name, lineages[key]) if key in lineages else _entry(store, name, key)

    def is_so(key: str, found: Any) -> bool:
        return _are_texts(found) if key in lineages else _is_settled(found)

    entries = remembered(store, name, "page", [*ids, *lineages], entry, is_so=is_so, always=True)
    compared = [entries.pop(key) for key in lineages if key in entries]
    changes = _changes(*compared) if len(compared) == 2 else []
    newest = sorted(entries.items(), key=lambda item: (item[1]["created_at"], item[0]), reverse=True)
    published = [_published(store, name, version, found, aliases) for version, found in newest[:most]]
    return published, len(entries), changes


def published(store: "Store", version: Version) -> Published:
    """One version, read anew."""
    return Published(version, *_of_run(store, version.run_id, version.version))


def _published(
    store: "Store", name: str, version: str, entry: Mapping[str, Any], aliases: "Sequence[Pointer]"
) -> Published:
    uri = store.uri(version_key(name, version))
    found = Version(
        name=name,
        version=version,
        uri=uri,
        created_at=entry["created_at"],
        manifest_sha256=entry["manifest_sha256"],
        run_id=entry["run_id"],
        aliases=tuple(pointer.alias for pointer in aliases if pointer.version == version),
    )
    try:
        return Published(found, _parsed(Evaluation, entry, uri), _parsed(Decision, entry, uri))
    except IntegrityError:  # of another release's index
        return published(store, found)


def _entry(store: "Store", name: str, version: str) -> dict[str, Any] | None:
    """What the index has of a version: of evaluation and decision what the pages show."""
    described = versions.described(store, name, version)
    if described is None:
        return None
    evaluation, decision = _of_run(store, described["run_id"], version)
    created = parse_moment(described["created_at"])
    is_old = created is not None and datetime.now(UTC) - created > SETTLED
    return {
        **described,
        "settled": is_old or decision is not None,
        Evaluation.FILE: _small(evaluation, {"run_id", "records", "models", "paired"}),
        Decision.FILE: small(decision),
    }


def small(decision: Decision | None) -> dict[str, Any] | None:
    """What pages show of a decision, as `Decision` reads it."""
    return _small(decision, {"decision", "verdict", "adapter", "alias", "run_id", "version", "rules"})


def _parsed(kind: type[R], entry: Mapping[str, Any], uri: str) -> R | None:
    part = entry[kind.FILE]
    return kind.from_json(encode_json(part), uri) if part else None


def _small(record: Evaluation | Decision | None, keys: set[str]) -> dict[str, Any] | None:
    if record is None:
        return None
    body: dict[str, Any] = json.loads(record.model_dump_json(include=keys, exclude_defaults=True))
    if isinstance(record, Decision):
        body["reasons"] = []
        body["rules"] = [{**rule, "text": "", "slices": []} for rule in body.get("rules", []) if "against" in rule]
    return body


def _is_settled(found: Any) -> bool:
    """Whether it is an entry of a version, and its last word."""
    return (
        isinstance(found, dict)
        and found.keys() == {*versions.DESCRIBED, "settled", Evaluation.FILE, Decision.FILE}
        and all(isinstance(found[key], str) for key in versions.DESCRIBED)
        and found["settled"] is True
    )


def _are_texts(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def _of_run(store: "Store", run_id: str, version: str) -> tuple[Evaluation | None, Decision | None]:
    """What a run measured and decided, as far as that is there and is of this version."""
    try:
        found = runs.find(store, run_id, Evaluation) if run_id else None
        candidate = found.model("candidate") if found else None
        if candidate is None or candidate.version != version:
            return None, None
        decision = runs.find(store, run_id, Decision)
    except IntegrityError:  # an audit reports it; the page shows what there is
        return None, None
    return found, decision if decision and decision.version == version else None


def _leaves_of(store: "Store", name: str, version: str) -> dict[str, str] | None:
    """What the page compares of a version's lineage, by path; None where it is damaged: an audit reports it."""
    try:
        lineage = versions.lineage_of(store, name, version)
    except (IntegrityError, ObjectMissing):
        return None
    return {path: text for part in DIFFERS for path, text in _leaves(lineage.get(part), part)}


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [
        (path, old.get(path, "-"), new.get(path, "-"))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif value is not None:
        yield path, str(value)
