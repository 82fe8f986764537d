"""Where keys are trusted, what a training writes decides nothing: it may write runs, events and versions alone."""

import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.gate.gate import replay, run_gate
from components.promote import promote as promoting
from components.promote.promote import Person, approve
from components.records import runs
from components.records.steps import Decision
from components.registry import aliases, signing
from components.registry.audit import audit
from components.registry.event_log import append_event
from components.shared.errors import ConfigError, IntegrityError, ObjectMissing
from components.step.step import StepRun
from components.store.store import Store
from tests.components.gate.evaluated import config, evaluation, put
from tests.components.registry import adapters
from tests.components.registry.adapters import holder

SAMPLE = [f"{number:012x}" for number in range(16)]
VERSIONS, EVALUATIONS = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
TRUSTED, EVALUATING = signing.public_text(VERSIONS), signing.public_text(EVALUATIONS)
FORGED = 2


@pytest.fixture
def trusting(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    pem = VERSIONS.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    monkeypatch.setenv(signing.KEY_VARIABLE, pem)
    store.trusted_keys, store.evaluation_keys = (TRUSTED,), (EVALUATING,)
    return store


@pytest.fixture
def made(store: Store) -> list[str]:
    """Two published versions: the first for production, the second a run's candidate."""
    return [published(store, run_id) for run_id in ("first", "run-1")]


def published(store: Store, run_id: str) -> str:
    return adapters.published(store, run_id.encode(), name="icd10", run_id=run_id).version


def measured(run_id: str, version: str, champion: str | None, loss: float = 0.9) -> dict[str, Any]:
    found = evaluation(loss, run_id=run_id, test_set=SAMPLE)
    found["models"]["candidate"]["version"] = version
    found["models"]["champion"] = {**found["models"]["champion"], "version": champion} if champion else None
    return found


def evaluated(store: Store, run_id: str, version: str, champion: str | None, loss: float = 0.9) -> None:
    """As the job that evaluates does, and then its step."""
    assert runs.key_of(store, run_id, runs.EVALUATION) == f"evaluations/{run_id}/evaluation.json"
    put(store, measured(run_id, version, champion, loss), run_id=run_id)
    signing.sign_evaluation(store, "icd10", run_id, EVALUATIONS)


def decided(store: Store, run_id: str, **gate: Any) -> Decision:
    return run_gate(config(**gate), store, run_id)


def carried_out(store: Store, decision: Decision) -> None:
    promoting.take_alias(store, decision, decision.sha256, actor=aliases.PIPELINE, reason="better")


def forged(store: Store, run_id: str, version: str, champion: str | None, *, decision: str = "promote") -> str:
    """All that the trainer's role may write to have a version promoted, or refused; returns the decision's sha256."""
    put(Store(store._client, store.bucket, store.prefix), measured(run_id, version, champion), run_id=run_id)
    record = Decision(
        decision="promote" if decision == "promote" else "hold",
        verdict=decision,
        adapter="icd10",
        alias="production",
        run_id=run_id,
        reasons=("better",),
        version=version,
        champion=champion,
        test_set=tuple(SAMPLE),
        evaluation_sha256=hashlib.sha256(store.get(f"runs/{run_id}/evaluation.json")).hexdigest(),
    )
    store.put(f"runs/{run_id}/decision.json", record.as_json())
    store.put(f"runs/{run_id}/evaluation.dsse.json", b"{}")
    return record.sha256


def refused_event(store: Store, run_id: str, version: str, champion: str, kind: str = "refused") -> None:
    about = {"version": version, "champion": champion, "alias": "production", "run_id": run_id, "test_set": SAMPLE}
    more = {"verdict": "needs approval", "decision_sha256": "0"} if kind == "proposed" else {}
    append_event(store, "icd10", kind, {**about, "reasons": ["worse"], "rules": [], **more})  # type: ignore[arg-type] - both are kinds


def in_production(store: Store, version: str, run_id: str = "first") -> None:
    """By a first run, honestly."""
    evaluated(store, run_id, version, None)
    carried_out(store, decided(store, run_id))


def test_an_honest_run_is_promoted_replayed_and_found_sound(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    evaluated(trusting, "run-1", made[1], made[0])
    decision = decided(trusting, "run-1")
    assert (decision.verdict, decision.look) == ("promote", 2)
    carried_out(trusting, decision)
    assert holder(trusting, name="icd10") == made[1]
    assert list(trusting.list("runs/run-1/")) == []
    trusting.put("runs/run-1/config.toml", b"")
    replayed = replay(trusting, "run-1")
    assert (replayed.is_same, replayed.unsigned) == (True, "")
    assert audit(trusting, "icd10").findings == ()


def test_what_a_training_forged_is_neither_decided_on_nor_promoted(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    sha256 = forged(trusting, "run-1", made[1], made[0])
    with pytest.raises(ObjectMissing, match=r"evaluations/run-1/evaluation\.json"):
        decided(trusting, "run-1")
    where = trusting.uri("runs/run-1/evaluation.json")
    with pytest.raises(IntegrityError, match=r"signed by none of registry\.evaluation_keys, so nothing is decided"):
        run_gate(config(), trusting, "run-1", evaluation_uri=where)
    run = StepRun("promote", "run-1", config(), trusting)
    with pytest.raises(ObjectMissing, match=r"evaluations/run-1/decision\.json"):
        promoting.carry_out_decision(run, sha256)
    refused_event(trusting, "run-1", made[1], made[0], "proposed")
    with pytest.raises(ObjectMissing, match=r"evaluations/run-1/decision\.json"):
        approve(trusting, f"icd10@{made[1]}", Person(by="eve", reason="good"))
    # Even where everything lies where it should, for a store whose rights are the same for all.
    for info in list(trusting.list("runs/run-1/")):
        trusting.put(info.key.replace("runs/", "evaluations/"), trusting.get(info.key))
    with pytest.raises(IntegrityError, match="is no DSSE envelope"):
        promoting.carry_out_decision(run, sha256)
    trusting.delete(["evaluations/run-1/evaluation.dsse.json"])
    with pytest.raises(IntegrityError, match=r"signed by none of registry\.evaluation_keys"):
        promoting.carry_out_decision(run, sha256)
    assert holder(trusting, name="icd10") == made[0]


@pytest.mark.parametrize("other", ["run", "evaluation", "key", "registry"])
def test_a_signature_of_something_else_vouches_for_nothing(trusting: Store, made: list[str], other: str) -> None:
    evaluated(trusting, "run-1", made[1], None)
    evaluated(trusting, "run-2", made[0], None)
    signature = "evaluations/run-1/evaluation.dsse.json"
    match other:
        case "run":
            trusting.put(signature, trusting.get("evaluations/run-2/evaluation.dsse.json"))
        case "evaluation":
            record = trusting.get_json("evaluations/run-1/evaluation.json")
            record["models"]["candidate"]["version"] = made[0]
            trusting.put_json("evaluations/run-1/evaluation.json", record)
        case "key":
            signing.sign_evaluation(trusting, "icd10", "run-1", VERSIONS)
        case "registry":
            elsewhere = Store(trusting._client, trusting.bucket, f"{trusting.prefix}/elsewhere", trusted_keys=[TRUSTED])
            for info in list(trusting.list("")):
                elsewhere.put(info.key, trusting.get(info.key))
            signing.sign_evaluation(elsewhere, "icd10", "run-1", EVALUATIONS)
            trusting.put(signature, elsewhere.get(signature))
    with pytest.raises(IntegrityError, match=r"signed by none of registry\.evaluation_keys"):
        decided(trusting, "run-1")


def test_a_version_that_is_not_the_one_that_was_measured_is_not_signed(trusting: Store, made: list[str]) -> None:
    evaluated(trusting, "run-1", made[1], None)
    decision = decided(trusting, "run-1")
    manifest = f"adapters/icd10/versions/{made[1]}/manifest.json"
    trusting.put(manifest, trusting.get(manifest).replace(b'"run_id":"run-1"', b'"run_id":"run-9"'))
    with pytest.raises(IntegrityError, match=made[1]):
        carried_out(trusting, decision)
    assert holder(trusting, name="icd10") is None


def test_forged_refusals_raise_nothing_hide_nothing_and_are_named(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    held = published(trusting, "held")
    evaluated(trusting, "held", held, made[0], loss=1.5)
    assert decided(trusting, "held").decision == "hold"
    for number in range(FORGED):
        version = published(trusting, f"forged-{number}")
        forged(trusting, f"forged-{number}", version, made[0], decision="hold")
        refused_event(trusting, f"forged-{number}", version, made[0])
    # One that is filed earlier, about another version, under the name of a run that did refuse; and one of its passes.
    body = {"version": made[1], "champion": made[0], "alias": "production", "run_id": "held", "test_set": SAMPLE}
    append_event(trusting, "icd10", "refused", body, at="2020-01-01T00:00:00.000000Z")
    move = {"alias": "production", "from": made[0], "to": held, "manifest_sha256": "0", "run_id": "held", "reason": ""}
    append_event(trusting, "icd10", "promoted", {**move, "evidence": {"test_set": SAMPLE, "sha256": "0"}})
    evaluated(trusting, "run-1", made[1], made[0])
    decision = decided(trusting, "run-1")
    assert (decision.verdict, decision.look, decision.passed_before) == ("promote", 3, 0)
    named = [finding.what for finding in audit(trusting, "icd10").findings]
    about = [what for what in named if "no evaluation signed by one of registry.evaluation_keys is behind" in what]
    assert len(about) == FORGED + 2


def test_trusted_keys_without_keys_for_evaluations_are_one_sentence(trusting: Store, made: list[str]) -> None:
    evaluated(trusting, "run-1", made[1], None)
    trusting.evaluation_keys = ()
    with pytest.raises(ConfigError, match=r"registry\.evaluation_keys are not, so no evaluation could be believed"):
        decided(trusting, "run-1")


def test_runs_from_before_keys_were_trusted_are_still_read_and_count_no_more(store: Store, made: list[str]) -> None:
    put(store, measured("old", made[1], None), run_id="old")
    decision = run_gate(config(), store, "old")
    refused_event(store, "older", made[0], made[1])
    store.trusted_keys, store.evaluation_keys = (TRUSTED,), (EVALUATING,)
    shown = runs.find(store, "old", Decision, to_show=True)
    assert shown is not None
    assert json.loads(shown.as_json()) == json.loads(decision.as_json())
    replayed = replay(store, "old")
    assert replayed.is_same
    assert "is signed by none of registry.evaluation_keys" in replayed.unsigned
    evaluated(store, "run-1", made[1], None)
    assert decided(store, "run-1").look == 1
