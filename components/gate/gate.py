"""The gate step: evaluation.json in, decision.json and, when the candidate is held, an event out."""

import logging
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.gate.policy import GateDecision, Rule, decide
from components.registry import runs
from components.shared.errors import DataError

if TYPE_CHECKING:
    from components.registry.store import Store

logger = logging.getLogger(__name__)


def run_gate(config: RunConfig, store: "Store", run_id: str, *, evaluation_uri: str | None = None) -> GateDecision:
    """Decide by the config's policy, write runs/<run_id>/decision.json, record a refusal in the adapter's event log.

    `evaluation_uri` is where the evaluation lies; None means runs/<run_id>/evaluation.json. Running it again writes the
    same decision and no second event.

    Raises:
        ObjectMissing: there is no evaluation.
        DataError: it belongs to another run, or lacks the candidate or the base.
    """
    evaluation = store.get_json(store.key(evaluation_uri) if evaluation_uri else runs.run_key(run_id, runs.EVALUATION))
    if evaluation.get("run_id") != run_id:
        other = evaluation.get("run_id")
        raise DataError(f"the evaluation belongs to run {other}, not to {run_id}: evaluate {run_id} first")
    decision = decide(evaluation, config.gate, alias=config.adapter.alias)
    if decision.version is None:
        raise DataError(f"the evaluation of run {run_id} names no candidate version: publish it, then evaluate it")
    for rule in decision.rules:
        _log(rule)
    logger.info("decision for %s %s: %s", config.adapter.name, decision.version, decision.decision)

    record = decision_record(decision, config, store, run_id)
    store.put_json(runs.run_key(run_id, runs.DECISION), record)
    if not decision.promoted:
        _record_refusal(store, record)
    return decision


def decision_record(decision: GateDecision, config: RunConfig, store: "Store", run_id: str) -> dict[str, Any]:
    """The whole of decision.json."""
    from components.registry.aliases import version_key

    name = config.adapter.name
    assert decision.version is not None  # a candidate is published before it is compared
    return {
        **decision.as_json(),
        "adapter": name,
        "alias": config.adapter.alias,
        "version_uri": store.uri(version_key(name, decision.version)),
        "run_id": run_id,
    }


def _record_refusal(store: "Store", record: dict[str, Any]) -> None:
    from components.registry.aliases import append_event

    name, version, run_id = record["adapter"], record["version"], record["run_id"]
    append_event(
        store,
        name,
        "refused",
        {key: record[key] for key in ("version", "champion", "alias", "run_id", "reasons", "rules")},
    )
    logger.info("recorded that %s %s was refused in run %s", name, version, run_id)


def _log(rule: Rule) -> None:
    verdict = "passed" if rule.passed else "FAILED"
    logger.info("%s %s = %s: %s", verdict, rule.field, "-" if rule.bound is None else rule.bound, rule.text)
