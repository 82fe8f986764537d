import hashlib

import pytest

from components.gate.gate import replay, run_gate
from components.promote.promote import take_alias
from components.records import runs
from components.records.steps import Decision, RuleResult
from components.registry import event_log
from components.shared.errors import DataError, IntegrityError, ObjectMissing
from components.store.store import Store
from tests.components.gate.evaluated import RUN, config, evaluation, put
from tests.components.registry.adapters import published


def test_a_promotion_writes_the_decision_and_no_event(store: Store) -> None:
    put(store, evaluation(0.9))
    decision = run_gate(config(), store, RUN)
    assert decision.promoted
    written = store.get_json(f"runs/{RUN}/decision.json")
    expected = {
        "decision": "promote", "verdict": "promote", "version": "v2", "champion": "v1", "anchor": "v2", "look": 1,
        "version_uri": store.uri("adapters/icd10/versions/v2"), "policy": config().gate.model_dump(mode="json"),
        "evaluation_sha256": hashlib.sha256(store.get(f"runs/{RUN}/evaluation.json")).hexdigest(),
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert set(written["rules"][0]) == RuleResult.model_fields.keys()
    assert event_log.events(store, "icd10") == []


def test_a_refusal_is_an_event_with_the_numbers_and_only_once(store: Store) -> None:
    put(store, evaluation(1.5))
    decision = run_gate(config(), store, RUN)
    assert decision.decision == "hold"
    assert run_gate(config(), store, RUN) == decision
    (event,) = event_log.events(store, "icd10")
    assert event.kind == "refused"
    assert (event.body["version"], event.body["champion"], event.body["run_id"]) == ("v2", "v1", RUN)
    assert event.body["reasons"] == list(decision.reasons)
    failed = next(rule for rule in event.body["rules"] if not rule["passed"])
    assert (failed["candidate"], failed["other"], failed["bound"]) == (1.5, 1.0, 0.02)


def test_what_waits_for_a_person_is_an_event_that_names_the_decision_and_only_once(store: Store) -> None:
    put(store, evaluation(0.9))
    asks = config(approval={"always": True})
    decision = run_gate(asks, store, RUN)
    assert run_gate(asks, store, RUN) == decision
    (event,) = event_log.events(store, "icd10")
    assert (event.kind, event.body["version"], event.body["verdict"]) == ("proposed", "v2", "needs approval")
    written = hashlib.sha256(store.get(f"runs/{RUN}/decision.json")).hexdigest()
    assert event.body["decision_sha256"] == written
    replayed = replay(store, RUN)
    assert replayed.is_same
    assert (replayed.now.verdict, replayed.now.basis_sha256) == ("needs approval", decision.basis_sha256)


def test_a_refusal_that_another_release_worded_is_not_recorded_again_and_another_is(store: Store) -> None:
    put(store, evaluation(1.5))
    worded = {"version": "v2", "champion": "v1", "alias": "production", "run_id": RUN, "reasons": ["too bad"]}
    event_log.append_event(store, "icd10", "refused", worded)
    run_gate(config(), store, RUN)
    assert [event.body for event in event_log.events(store, "icd10")] == [worded]
    compared_anew = evaluation(1.5)
    compared_anew["models"]["champion"]["version"] = "v3"
    put(store, compared_anew)
    run_gate(config(), store, RUN)
    assert [event.body["champion"] for event in event_log.events(store, "icd10")] == ["v1", "v3"]


@pytest.mark.parametrize("loss", [True, "1.0", [1.0]])
def test_an_evaluation_whose_numbers_are_no_numbers_is_refused(store: Store, loss: object) -> None:
    broken = evaluation(0.9)
    broken["models"]["candidate"]["metrics"]["loss"] = loss
    store.put_json(f"runs/{RUN}/evaluation.json", broken)
    with pytest.raises(IntegrityError, match=r"evaluation\.json: models\.candidate\.metrics\.loss: .* valid number"):
        run_gate(config(), store, RUN)
    assert store.read(f"runs/{RUN}/decision.json") is None


def test_the_evaluation_may_lie_elsewhere_and_has_to_lie_somewhere(store: Store) -> None:
    with pytest.raises(ObjectMissing, match=r"evaluation\.json"):
        run_gate(config(), store, RUN)
    put(store, evaluation(0.9), "elsewhere/evaluation.json")
    assert run_gate(config(), store, RUN, evaluation_uri=store.uri("elsewhere/evaluation.json")).promoted


def test_the_evaluation_of_another_run_and_of_an_unpublished_candidate_are_refused(store: Store) -> None:
    put(store, evaluation(0.9, run_id="run-0"))
    with pytest.raises(DataError, match="run-0"):
        run_gate(config(), store, RUN)
    unnamed = evaluation(0.9)
    unnamed["models"]["candidate"]["version"] = None
    put(store, unnamed)
    with pytest.raises(DataError, match="no candidate version"):
        run_gate(config(), store, RUN)
    assert store.read(f"runs/{RUN}/decision.json") is None


def test_every_run_that_was_decided_by_a_test_set_is_a_look_at_it_however_it_ended(store: Store) -> None:
    def look(run_id: str, *sample: str) -> int | None:
        put(store, evaluation(1.5, run_id=run_id, test_set=sample), run_id=run_id)
        return run_gate(config(), store, run_id).look

    evidence = {"test_set": ["a", "b", "c", "d"]}
    moved = {"alias": "production", "from": None, "to": "v1", "manifest_sha256": "0", "run_id": "run-0"}
    event_log.append_event(store, "icd10", "promoted", {**moved, "evidence": evidence})
    put(store, evaluation(0.9, run_id="run-0"), run_id="run-0")
    assert run_gate(config(), store, "run-0").promoted
    assert look("run-1", "a", "b", "c", "x") == 2
    assert look("run-1", "a", "b", "c", "x") == 2  # the step again
    assert look("run-2", "a", "b", "c", "d") == 3
    assert look("run-3", "d", "y", "z", "q") == 1  # another test set
    assert look("run-4") == 1


def test_a_candidate_that_is_the_champion_is_no_refusal_and_no_look_at_the_test_set(store: Store) -> None:
    same = evaluation(1.0, run_id="run-1", test_set=["a", "b"])
    same["models"]["candidate"]["version"] = "v1"
    put(store, same, run_id="run-1")
    assert run_gate(config(), store, "run-1").reasons == (
        "Nothing changed: the candidate is v1, the very version that production points to now.",
    )
    assert event_log.events(store, "icd10") == []
    put(store, evaluation(1.5, run_id="run-2", test_set=["a", "b"]), run_id="run-2")
    assert run_gate(config(), store, "run-2").look == 1


@pytest.mark.parametrize("kind", ["refused", "promoted"])
def test_events_of_runs_that_decided_nothing_are_no_looks(store: Store, kind: event_log.EventKind) -> None:
    """As a training could write them, to have the gate ask for more than any candidate can show."""
    put(store, evaluation(1.5, run_id="run-1", test_set=["a", "b"]), run_id="run-1")
    run_gate(config(), store, "run-1")
    for number in range(3):
        about = {"version": "v2", "alias": "production", "run_id": f"forged-{number}", "test_set": ["a", "b"]}
        move = {"from": "v1", "to": "v2", "manifest_sha256": "", "evidence": {"test_set": ["a", "b"]}}
        event_log.append_event(store, "icd10", kind, about if kind == "refused" else {**about, **move})
    runs.write(store, "forged-0", Decision(decision="skipped", adapter="a", alias="b", run_id="forged-0", reasons=()))
    store.put("runs/run-1/decision.json", b"damaged since")
    put(store, evaluation(1.5, run_id="run-2", test_set=["a", "b"]), run_id="run-2")
    assert run_gate(config(), store, "run-2").look == 2


def test_records_that_the_evaluation_was_not_made_of_are_refused(store: Store) -> None:
    put(store, evaluation(0.9, records_sha256="0" * 64))
    with pytest.raises(IntegrityError, match=r"evaluation_records\.parquet has sha256 .* evaluate run-1 again"):
        run_gate(config(), store, RUN)
    put(store, evaluation(0.9))
    named = store.get_json(f"runs/{RUN}/evaluation.json")
    store.put_json(f"runs/{RUN}/evaluation.json", {**named, "records": 299})
    with pytest.raises(IntegrityError, match="has 300 records, and the evaluation is of 299"):
        run_gate(config(), store, RUN)
    assert store.read(f"runs/{RUN}/decision.json") is None


@pytest.mark.parametrize("loss", [0.9, 1.5])
def test_a_decision_is_arrived_at_again_and_one_that_does_not_follow_is_told_apart(store: Store, loss: float) -> None:
    put(store, evaluation(loss))
    decision = run_gate(config(worse_than_champion_by=0.03), store, RUN)
    again = replay(store, RUN)
    assert again.is_same
    assert (again.now.basis_sha256, again.now.rules) == (decision.basis_sha256, decision.rules)
    put(store, evaluation(0.95))
    with pytest.raises(IntegrityError, match=r"evaluation\.json has sha256 .* it was changed since"):
        replay(store, RUN)
    put(store, evaluation(loss))
    loosened = decision.policy | {"worse_than_champion_by": 9.0}
    runs.write(store, RUN, decision.model_copy(update={"policy": loosened}))
    assert not replay(store, RUN).is_same


def test_a_decision_that_was_carried_out_is_not_decided_anew_and_no_other_is_replayed(store: Store) -> None:
    version = published(store, b"1", name="icd10", run_id=RUN).version
    found = evaluation(0.9)
    found["models"]["champion"], found["models"]["candidate"]["version"] = None, version
    put(store, found)
    decision = run_gate(config(), store, RUN)
    take_alias(store, decision, decision.sha256, actor="fineloop pipeline", reason="")
    # The run again: the candidate meets itself.
    put(store, {**found, "models": {**found["models"], "champion": found["models"]["candidate"]}})
    assert run_gate(config(), store, RUN) == decision
    put(store, found)
    assert replay(store, RUN).is_same
    runs.write(store, RUN, decision.model_copy(update={"reasons": ("Better.",)}))
    for read in (lambda: replay(store, RUN), lambda: run_gate(config(), store, RUN)):
        with pytest.raises(IntegrityError, match=r"decision\.json has sha256 .* it was changed since"):
            read()
