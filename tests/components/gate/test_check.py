"""Whether production is still good: the verdict, its error over years of looks, and which looks count."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks import check as years
from components.config.gate import GateConfig
from components.config.schema import RunConfig
from components.gate import check as checking
from components.gate.check import Judged, check, judge, records_for_rare
from components.promote.promote import roll_back_worse
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured
from components.registry import aliases, signing
from components.registry.audit import audit
from components.registry.event_log import append_event, events
from components.shared.errors import AliasConflict, DataError, IntegrityError
from components.shared.paired import Pairs
from components.step.step import StepRun
from components.store.store import Store
from tests.components.gate import evaluated
from tests.components.registry.adapters import published

Look = Callable[..., Any]


def sample(gain: float, count: int, *, deviation: float = 0.35) -> Pairs:
    drawn = np.random.default_rng(0).normal(0, deviation, count)
    return Pairs(drawn - drawn.mean() + gain, np.zeros(count), np.ones(count))


def judged(pairs: Pairs) -> Judged:
    return judge(pairs, 0.05, 0.95, least=30, for_rare=records_for_rare(GateConfig(), 1.0))


def test_a_verdict_says_what_is_shown() -> None:
    assert judged(sample(0.1, 500)).verdict == "still better"
    assert judged(sample(0.0, 1000)).verdict == "as good"
    assert judged(sample(-0.06, 1000)).verdict == "worse"
    assert judged(sample(-0.02, 100)).verdict == "cannot tell"
    assert judged(sample(-9.0, 29)).verdict == "cannot tell"  # fewer than the least


def test_as_good_is_said_only_on_records_that_would_hold_a_rare_loss() -> None:
    assert 0.99**459 <= 0.01 < 0.99**458
    few = judged(sample(0.0, 458, deviation=0.1))
    assert (few.verdict, few.needed, few.bounds.lower > -0.05) == ("cannot tell", 1, True)
    assert judged(sample(0.0, 459, deviation=0.1)).verdict == "as good"
    weights = np.tile([1.0, 9.0], 300)  # of 600 records, half of which tell little
    assert judged(replace(sample(0.0, 600, deviation=0.1), weights=weights)).verdict == "cannot tell"
    assert judged(sample(0.5, 40)).verdict == "still better"
    assert judged(sample(-0.5, 40)).verdict == "worse"


def test_as_good_allows_for_large_losses_beyond_those_that_were_drawn() -> None:
    """Worse by the drop, in losses whose logarithm is normal: most samples hold too few of the largest."""
    rng, gate = np.random.default_rng(1), GateConfig()
    said = {rare_loss: 0 for rare_loss in (0.0, gate.rare_loss(1.0))}
    for _ in range(300):
        drawn = rng.lognormal(0, 1.5, 2000)
        lost = 0.05 + 0.35 * (drawn - np.exp(1.5**2 / 2)) / ((np.exp(1.5**2) - 1) * np.exp(1.5**2)) ** 0.5
        for rare_loss in said:
            looks = (
                judge(
                    Pairs(lost[:count], np.zeros(count), np.ones(count), lower_is_better=True),
                    0.05,
                    0.95,
                    least=30,
                    for_rare=459,
                    rare_loss=rare_loss,
                )
                for count in range(500, 2001, 100)
            )
            said[rare_loss] += any(look.verdict in ("as good", "still better") for look in looks)
    without, allowed = (count / 300 for count in said.values())
    assert without > 0.06 >= allowed


def test_a_drop_that_is_smaller_than_the_named_one_takes_nothing_back() -> None:
    small = judged(sample(-0.01, 20_000))
    assert (small.verdict, small.bounds.upper < 0) == ("as good", True)


def test_what_it_says_is_needed_is_enough() -> None:
    few = judged(sample(-0.05, 120))
    assert few.verdict == "cannot tell"
    assert few.needed is not None
    assert judged(sample(-0.05, 120 + few.needed + 60)).verdict == "worse"
    assert judged(sample(-0.05, 120 + few.needed // 2)).verdict == "cannot tell"


@pytest.mark.parametrize("kind", years.KINDS)
def test_in_a_year_of_looks_equal_versions_are_rarely_accused(kind: str) -> None:
    draw, _, largest = years.KINDS[kind]
    drawn = draw(np.random.default_rng(3), (300, 365 * 10), 0.0)
    worse, good = years.verdicts(drawn, 10, 0.05, largest)
    for year in range(2):
        years.confirm(drawn[year], 10, 0.05, largest, worse[year], good[year])
    assert worse.any(axis=1).mean() <= 0.05
    assert good.any(axis=1).mean() > 0.9


# With a store: what one look leaves to the next.


@pytest.fixture
def config() -> RunConfig:
    return evaluated.config()


@pytest.fixture
def versions(store: Store) -> list[str]:
    """The second is in production, and the first was before it."""
    made = [published(store, text.encode(), name="icd10", run_id=text).version for text in ("first", "second")]
    for version in made:
        aliases.promote(store, "icd10", version)
    return made


def written(
    store: Store, run_id: str, versions: Sequence[str], losses: Sequence[float], *, first: int, of: str = "id"
) -> None:
    """As the job that compares leaves it: `losses` of the second version, a record each; the first one's are 1."""
    names = [f"{first + place}" for place in range(len(losses))]
    columns = {"id": names, of: names, "answer_tokens": [1] * len(losses)}
    columns |= {"champion_nll": [1.0] * len(losses), "candidate_nll": list(losses)}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    store.put(runs.key_of(store, run_id, runs.EVALUATION_RECORDS), sink.getvalue())
    roles = zip(("champion", "candidate"), versions, strict=True)
    models = {role: Measured(version=version, metrics={}) for role, version in roles}
    about = {"dataset_uri": "s3://b/datasets/new", "records_sha256": hashlib.sha256(sink.getvalue()).hexdigest()}
    runs.write(store, run_id, Evaluation(run_id=run_id, records=len(losses), models=models, **about))


@pytest.fixture
def look(store: Store, config: RunConfig, versions: list[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Look as the run `run_id`; its job finds these losses. No losses: no new records."""

    def run(run_id: str, losses: Sequence[float] = (), *, first: int = 0, of: str = "id", **more: Any) -> Any:
        def job(step_run: StepRun, task: str, *arguments: str, **_: Any) -> str:
            assert task == "evaluate"
            assert arguments[arguments.index("--against") + 1] == more.pop("against", versions[0])
            written(store, run_id, versions, losses, first=first, of=of)
            return "job"

        monkeypatch.setattr(checking, "submit_step", job)
        own = config.model_copy(update={"check": config.check.model_copy(update=more.pop("check", {}))})
        step = StepRun("check", run_id, own, store)
        rolls_back = check(step, "s3://b/datasets/new" if losses else "")
        return {**step.result, "rolls_back": rolls_back}

    return run


def worse(count: int, by: float = 0.2) -> list[float]:
    return [1 + by + 0.1 * (place % 3 - 1) for place in range(count)]


def test_looks_of_many_nights_are_one_look_in_the_log_too(store: Store, look: Look, versions: list[str]) -> None:
    first, second = look("night-1", worse(20)), look("night-2", worse(25), first=20)
    assert look("night-2", worse(25), first=20) == second  # the step again, which logs nothing
    assert (first["verdict"], second["verdict"], second["records"]) == ("cannot tell", "worse", 45)
    logged = [event.body for event in events(store, "icd10") if event.kind == "checked"]
    found = [(body["run_id"], body["verdict"], body["new_records"]) for body in logged]
    assert found == [("night-1", "cannot tell", 20), ("night-2", "worse", 25)]
    assert audit(store, "icd10").findings == ()
    assert runs.read(store, "night-2", Decision).reasons == (second["reasons"][0],)
    assert not second["rolls_back"]  # the config does not ask for it


def test_a_look_at_nothing_new_says_what_was_said_and_logs_nothing(store: Store, look: Look) -> None:
    assert look("none") == {"rolls_back": False}
    said = look("night-1", worse(40))
    before = events(store, "icd10")
    again = look("night-2")
    assert again == {**said, "new_records": 0}
    assert events(store, "icd10") == before


@pytest.mark.parametrize("of", ["id", "group"])
def test_a_record_or_group_that_a_look_has_counted_is_not_counted_again(look: Look, of: str) -> None:
    look("night-1", worse(20), of=of)
    assert look("night-2", worse(20), first=10, of=of)["records"] == 30


def test_looks_at_the_same_two_versions_add_up_whatever_the_drop(store: Store, look: Look, versions: list[str]) -> None:
    look("night-1", worse(40))
    other = look("night-2", worse(20), first=40, check={"worse_by": 0.3})
    assert (other["records"], other["worse_by"]) == (60, 0.3)
    aliases.rollback(store, "icd10")
    with pytest.raises(IntegrityError, match="is to be compared as"):  # production is the first, beside its base
        look("night-3", worse(20), first=60, against="base")
    aliases.promote(store, "icd10", versions[1])
    assert look("night-4", worse(20), first=60)["records"] == 80


def test_a_number_that_is_none_is_an_error_and_no_look(store: Store, look: Look) -> None:
    for number in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="sound number"):
            look("night-1", [*worse(40), number])
    assert [event for event in events(store, "icd10") if event.kind == "checked"] == []


def test_an_event_whose_evidence_is_gone_or_changed_counts_for_nothing(store: Store, look: Look) -> None:
    look("night-1", worse(40))
    (event,) = [event for event in events(store, "icd10") if event.kind == "checked"]
    append_event(store, "icd10", "checked", {**event.body, "run_id": "forged"})
    evaluation = store.get_json("runs/night-1/evaluation.json")
    store.put_json("runs/night-1/evaluation.json", {**evaluation, "held_out": 7})
    found = [finding.what for finding in audit(store, "icd10").findings]
    assert any("is another than" in what for what in found)
    assert any("is gone" in what for what in found)
    after = look("night-2", worse(20), first=40)
    assert after["records"] == 20


def test_where_keys_are_trusted_an_unsigned_look_counts_for_nothing(
    store: Store, look: Look, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, of_versions = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    store.trusted_keys, store.evaluation_keys = (signing.public_text(of_versions),), (signing.public_text(key),)
    monkeypatch.setattr(signing, "signer_from", lambda environment, variables=None: key)
    look("night-1", worse(20))
    # A training writes an evaluation and an event like that one, of records that production is bad at.
    written(store, "forged", versions, worse(500, by=3.0), first=1000)
    sha256 = hashlib.sha256(store.get(runs.key_of(store, "forged", runs.EVALUATION))).hexdigest()
    (event,) = [event for event in events(store, "icd10") if event.kind == "checked"]
    append_event(store, "icd10", "checked", {**event.body, "run_id": "forged", "evaluation_sha256": sha256})
    after = look("night-2", worse(5), first=20)
    assert (after["verdict"], after["records"]) == ("cannot tell", 25)
    monkeypatch.setattr(signing, "signer_from", lambda environment, variables=None: None)
    with pytest.raises(IntegrityError, match="signed by none"):
        look("night-3", worse(5), first=25)


def test_what_is_worse_goes_back_once_and_not_from_under_another_version(
    store: Store, look: Look, config: RunConfig, versions: list[str]
) -> None:
    said = look("night-1", worse(60), check={"roll_back": True})
    assert said["rolls_back"]
    step = StepRun("roll-back", "night-1", config, store)
    uri = roll_back_worse(step, said["version"], said["reasons"][0])
    assert roll_back_worse(step, said["version"], said["reasons"][0]) == uri
    pointer = aliases.read_alias(store, "icd10", "production")
    assert (pointer.version, pointer.kind, pointer.event["actor"]) == (versions[0], "rolled_back", aliases.PIPELINE)
    assert versions[1] in pointer.event["reason"]
    assert audit(store, "icd10").findings == ()
    # Another look of it finds it gone already; where another version has come since, nothing is taken from that.
    assert roll_back_worse(StepRun("roll-back", "night-2", config, store), versions[1], "late") == uri
    aliases.promote(store, "icd10", published(store, b"third", name="icd10").version)
    with pytest.raises(AliasConflict):
        roll_back_worse(StepRun("roll-back", "night-3", config, store), versions[1], "late")


def test_a_reader_that_knows_no_looks_passes_them_over(store: Store, look: Look, monkeypatch: Any) -> None:
    """A release from before reads the same log: its kinds are fixed in a schema that this event is not in."""
    look("night-1", worse(40))
    body = json.loads(store.get([info.key for info in store.list("adapters/icd10/events/")][-1]))
    assert body["kind"] == "checked"
    store.put_json(f"adapters/icd10/events/{body['time'].replace(':', '')}-later.json", {**body, "kind": "of 2031"})
    assert [event.kind for event in events(store, "icd10")].count("checked") == 1
