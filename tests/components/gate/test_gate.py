import hashlib
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.config.gate import GateConfig
from components.gate.comparisons import Evidence, lead_of, luck_of
from components.gate.gate import as_markdown, replay, run_gate
from components.promote import promote as promoting
from components.promote.promote import Person, approve, take_alias
from components.records import runs
from components.records.steps import Decision, Evaluation, Lead, Measured, RuleResult
from components.registry import aliases, event_log, signing
from components.registry.audit import audit
from components.registry.event_log import append_event
from components.shared.errors import ConfigError, DataError, IntegrityError, ObjectMissing, UserError
from components.step.step import StepRun
from components.store.store import Store
from tests.components.gate.evaluated import RUN, config, evaluation, put
from tests.components.gate.evidenced import decide, rule
from tests.components.registry import adapters
from tests.components.registry.adapters import holder, published
from tests.components.report import example_runs


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


def summary(loss: float) -> str:
    ours, theirs = example_runs.metrics(loss, 0.7, 0.8, 1.2), example_runs.metrics(1.0, 0.6, 0.7, 1.0)
    evaluation = example_runs.evaluation("r", ours, theirs)
    return as_markdown(example_runs.decision(evaluation))


def test_a_promotion_names_its_version_and_a_refusal_its_reasons_and_both_every_rule() -> None:
    text = summary(0.9)
    assert text.startswith(f"# Promote: icd10-chapters@production takes {example_runs.CANDIDATE}\n")
    rule = "Loss better than the base model's | 0.900 | 2.306 | better by at least 0.05 | `gate.better_than_base_by`"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert f"| passed | {rule} |" in rows
    assert len(rows) == 2 + 8
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}
    assert example_runs.CHAMPION in text
    held = summary(1.5)
    assert held.startswith("# Hold: icd10-chapters@production stays as it is\n")
    assert "- The candidate's loss of 1.500" in held
    assert "| **failed** | Loss not worse than production's | 1.500 | 1.000 |" in held


# A champion that was chosen on the records that its successors are judged by.


TAU, SIGMA = 0.01, 0.009
"""What trainings differ by truly, and what the records add to each."""


def decided_before(version: str, loss: float, base: float = 2.0, **changes: Any) -> Decision:
    """An earlier decision on these records."""
    about = {"metric": "loss", "candidate": loss, "other": base, **changes}
    compared = RuleResult(name="better_than_base", field="f", passed=True, text="", **about)
    of_run = {"adapter": "icd10", "alias": "production", "run_id": version, "version": version, "reasons": ()}
    return Decision(decision="hold", rules=(compared,), **of_run)


@pytest.mark.parametrize(("decisions", "at_least"), [(12, 0.7), (50, 0.85)])
def test_what_is_taken_for_luck_is_what_the_best_measured_better_than_it_is(decisions: int, at_least: float) -> None:
    """The mean over five hundred test sets, of which each candidate's true loss is known; of few, rather too little."""
    random = np.random.default_rng(0)
    said, true, measured = [], [], []
    for _ in range(500):
        truly = TAU * random.standard_normal(decisions)
        seen = truly + SIGMA * random.standard_normal(decisions)
        best = int(seen.argmin())
        lead = lead_of(f"v{best}", "loss", [decided_before(f"v{night}", 1 + loss) for night, loss in enumerate(seen)])
        said.append(luck_of(lead, SIGMA * np.sqrt(2)))
        true.append(truly[best] - seen[best])
        measured.append(-seen[best])
    assert np.mean(true) > 0.3 * np.mean(measured)
    assert at_least * np.mean(true) <= np.mean(said) <= 1.05 * np.mean(true)


def test_a_recipe_that_gets_better_every_night_is_no_luck_of_its_last_version() -> None:
    earlier = [decided_before(f"v{night}", 1.5 - 0.01 * night + 0.001 * (-1) ** night) for night in range(20)]
    lead = lead_of("v19", "loss", earlier)
    assert luck_of(lead, 0.02) <= lead.gain < 0.0015


def test_the_base_is_what_records_that_were_refreshed_have_in_common() -> None:
    random = np.random.default_rng(0)
    harder, losses = random.normal(0, 0.2, 20), random.normal(1, 0.01, 20)
    same = [decided_before(f"v{night}", loss) for night, loss in enumerate(losses)]
    harder_nights = enumerate(zip(losses, harder, strict=True))
    refreshed = [decided_before(f"v{night}", loss + add, 2.0 + add) for night, (loss, add) in harder_nights]
    one, other = (lead_of("v3", "loss", each) for each in (same, refreshed))
    assert (other.gain, other.variance) == pytest.approx((one.gain, one.variance))


@pytest.mark.parametrize(
    ("champion", "nights", "metric"),
    [
        pytest.param("v3", 7, "loss", id="too few"),
        pytest.param("v99", 20, "loss", id="chosen elsewhere"),
        pytest.param("v9", 20, "exact_match", id="other metric"),
        pytest.param(None, 20, "loss", id="none"),
    ],
)
def test_without_the_decisions_that_chose_it_a_champion_is_as_measured(champion, nights: int, metric: str) -> None:
    earlier = [decided_before(f"v{night}", 1.0 + night % 3, metric=metric) for night in range(nights)]
    assert lead_of(champion, "loss", earlier) is None
    assert luck_of(None, 0.01) == luck_of(Lead(gain=-0.02, variance=0.0001, decisions=30), 0.01) == 0


def compared(margins: str = "absolute") -> tuple[Evaluation, Evidence, GateConfig]:
    """A candidate that is as far behind as the margin allows, give or take what 400 records do."""
    random, tokens = np.random.default_rng(0), np.full(400, 2.0)
    champion = 2 * random.uniform(1.9, 2.1, 400)
    nll = {"base": champion + 2, "champion": champion, "candidate": champion + 0.03 + 0.1 * random.standard_normal(400)}
    models = {
        role: Measured(
            version=None if role == "base" else role,
            metrics={"loss": of.sum() / 800, "answer_prompt_gain": 1.0, "exact_match": 0.5},
        )
        for role, of in nll.items()
    }
    columns = {f"{role}_nll": of for role, of in nll.items()}
    columns |= {f"{role}_exact_match": np.resize([0.0, 1.0], 400) for role in nll}
    columns["candidate_other_prompt_nll"] = nll["candidate"] + 1
    policy = GateConfig(margins=margins, worse_than_champion_by=0.015 if margins == "absolute" else 0.0075)
    return Evaluation(run_id="r", records=400, models=models), Evidence(tokens, columns), policy


@pytest.mark.parametrize("margins", ["absolute", "relative"])
def test_what_is_luck_of_the_lead_is_not_asked_of_the_candidate(margins: str) -> None:
    measured, records, policy = compared(margins)
    as_measured = rule(decide(measured, policy, records), "not_worse_than_champion")
    assert as_measured.undecided
    shrunk = decide(measured, policy, records, lead=Lead(gain=0.02, variance=1e-5, decisions=32))
    found = rule(shrunk, "not_worse_than_champion")
    assert found.passed
    assert found.luck is not None
    assert found.gain == as_measured.gain
    # Of 30 free: 28 / 30 of half the squared error, against the variance.
    error = float(np.std(records.columns["candidate_nll"] - records.columns["champion_nll"], ddof=1) / 2 / np.sqrt(400))
    of_metric = 1.0 if margins == "absolute" else 1 / measured.models["champion"].metrics["loss"]  # type: ignore[union-attr, operator]
    assert found.luck == pytest.approx(0.02 * 28 / 30 * error**2 / 2 / 1e-5 * of_metric, rel=0.02)
    assert found.line == pytest.approx(as_measured.line + found.luck / of_metric)
    assert "luck" in found.text


def test_a_gate_reads_the_lead_from_its_own_decisions_and_replays_with_it(store: Store) -> None:
    losses = [1.0, 0.9, 1.01, 1.0, 0.99, 1.02, 1.0, 0.98, 1.01, 1.0]
    for night, loss in enumerate(losses):
        earlier = decided_before(f"v{night}", loss).model_copy(update={"run_id": f"night-{night}"})
        runs.write(store, f"night-{night}", earlier)
        about = {"alias": "production", "run_id": f"night-{night}", "version": f"v{night}", "champion": "v"}
        append_event(store, "icd10", "refused", {**about, "test_set": ["a"]})
    found = evaluation(0.99, test_set=["a"])
    put(store, found)
    decision = run_gate(config(), store, "run-1")
    nights = np.arange(10)
    slope, start = np.polyfit(nights, losses, 1)
    left = losses - start - slope * nights
    assert decision.lead is not None
    assert (decision.lead.gain, decision.lead.variance) == pytest.approx((-left[1], (left**2).sum() / 8))
    assert decision.lead.decisions == 10
    assert replay(store, "run-1").is_same


# Where keys are trusted, what a training writes decides nothing: it may write runs, events and versions alone.


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
    return [version_of(store, run_id) for run_id in ("first", "run-1")]


def version_of(store: Store, run_id: str) -> str:
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


def gated(store: Store, run_id: str, **gate: Any) -> Decision:
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
    carried_out(store, gated(store, run_id))


def test_an_honest_run_is_promoted_replayed_and_found_sound(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    evaluated(trusting, "run-1", made[1], made[0])
    decision = gated(trusting, "run-1")
    assert (decision.verdict, decision.look) == ("promote", 2)
    carried_out(trusting, decision)
    assert holder(trusting, name="icd10") == made[1]
    assert list(trusting.list("runs/run-1/")) == []
    trusting.put("runs/run-1/config.toml", b"")
    replayed = replay(trusting, "run-1")
    assert (replayed.is_same, replayed.unsigned) == (True, "")
    assert audit(trusting, "icd10").findings == ()


def test_a_refusal_or_proposal_that_a_training_wrote_neither_holds_back_nor_stops_an_approval(
    trusting: Store, made: list[str]
) -> None:
    in_production(trusting, made[0])
    refused_event(trusting, "run-1", made[1], made[0])
    signing.sign(trusting, "icd10", made[1], VERSIONS, alias="production")
    assert promoting.promote_by_hand(trusting, f"icd10@{made[1]}", Person()).kind == "promoted"
    assert promoting.roll_back_by_hand(trusting, "icd10", Person()).kind == "rolled_back"

    third = version_of(trusting, "run-2")
    evaluated(trusting, "run-2", third, made[0], 0.8)
    assert gated(trusting, "run-2", approval={"always": True}).waits
    refused_event(trusting, "run-2", third, made[0], "proposed")  # of the true run, and names another decision
    trusting.put("runs/run-2/config.toml", b"")
    assert replay(trusting, "run-2").is_same
    approve(trusting, f"icd10@{third}", Person(by="ada", reason="good"))
    assert holder(trusting, name="icd10") == third


def test_what_a_training_forged_is_neither_decided_on_nor_promoted(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    sha256 = forged(trusting, "run-1", made[1], made[0])
    with pytest.raises(ObjectMissing, match=r"evaluations/run-1/evaluation\.json"):
        gated(trusting, "run-1")
    where = trusting.uri("runs/run-1/evaluation.json")
    with pytest.raises(IntegrityError, match=r"signed by none of registry\.evaluation_keys, so nothing is decided"):
        run_gate(config(), trusting, "run-1", evaluation_uri=where)
    run = StepRun("promote", "run-1", config(), trusting)
    with pytest.raises(ObjectMissing, match=r"evaluations/run-1/decision\.json"):
        promoting.carry_out_decision(run, sha256)
    refused_event(trusting, "run-1", made[1], made[0], "proposed")
    with pytest.raises(UserError, match="does not wait for an approval"):
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
        gated(trusting, "run-1")


def test_a_version_that_is_not_the_one_that_was_measured_is_not_signed(trusting: Store, made: list[str]) -> None:
    evaluated(trusting, "run-1", made[1], None)
    decision = gated(trusting, "run-1")
    manifest = f"adapters/icd10/versions/{made[1]}/manifest.json"
    trusting.put(manifest, trusting.get(manifest).replace(b'"run_id":"run-1"', b'"run_id":"run-9"'))
    with pytest.raises(IntegrityError, match=made[1]):
        carried_out(trusting, decision)
    assert holder(trusting, name="icd10") is None


def test_forged_refusals_raise_nothing_hide_nothing_and_are_named(trusting: Store, made: list[str]) -> None:
    in_production(trusting, made[0])
    held = version_of(trusting, "held")
    evaluated(trusting, "held", held, made[0], loss=1.5)
    assert gated(trusting, "held").decision == "hold"
    for number in range(FORGED):
        version = version_of(trusting, f"forged-{number}")
        forged(trusting, f"forged-{number}", version, made[0], decision="hold")
        refused_event(trusting, f"forged-{number}", version, made[0])
    # One that is filed earlier, about another version, under the name of a run that did refuse; and one of its passes.
    body = {"version": made[1], "champion": made[0], "alias": "production", "run_id": "held", "test_set": SAMPLE}
    append_event(trusting, "icd10", "refused", body, at="2020-01-01T00:00:00.000000Z")
    move = {"alias": "production", "from": made[0], "to": held, "manifest_sha256": "0", "run_id": "held", "reason": ""}
    append_event(trusting, "icd10", "promoted", {**move, "evidence": {"test_set": SAMPLE, "sha256": "0"}})
    evaluated(trusting, "run-1", made[1], made[0])
    decision = gated(trusting, "run-1")
    assert (decision.verdict, decision.look, decision.passed_before) == ("promote", 3, 0)
    named = [finding.what for finding in audit(trusting, "icd10").findings]
    about = [what for what in named if "no evaluation signed by one of registry.evaluation_keys is behind" in what]
    assert len(about) == FORGED + 2


def test_trusted_keys_without_keys_for_evaluations_are_one_sentence(trusting: Store, made: list[str]) -> None:
    evaluated(trusting, "run-1", made[1], None)
    trusting.evaluation_keys = ()
    with pytest.raises(ConfigError, match=r"registry\.evaluation_keys are not, so no evaluation could be believed"):
        gated(trusting, "run-1")


def test_runs_from_before_keys_were_trusted_are_still_read_and_count_no_more(store: Store, made: list[str]) -> None:
    put(store, measured("old", made[1], None), run_id="old")
    decision = run_gate(config(), store, "old")
    refused_event(store, "older", made[0], made[1])
    store.trusted_keys, store.evaluation_keys = (TRUSTED,), (EVALUATING,)
    shown = runs.find(store, "old", Decision, to_show=True)
    assert json.loads(shown.as_json()) == json.loads(decision.as_json())
    replayed = replay(store, "old")
    assert replayed.is_same
    assert "is signed by none of registry.evaluation_keys" in replayed.unsigned
    evaluated(store, "run-1", made[1], None)
    assert gated(store, "run-1").look == 1
