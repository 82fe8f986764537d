"""Looks at what an alias holds: what is compared, and which events of the log add up to one sequence."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Evaluation
from components.registry import signing
from components.registry.aliases import Pointer, before, read_alias
from components.registry.event_log import events
from components.registry.versions import resolve
from components.shared.errors import IntegrityError, ObjectMissing, UnknownName, UserError

if TYPE_CHECKING:
    from components.store.store import Store

BASE, PREVIOUS = "base", "previous"


@dataclass(frozen=True)
class Series:
    """What looks have in common that add up: another version, metric, drop or confidence begins anew."""

    version: str
    against: str
    """A version's id, or `BASE`."""
    metric: str
    margins: str
    worse_by: float
    confidence: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def series_of(store: "Store", config: RunConfig) -> tuple[Series, Pointer]:
    """What the config compares the version with that its alias holds. Raises UnknownName if the alias does not exist,
    or `check.against` is no version; UserError if that is the same version."""
    name, alias, gate = config.adapter.name, config.adapter.alias, config.gate
    holder, against = read_alias(store, name, alias), config.check.against
    if holder is None:
        raise UnknownName(f"{name} has no alias {alias!r}, so there is nothing to check: promote a version first")
    if against == PREVIOUS:
        against = before(store, name, holder) or BASE
    elif against != BASE:
        against = resolve(store, f"{name}@{against}").version
    if against == holder.version:
        raise UserError(f"check.against names {against}, which {alias} holds itself: name another version")
    drop = gate.total_budget if config.check.worse_by is None else config.check.worse_by
    return Series(holder.version, against, gate.metric, gate.margins, drop, gate.confidence), holder


def earlier(store: "Store", config: RunConfig, series: Series, *, run_id: str) -> Iterator[Evaluation]:
    """The evaluations of the looks before this run's, oldest first. Where the registry trusts keys, only signed ones: a
    training may write events too."""
    name, met = config.adapter.name, {run_id}
    for event in events(store, name):
        body = event.body
        is_one = event.kind == "checked" and body.get("alias") == config.adapter.alias
        if not is_one or body.get("series") != series.as_json() or body.get("run_id") in met:
            continue
        sha256 = str(body.get("evaluation_sha256"))
        try:
            evaluation = runs.read(store, str(body["run_id"]), Evaluation, sha256=sha256)
            require_of(store, config, series, evaluation, sha256)
        except (IntegrityError, ObjectMissing):
            continue
        met.add(evaluation.run_id)
        yield evaluation


def require_of(store: "Store", config: RunConfig, series: Series, evaluation: Evaluation, sha256: str) -> None:
    """Raise IntegrityError unless the evaluation compares just these two, and is signed where the registry trusts
    keys."""
    ours, theirs = evaluation.model("candidate"), evaluation.model("base" if series.against == BASE else "champion")
    compared = (ours and ours.version, theirs and (theirs.version or BASE))
    if compared != (series.version, series.against):
        raise IntegrityError(
            f"run {evaluation.run_id} compared {compared[0]} with {compared[1]}, and {config.adapter.alias} is to be "
            f"compared as {series.version} with {series.against}: check again"
        )
    signing.require_evaluated(store, config.adapter.name, series.version, evaluation.run_id, sha256)
