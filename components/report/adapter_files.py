"""The files of an adapter that a run's report and the registry's pages read.

Only new ones are read from the store: the adapter's index has the rest; see `cache`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from components.records.steps import Decision, Evaluation, RuleResult
from components.registry import event_log, versions
from components.registry.aliases import Pointer, list_aliases
from components.registry.cache import Index, mark_of
from components.registry.event_log import Event
from components.registry.versions import Entry, Version
from components.report.html import when
from components.shared.metrics import is_metric, metric_of
from components.store.store import ReadOnce, Store

DIFFERS = ("config", "dataset", "base", "environment")
"""Parts of the lineage for which the pages show changes between versions."""


@dataclass(frozen=True)
class Published:
    """A version with what its run measured and decided."""

    version: Version
    evaluation: Evaluation | None
    decision: Decision | None = None

    @property
    def published(self) -> str:
        return when(self.version.created_at)

    def metric(self, key: str) -> str:
        """Return the candidate's metric as text; a dash if it was not measured."""
        value = self.evaluation.metric("candidate", key) if self.evaluation else None
        return "-" if value is None else metric_of(key).text(value)

    @property
    def against_champion(self) -> RuleResult | None:
        """The rule that compared it with the champion of its day; None if none set a bound of the gain."""
        for rule in self.decision.rules if self.decision else ():
            if rule.name == "not_worse_than_champion" and is_metric(rule.metric) and rule.gain is not None:
                return rule if (rule.lower, rule.upper) != (None, None) else None
        return None


class AdapterFiles:
    """An adapter at the time of asking; each of its objects is read once."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = ReadOnce(store), name
        self._index = Index(self.store, name)
        self.mark = mark_of(self.store, name)
        """The adapter's mark before anything else of it was read; None while others change it."""

    def keep(self) -> None:
        self._index.keep()

    @cached_property
    def aliases(self) -> list[Pointer]:
        return list_aliases(self.store, self.name)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The index entry of each version, the newest first."""
        return versions.entries(self.store, self.name, self._index)

    @cached_property
    def log(self) -> list[Event]:
        return event_log.events(self.store, self.name, index=self._index)

    def published(self, version: str) -> Published:
        entry = self.entries[version]
        return Published(entry.version(self.store, self.name, version, self.aliases), entry.evaluation, entry.decision)

    def changes(self, before: str | None, after: str) -> list[tuple[str, str, str]]:
        """Return the changes of the lineage as (path, before, after); empty if one of the two cannot be read."""
        # The index keeps the production version's lineage, to compare it with the next version's.
        both = [version for version in (before, after) if version in self.entries]
        lineages = self._index.of("lineages", both, self._compared, is_so=_are_texts)
        if before is None or not {before, after} <= lineages.keys():
            return []
        old, new = lineages[before], lineages[after]
        return [
            (path, old.get(path, "-"), new.get(path, "-"))
            for path in sorted(old.keys() | new.keys())
            if old.get(path) != new.get(path)
        ]

    def _compared(self, version: str) -> dict[str, str] | None:
        """What the pages compare of the version's lineage, by path; None if the lineage is damaged."""
        lineage = versions.sound_lineage(self.store, self.published(version).version)
        if lineage is None:
            return None
        return {path: text for part in DIFFERS for path, text in _leaves(lineage.get(part), part)}


def _are_texts(_key: str, leaves: object) -> bool:
    return isinstance(leaves, dict) and all(isinstance(text, str) for text in leaves.values())


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif value is not None:
        yield path, str(value)
