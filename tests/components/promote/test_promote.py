import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from components.config.schema import RunConfig
from components.promote.promote import carry_out_decision, hold, skip
from components.registry import aliases, between_runs, event_log
from components.shared.errors import AliasConflict, DataError, IntegrityError, ObjectMissing
from components.step.step import StepRun
from components.store.store import Store
from tests.components.registry import adapters
from tests.components.registry.adapters import holder

Decide = Callable[..., StepRun]


@pytest.fixture
def published(store: Store) -> list[str]:
    return [adapters.published(store, weights).version for weights in (b"1", b"2", b"3")]


@pytest.fixture
def decided(store: Store) -> Decide:
    def decide(
        version: str, champion: str | None, decision: str = "promote", *, alias: str = "production", **sections: Any
    ) -> StepRun:
        record = {"adapter": "icd", "alias": alias, "version": version, "champion": champion, "run_id": "r"}
        store.put_json("runs/r/decision.json", {**record, "decision": decision, "reasons": ["better", "by far"]})
        contents = between_runs.content_ids([hashlib.sha256(b"a").digest()])
        between_runs.note_consumed(store, "r", as_of="2026-01-01T00:00:00Z", sources={"data": "1"}, contents=contents)
        needed = {"adapter": {"name": "icd", "alias": alias}, "model": {"base": "x"}, "data": {"source": "x"}}
        config = RunConfig.model_validate({**needed, **sections})
        return StepRun("promote", "r", config, store)

    return decide


def promoted(run: StepRun) -> str:
    """Promote as the pipeline does, by the record that lies there."""
    return carry_out_decision(run, hashlib.sha256(run.store.get("runs/r/decision.json")).hexdigest())


def test_the_event_of_a_promotion_says_why(store: Store, published: list[str], decided: Decide) -> None:
    run = decided(published[0], None)
    event_uri = promoted(run)
    assert holder(store) == published[0]
    event = event_log.events(store, "icd")[-1]
    assert (event.kind, event.uri) == ("promoted", event_uri)
    assert (event.body["run_id"], event.body["reason"]) == ("r", "better by far")
    uri, sha256 = store.uri("runs/r/decision.json"), hashlib.sha256(store.get("runs/r/decision.json")).hexdigest()
    assert event.body["evidence"] == {"decision": uri, "sha256": sha256, "anchor": None, "test_set": []}
    assert run.result == {"alias": "production", "from": None, "to": published[0], "event_uri": event_uri}
    assert promoted(decided(published[0], None)) == event_uri  # the step again
    assert len(event_log.events(store, "icd")) == len(published) + 1


def test_a_step_that_fails_after_the_move_tells_the_move(store: Store, published: list[str], decided: Decide) -> None:
    run = decided(published[0], None)
    store.delete(["runs/r/consumed/header.json"])
    with pytest.raises(ObjectMissing):
        promoted(run)
    assert holder(store) == run.result["to"] == published[0]


def test_a_run_moves_the_alias_of_its_config_alone(store: Store, published: list[str], decided: Decide) -> None:
    promoted(decided(published[0], None))
    promoted(decided(published[1], None, alias="staging"))
    assert (holder(store, "staging"), holder(store)) == (published[1], published[0])


def test_a_promotion_stands_whether_others_can_be_told_or_not(
    store: Store, published: list[str], decided: Decide, caplog: pytest.LogCaptureFixture
) -> None:
    run = decided(published[0], None, announce={"webhook": "http://127.0.0.1:9/hook"})
    promoted(run)
    assert holder(store) == published[0]
    assert "Connection refused" in run.result["announced"]["webhook"]
    assert "`fineloop adapters announce icd@production` notifies it again" in caplog.text


def test_an_exchanged_decision_is_not_obeyed(store: Store, published: list[str], decided: Decide) -> None:
    sha256 = hashlib.sha256(decided(published[0], None).store.get("runs/r/decision.json")).hexdigest()
    run = decided(published[1], None)
    with pytest.raises(IntegrityError, match=f"runs/r/decision.json has sha256 .* but {sha256} was written"):
        carry_out_decision(run, sha256)
    assert holder(store) is None


@pytest.mark.parametrize("decision", ["hold", "skipped"])
def test_what_was_held_is_not_promoted(store: Store, published: list[str], decided: Decide, decision: str) -> None:
    with pytest.raises(DataError, match=f"the decision of run r is to {decision}"):
        promoted(decided(published[0], None, decision))
    assert holder(store) is None


@pytest.mark.parametrize(("key", "value"), [("adapter", "other"), ("alias", "staging"), ("run_id", "r2")])
def test_a_decision_about_another_run_adapter_or_alias_moves_nothing(
    store: Store, published: list[str], decided: Decide, key: str, value: str
) -> None:
    run = decided(published[0], None)
    record = store.get_json("runs/r/decision.json")
    store.put_json("runs/r/decision.json", {**record, key: value})
    with pytest.raises(DataError, match=rf"is about run .*{value}.*, and this is run r, icd@production: run the gate"):
        promoted(run)
    assert holder(store) is None
    assert aliases.list_aliases(store, "icd") == []


@pytest.mark.parametrize("compared_with", [None, 0])
def test_a_candidate_compared_with_yesterdays_champion_is_refused(
    store: Store, published: list[str], decided: Decide, compared_with: int | None
) -> None:
    aliases.promote(store, "icd", published[1])  # another run, after this one's evaluation
    champion = None if compared_with is None else published[compared_with]
    with pytest.raises(AliasConflict, match=published[1]):
        promoted(decided(published[2], champion))
    assert holder(store) == published[1]


def test_holding_leaves_the_alias_and_tells_why(
    store: Store, published: list[str], decided: Decide, capsys: pytest.CaptureFixture[str]
) -> None:
    aliases.promote(store, "icd", published[0])
    assert hold(decided(published[1], published[0], "hold")) == store.uri("runs/r/decision.json")
    assert holder(store) == published[0]
    assert "better by far" in capsys.readouterr().out


@pytest.mark.parametrize("end", [promoted, hold])
def test_a_decided_run_has_consumed_its_data(
    store: Store, published: list[str], decided: Decide, end: Callable[[StepRun], str]
) -> None:
    end(decided(published[0], None))
    consumed = between_runs.read_watermark(store, "icd")
    assert (consumed.run_id, consumed.sources, consumed.num_records) == ("r", {"data": "1"}, 1)


def test_a_skipped_run_leaves_alias_and_watermark(
    store: Store, published: list[str], decided: Decide, capsys: pytest.CaptureFixture[str]
) -> None:
    assert skip(decided(published[0], None, "skipped")) == store.uri("runs/r/decision.json")
    assert holder(store) is None
    assert between_runs.read_watermark(store, "icd") is None
    assert "icd is not trained: better by far" in capsys.readouterr().out
