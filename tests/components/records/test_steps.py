import json
import math

import pytest

from components.records import runs
from components.records.steps import Decision, Evaluation, Measured, PairedDifference, StepRecord, TrainResult
from components.shared.errors import IntegrityError, ObjectMissing
from components.store.store import Store

STEP = StepRecord(step="gate", status="succeeded", started_at="2026-11-24T02:00:00+00:00", seconds=1.5)
MODELS = {"base": Measured(metrics={"loss": 2.0}), "champion": None}
EVALUATION = Evaluation(run_id="r", records=3, models=MODELS, paired={"base": None})


@pytest.mark.parametrize(
    "record",
    [
        EVALUATION,
        Decision(decision="hold", adapter="a", alias="production", run_id="r", reasons=("worse",)),
        TrainResult(version="v1", version_uri="s3://b/v1"),
    ],
)
def test_a_record_is_read_as_it_was_written(store: Store, record: Evaluation | Decision | TrainResult) -> None:
    with pytest.raises(ObjectMissing):
        runs.read(store, "r", type(record))
    assert runs.find(store, "r", type(record)) is None
    runs.write(store, "r", record)
    assert runs.read(store, "r", type(record)) == runs.find(store, "r", type(record)) == record


def test_steps_come_in_the_order_in_which_they_began(store: Store) -> None:
    earlier = STEP.model_copy(update={"step": "prepare", "started_at": "2026-11-24T01:00:00+00:00"})
    for record in (STEP, earlier):
        runs.write(store, "r", record)
    assert runs.steps(store, "r") == [earlier, STEP]


def test_a_key_of_a_later_release_stays_in_the_record() -> None:
    written = json.loads(EVALUATION.as_json())
    written["slices"] = {"worst": "rare codes"}
    written["models"]["base"]["kl"] = 0.1
    again = json.loads(Evaluation.from_json(json.dumps(written).encode(), "here").as_json())
    assert again == written


def test_a_record_of_a_later_format_is_refused_and_one_without_is_the_first() -> None:
    written = json.loads(EVALUATION.as_json())
    assert written.pop("format") == 1
    assert Evaluation.from_json(json.dumps(written).encode(), "here") == EVALUATION
    written |= {"format": 2, "models": "meant otherwise"}
    with pytest.raises(IntegrityError, match="here has format 2, and this release of Fineloop reads 1: upgrade it"):
        Evaluation.from_json(json.dumps(written).encode(), "here")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "here is not JSON"),
        (b"[]", r"here is no sound decision\.json: the whole"),
        (b'{"decision": "maybe"}', r"no sound decision\.json: decision"),
    ],
)
def test_what_is_malformed_is_named(body: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        Decision.from_json(body, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_written_as_null_and_no_number_for_readers(value: float) -> None:
    evaluation = Evaluation(run_id="r", records=1, models={"candidate": Measured(metrics={"loss": value})})
    assert evaluation.metric("candidate", "loss") is None
    assert json.loads(evaluation.as_json())["models"]["candidate"]["metrics"] == {"loss": None}


def test_what_a_refresh_is_worth_is_said_of_each_kind_of_record_in_known_metrics() -> None:
    def paired(metric: str, difference: float, records: int) -> PairedDifference:
        return PairedDifference(metric=metric, difference=difference, records=records)

    kinds = {
        "new": [paired("loss", 0.268, 43), paired("exact_match", 0.186, 43)],
        "seen": [paired("loss", -0.01, 562), paired("later", 1.0, 562)],
    }
    assert EVALUATION.model_copy(update={"since_champion": kinds}).freshness == [
        "43 records new to the champion: loss 0.268 better, exact match 18.6 points better",
        "562 records that it knew: loss 0.010 worse",
    ]
    assert EVALUATION.freshness == []
