"""Looks at what an alias holds: which two versions are compared, and which events of the log add up."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Evaluation
from components.registry import signing
from components.registry.aliases import Pointer, before, read_alias
from components.registry.event_log import events
from components.registry.versions import resolve
from components.shared.errors import IntegrityError, ObjectMissing, UnknownName, UserError
from components.store.store import Store

BASE, PREVIOUS = "base", "previous"


class Compared(NamedTuple):
    """What looks have in common that add up. The bound holds at every drop and confidence, which so may change."""

    version: str
    against: str
    """A version's id, or `BASE`."""
    metric: str

    @property
    def role(self) -> Literal["base", "champion"]:
        """Of the other one in an evaluation whose candidate is the version."""
        return "base" if self.against == BASE else "champion"


def compared(store: Store, config: RunConfig) -> tuple[Compared, Pointer]:
    """What the config compares the version with that its alias holds. Raises UnknownName if the alias does not exist,
    or `check.against` is no version; UserError if that is the same version."""
    name, alias, against = config.adapter.name, config.adapter.alias, config.check.against
    holder = read_alias(store, name, alias)
    if holder is None:
        raise UnknownName(f"{name} has no alias {alias!r}, so there is nothing to check: promote a version first")
    if against == PREVIOUS:
        against = before(store, name, holder) or BASE
    elif against != BASE:
        against = resolve(store, f"{name}@{against}").version
    if against == holder.version:
        raise UserError(f"check.against names {against}, which {alias} holds itself: name another version")
    return Compared(holder.version, against, config.gate.metric), holder


def earlier(store: Store, name: str, compared: Compared, *, run_id: str) -> Iterator[Evaluation]:
    """The evaluations of the looks before this run's, oldest first. An event alone counts for nothing, as a training
    may write events too."""
    met = {run_id}
    for event in events(store, name):
        body, of_run = event.body, str(event.body.get("run_id"))
        if event.kind != "checked" or of_run in met or not compared._asdict().items() <= body.items():
            continue
        try:
            sha256 = str(body.get("evaluation_sha256"))
            evaluation = runs.read(store, of_run, Evaluation, sha256=sha256)
            require_of(store, name, compared, evaluation, sha256)
        except (IntegrityError, ObjectMissing):
            continue
        met.add(of_run)
        yield evaluation


def require_of(store: Store, name: str, compared: Compared, evaluation: Evaluation, sha256: str) -> None:
    """Raise IntegrityError unless the evaluation compares just these two, and is signed where the registry trusts
    keys."""
    ours, theirs = evaluation.model("candidate"), evaluation.model(compared.role)
    measured = (ours and ours.version, theirs and (theirs.version or BASE))
    if measured != (compared.version, compared.against):
        raise IntegrityError(
            f"run {evaluation.run_id} compared {measured[0]} with {measured[1]}, and {name} is to be compared as "
            f"{compared.version} with {compared.against}: check again"
        )
    signing.require_evaluated(store, name, compared.version, evaluation.run_id, sha256)
