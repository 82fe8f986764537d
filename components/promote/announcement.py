"""A move of an alias, with facts about the version that it moved to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from components.records.steps import finite
from components.registry import versions

if TYPE_CHECKING:
    from components.registry.event_log import Event, EventKind
    from components.store.store import Store


@dataclass(frozen=True)
class Announcement:
    """The content of a notification. A text that was not recorded is empty."""

    event_id: str
    """The id of the event; the same whenever the notification is repeated."""
    kind: "EventKind"
    time: str
    """ISO 8601, in UTC."""
    adapter: str
    alias: str
    version: str
    previous: str | None
    """The version that held the alias before; None when there was none."""
    actor: str
    reason: str
    run_id: str
    """The run that moved the alias; empty for a person."""
    version_uri: str
    manifest_sha256: str
    event_uri: str
    trained_by: str
    """The run that published the version."""
    method: str
    base: str
    dataset_uri: str
    metrics: Mapping[str, float]
    """The version's metrics as its run measured them, without those that are not finite."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def announcement(store: "Store", name: str, event: "Event") -> Announcement:
    """The notification of a moved alias.

    Raises:
        StoreError: the version cannot be read.
    """
    body = event.body
    version = versions.evaluated(store, versions.resolve(store, f"{name}@{body['to']}"))
    lineage = versions.read_lineage(store, version)
    return Announcement(
        event_id=event.id,
        kind=event.kind,
        time=event.time,
        adapter=name,
        alias=body["alias"],
        version=version.version,
        previous=body["from"],
        actor=body.get("actor", ""),
        reason=body.get("reason", ""),
        run_id=body.get("run_id", ""),
        version_uri=version.uri,
        manifest_sha256=version.manifest_sha256,
        event_uri=event.uri,
        trained_by=version.run_id,
        method=lineage.get("recipe", {}).get("method", ""),
        base=lineage.get("base", {}).get("reference", ""),
        dataset_uri=lineage.get("dataset", {}).get("uri", ""),
        metrics={key: number for key, value in version.metrics.items() if (number := finite(value)) is not None},
    )
