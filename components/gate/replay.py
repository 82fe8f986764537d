"""Repeats a decision from the files that the run left, without Ray and without a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.config.gate import GateConfig
from components.config.schema import AdapterConfig
from components.gate import evidence
from components.gate.policy import BEFORE, decide
from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry import signing
from components.registry.event_log import events
from components.registry.history import decisions
from components.shared.errors import ConfigError, DataError, IntegrityError, UnknownName

if TYPE_CHECKING:
    from components.store.store import Store


@dataclass(frozen=True)
class Replayed:
    """The recorded decision, and the decision that the same evidence gives today."""

    recorded: Decision
    found: Decision
    unsigned: str = ""
    """Where the registry trusts keys: why the evidence counts no more; empty if it is signed."""

    @property
    def is_same(self) -> bool:
        """Whether both reach the same verdict on the same basis. Release 0.1.0 recorded only the outcome."""
        if not self.recorded.basis_sha256:
            return self.found.decision == self.recorded.decision
        return (self.found.verdict, self.found.basis_sha256) == (self.recorded.verdict, self.recorded.basis_sha256)


def replay(store: "Store", run_id: str) -> Replayed:
    """Decide again by the recorded policy, evaluation and records of a run, without writing anything.

    Raises:
        UnknownName: there is no such run.
        ObjectMissing: the run has no decision, or the evidence for it is gone.
        IntegrityError: the decision is not the one that the log names, or the evidence for it has changed.
        DataError: the run was skipped, so that nothing was evaluated.
    """
    if next(store.list(runs.run_key(run_id)), None) is None:
        raise UnknownName(f"there is no run {run_id!r} in {store.uri('runs/')}: give the id that its report names")
    recorded = runs.read(store, run_id, Decision, to_show=True)
    if recorded.decision == "skipped":
        raise DataError(f"run {run_id} was skipped: it evaluated nothing that could be decided on again")
    if (logged := decisions(events(store, recorded.adapter)).get(run_id)) is not None:
        runs.read(store, run_id, Decision, sha256=logged[0], to_show=True)
    evaluation = runs.read(store, run_id, Evaluation, sha256=recorded.evaluation_sha256 or None, to_show=True)
    unsigned = ""
    try:
        about = recorded.adapter, recorded.version, run_id, recorded.evaluation_sha256
        signing.require_evaluated(store, *about)
    except (IntegrityError, ConfigError) as exc:
        unsigned = str(exc)
    found = decide(
        evaluation,
        evidence.read(store, evaluation),
        GateConfig.model_validate({**BEFORE, **recorded.policy}),
        AdapterConfig(name=recorded.adapter, alias=recorded.alias),
        look=recorded.look or 1,
        passed_before=recorded.passed_before,
        lead=recorded.lead,
        revision=recorded.revision,
    )
    return Replayed(recorded, found, unsigned)
