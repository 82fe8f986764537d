"""Ten nights of a schedule: new data each, training that goes on from production, and in between a rollback and a
promotion by hand.

Nothing is asked of what the product says about itself in one place alone. The judge follows the raw events with plain
boto3: from them alone it knows who held the alias each night, by whose decision, and so to which version as the best so
far the night's candidate had to be held, and how many decisions its records had seen.
"""

import io
import json
import os
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.journeys.bucket import NAME, Bucket
from tests.journeys.conftest import Done, Person
from tests.models.tiny import build_base, colour_rows

pytestmark = [pytest.mark.e2e, pytest.mark.full]

NIGHTS, DAY_S, FIRST, EACH = 10, 86_400, 480, 16
ROLLED_BACK_AFTER, BY_HAND_AFTER = 4, 7
"""Nights after which a person steps in."""
SPOILED = (2, BY_HAND_AFTER)
"""Nights whose training goes wrong."""
BUDGET = 2.0
CONFIG = """\
[adapter]
name = "colours"
[model]
base = {base}
max_length = 64
[data]
source = {data}
eval_share = 0.25
min_new_records = 10
window_days = 1.5
replay_share = 0.5
replay_from = "production"
[train]
start_from = "production"
learning_rate = 0.01
epochs = 4
[evaluate]
records = 60
max_records = 0
max_new_tokens = 8
general_passages = 0
samples = 2
[gate]
worse_than_champion_by = {budget}
worse_than_best_by = {budget}
guards = []
slices = []
limits = []
"""
LATER = "--set train.max_steps=2 --set train.learning_rate={rate} --set train.seed={night}"
"""Two steps of an optimizer that has just begun, on an adapter that has learned: worse, and inside the margins."""


@dataclass(frozen=True)
class Night:
    run_id: str
    evaluation: dict[str, Any]
    decision: dict[str, Any]
    losses: dict[str, float]
    """Loss of each model in nats per answer token, computed from the records."""


@pytest.fixture(scope="module")
def answers(person: Person) -> list[Done]:
    """All ten, with what the person does in between."""
    base, data = build_base(person.folder / "base"), person.folder / "data"
    data.mkdir()
    source, budget = json.dumps(str(data)), BUDGET
    person.has("nights.toml", CONFIG.format(base=json.dumps(str(base)), data=source, budget=budget))
    rows = colour_rows(FIRST + EACH * NIGHTS)
    person.does("fineloop ray up")
    done: list[Done] = []
    for night in range(NIGHTS):
        new = rows[:FIRST] if night == 0 else rows[FIRST + EACH * (night - 1) :][:EACH]
        file = person.has(f"data/{night:02}.jsonl", "".join(json.dumps(row) + "\n" for row in new))
        os.utime(file, (1.7e9 + night * DAY_S,) * 2)
        later = LATER.format(rate=0.2 if night in SPOILED else 0.02, night=night) if night else ""
        done.append(person.does(f"fineloop run -c nights.toml --json {later}"))
        if night == ROLLED_BACK_AFTER:
            person.does("fineloop adapters rollback colours --by ann --reason 'users complain'")
        if night == BY_HAND_AFTER:
            version = done[-1].answer["version"]
            person.does(f"fineloop adapters promote colours@{version} --by ann --reason 'a new beginning'")
    return done


@pytest.fixture(scope="module")
def bucket(person: Person, answers: list[Done]) -> Bucket:
    return Bucket.of(person)


@pytest.fixture(scope="module")
def nights(bucket: Bucket, answers: list[Done]) -> list[Night]:
    def read(run_id: str) -> Night:
        table = pq.read_table(io.BytesIO(bucket.read(f"runs/{run_id}/evaluation_records.parquet"))).to_pydict()
        of_roles = {column.removesuffix("_nll"): table[column] for column in table if column.endswith("_nll")}
        tokens = sum(table["answer_tokens"])
        losses = {role: sum(values) / tokens for role, values in of_roles.items() if not role.endswith("_prompt")}
        evaluation, decision = (bucket.json(f"runs/{run_id}/{file}.json") for file in ("evaluation", "decision"))
        return Night(run_id, evaluation, decision, losses)

    return [read(done.answer["run_id"]) for done in answers]


def version_of(night: Night, role: str) -> str | None:
    model = night.evaluation["models"].get(role)
    return model["version"] if model else None


def test_production_answers_the_earlier_records_and_all_are_replayed(bucket: Bucket, nights: list[Night]) -> None:
    def about(uri: str) -> dict[str, Any]:
        return bucket.json(f"{uri.removeprefix(f's3://{NAME}/')}/manifest.json")["about"]

    for night in nights[2:]:  # on the second night all that came before still lies in the window
        replayed = bucket.json(f"runs/{night.run_id}/replayed.json")
        assert replayed["version"] == version_of(night, "champion")
        dataset = bucket.json(f"runs/{night.run_id}/finetune.json")["dataset_uri"]
        assert dataset == replayed["dataset_uri"] != replayed["prepared_uri"]
        prepared = about(replayed["prepared_uri"])
        assert prepared["replay_records"] == replayed["asked"] > 0
        assert about(dataset)["train_records"] == prepared["train_records"] + replayed["asked"]


def test_each_night_ended_in_a_decision_and_the_nights_were_of_both_kinds(nights: list[Night]) -> None:
    decided = [night.decision["decision"] for night in nights]
    assert decided[0] == "promote"
    assert [decided[number] for number in SPOILED] == ["hold", "hold"]
    # So that the rollback returns to a version that was held to a better one itself.
    assert decided[: ROLLED_BACK_AFTER + 1].count("promote") >= 3


def test_each_candidate_met_who_held_the_alias_and_the_best_that_its_move_names(
    bucket: Bucket, nights: list[Night]
) -> None:
    log = bucket.log("colours")
    best_by: dict[str, str] = {}
    """The best version so far, once a version holds the alias: by its run's decision, or a person's word."""
    met_another = []
    for number, night in enumerate(nights):
        ends = ("promoted", "refused")
        decided_at = next(e["time"] for e in log if e["body"].get("run_id") == night.run_id and e["kind"] in ends)
        move = next((e for e in reversed(log) if "to" in e["body"] and e["time"] < decided_at), None)
        champion = move["body"]["to"] if move else None
        if move and not move["body"]["run_id"] and move["kind"] != "rolled_back":
            best_by[champion] = champion
        assert version_of(night, "champion") == champion
        best = best_by.get(champion) if champion else None
        assert version_of(night, "anchor") == (best if best != champion else None)
        met_another += [number] if version_of(night, "anchor") else []
        if night.decision["decision"] == "promote":
            is_better = best is None or night.decision["anchor"] == night.decision["version"]
            best_by[night.decision["version"]] = night.decision["version"] if is_better else best
            assert night.decision["anchor"] == best_by[night.decision["version"]]
    assert ROLLED_BACK_AFTER + 1 in met_another
    assert BY_HAND_AFTER + 1 not in met_another


def test_the_best_ones_loss_is_that_of_its_records_and_nobody_was_let_below_it_by_more_than_the_budget(
    nights: list[Night],
) -> None:
    for night in nights:
        for role, loss in night.losses.items():
            assert night.evaluation["models"][role]["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
        best = night.losses.get("anchor", night.losses.get("champion"))
        if best is not None and night.decision["decision"] == "promote":
            assert night.losses["candidate"] <= best + BUDGET


def test_each_decision_knows_how_many_its_records_have_seen(nights: list[Night]) -> None:
    """Neither the rollback nor the promotion by hand is one."""
    assert [night.decision["look"] for night in nights] == [*range(1, NIGHTS + 1)]


def test_what_was_decided_can_be_decided_again_and_the_registry_is_sound(person: Person, nights: list[Night]) -> None:
    for night in (nights[ROLLED_BACK_AFTER], nights[-1]):
        assert person.does(f"fineloop replay {night.run_id} --json").answer["same"]
    person.does("fineloop adapters audit")
