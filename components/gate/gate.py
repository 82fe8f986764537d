"""The gate step: reads evaluation.json, writes decision.json and, unless the candidate is promoted, an event."""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial

from components.config.gate import GateConfig
from components.config.schema import AdapterConfig, RunConfig
from components.config.section import without_removed
from components.gate.comparisons import lead_of, read_evidence
from components.gate.policy import LEGACY_POLICY, decide, in_force
from components.records import runs
from components.records.steps import Decision, Evaluation, RuleResult
from components.registry import signing
from components.registry.event_log import EventKind, append_event, decided_before, decisions, events, promotion
from components.registry.identity import version_key
from components.shared.errors import ConfigError, DataError, IntegrityError, UnknownName
from components.shared.metrics import metric_of
from components.store.store import ReadOnce, Store

logger = logging.getLogger(__name__)


def run_gate(config: RunConfig, store: Store, run_id: str, *, evaluation_uri: str | None = None) -> Decision:
    """Decide by the config's policy, write the run's decision.json, and append an event to the adapter's log where the
    candidate is held, unless it is the champion itself.

    `evaluation_uri` is the address of the evaluation; None means the run's own. Running it again writes the same
    decision and no second event; a decision that was carried out is not made again. Where the registry trusts keys,
    only evaluations that are signed count, this one and those of earlier decisions.

    Raises:
        ObjectMissing: there is no evaluation, or its records are gone.
        IntegrityError: the evaluation is malformed, its records are not those that it was made from, or it is not
            signed.
        ConfigError: the config trusts keys, and none for evaluations.
        DataError: the evaluation belongs to another run, or lacks the candidate or the base.
    """
    key = store.key(evaluation_uri) if evaluation_uri else runs.key_of(store, run_id, runs.EVALUATION)
    body = store.get(key)
    evaluation = Evaluation.from_json(body, store.uri(key))
    if evaluation.run_id != run_id:
        other = evaluation.run_id
        raise DataError(f"the evaluation belongs to run {other}, not to {run_id}: evaluate {run_id} first")
    adapter, sha256 = config.adapter, hashlib.sha256(body).hexdigest()
    log = events(store, adapter.name)
    if carried_out := promotion(log, run_id, adapter.alias):
        return runs.read(store, run_id, Decision, sha256=carried_out.body["evidence"]["sha256"])
    if candidate := evaluation.model("candidate"):
        signing.require_evaluated(store, adapter.name, candidate.version, run_id, sha256)
    earlier = ReadOnce(store)  # a decision is asked for more than once
    behind = partial(signing.decision_behind, earlier, adapter.name)
    on_these, counts = (log, adapter.alias, evaluation.test_set), partial(signing.counts, earlier, adapter.name)
    before = decided_before(*on_these, run_id=run_id, counts=counts)
    passed = decided_before(*on_these, run_id=run_id, counts=lambda event: behind(event) is not None, replaced=True)
    decisions = [decision for event in before if (decision := behind(event))]
    champion = evaluation.model("champion")
    decided = decide(
        evaluation,
        read_evidence(store, evaluation),
        in_force(config.gate, evaluation),
        adapter,
        look=len(before) + 1,
        passed_before=len(passed),
        lead=lead_of(champion.version, config.gate.metric, decisions) if champion else None,
    )
    assert decided.version is not None  # a candidate without one is refused
    uri = store.uri(version_key(decided.adapter, decided.version))
    decision = decided.model_copy(update={"version_uri": uri, "evaluation_sha256": sha256})
    for rule in decision.rules:
        result, bound = rule.short if rule.passed else rule.short.upper(), "-" if rule.bound is None else rule.bound
        logger.info("%s %s = %s: %s", result, rule.field, bound, rule.text)
    logger.info("verdict on %s %s: %s", decision.adapter, decision.version, decision.verdict)

    runs.write(store, run_id, decision)
    if not decision.promoted and not decision.changes_nothing:
        _record(store, decision)
    return decision


def _record(store: Store, decision: Decision) -> None:
    """Record a candidate that was refused, or that waits for a person, who will name exactly this decision."""
    kind: EventKind = "proposed" if decision.waits else "refused"
    about = {"version", "champion", "alias", "run_id"}
    body = decision.model_dump(mode="json", include={*about, "verdict", "test_set", "reasons", "rules"})
    if decision.waits:
        body["decision_sha256"] = decision.sha256
        about |= {"decision_sha256"}
    # An event is recognized by what it is about: a step repeated after an upgrade may word its reasons differently.
    for event in events(store, decision.adapter):
        if event.kind == kind and all(event.body.get(key) == body[key] for key in about):
            return
    append_event(store, decision.adapter, kind, body)
    logger.info("recorded that %s %s was %s in run %s", decision.adapter, decision.version, kind, decision.run_id)


@dataclass(frozen=True)
class Replayed:
    """The recorded decision, and the decision that the same evidence gives today."""

    recorded: Decision
    now: Decision
    unsigned: str = ""
    """Where the registry trusts keys: why the evidence counts no more; empty if it is signed."""

    @property
    def is_same(self) -> bool:
        return (self.now.verdict, self.now.basis_sha256) == (self.recorded.verdict, self.recorded.basis_sha256)


def replay(store: Store, run_id: str) -> Replayed:
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
    if (logged := decisions(signing.believed(store, recorded.adapter)).get(run_id)) is not None:
        runs.read(store, run_id, Decision, sha256=logged[0], to_show=True)
    evaluation = runs.read(store, run_id, Evaluation, sha256=recorded.evaluation_sha256 or None, to_show=True)
    unsigned = ""
    try:
        signing.require_evaluated(store, recorded.adapter, recorded.version, run_id, recorded.evaluation_sha256)
    except (IntegrityError, ConfigError) as exc:
        unsigned = str(exc)
    decision = decide(
        evaluation,
        read_evidence(store, evaluation),
        GateConfig.model_validate(without_removed({**LEGACY_POLICY, **recorded.policy}, "gate")),
        AdapterConfig(name=recorded.adapter, alias=recorded.alias),
        look=recorded.look or 1,
        passed_before=recorded.passed_before,
        lead=recorded.lead,
    )
    return Replayed(recorded, decision, unsigned)


def as_markdown(decision: Decision) -> str:
    """The decision as the Kubeflow UI shows it with the step: outcome, reasons, and every rule with its numbers."""

    def row(rule: RuleResult) -> str:
        ours, theirs = (
            "" if value is None or rule.metric is None else metric_of(rule.metric).text(value)
            for value in (rule.candidate, rule.other)
        )
        result = rule.short if rule.passed else f"**{rule.short}**"
        return f"| {' | '.join(map(cell, (result, rule.title, ours, theirs, rule.bound_text, f'`{rule.field}`')))} |"

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    place = f"{decision.adapter}@{decision.alias}"
    headline = f"{place} takes {decision.version}" if decision.promoted else f"{place} stays as it is"
    lines = [
        f"# {(decision.verdict or decision.decision).capitalize()}: {headline}",
        "",
        *[f"- {cell(reason)}" for reason in decision.reasons],
        "",
        "| | rule | candidate | other | bound | setting |",
        "|---|---|---|---|---|---|",
        *map(row, decision.rules),
        "",
        f"Compared with {decision.champion or 'no version, because the alias is empty'}.",
    ]
    return "\n".join(lines) + "\n"
