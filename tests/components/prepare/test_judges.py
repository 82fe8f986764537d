"""Which of the held-out records judge, run after run."""

import dataclasses
import random
import re
from collections.abc import Iterable

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.prepare.power import power
from components.prepare.split import judges, lacking, validation_and_test
from tests.doubles import datasets

NUMBER = 400
DRAWN = ["evaluate.records=20"]


def records(numbers: Iterable[int]) -> list[Record]:
    return [Record(f"r{number}", [Message("user", f"{number}?")], "a") for number in numbers]


@pytest.fixture
def config():
    data = {"source": "rows.jsonl"}
    return RunConfig.model_validate({"adapter": {"name": "colours"}, "model": {"base": "org/model"}, "data": data})


@pytest.fixture
def published(store):
    def publish(numbers: range = range(NUMBER)) -> str:
        return datasets.publish(store, train=records(range(1)), evaluation=records(numbers)).uri

    return publish


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["gate.min_records=200"], None),
        (["gate.min_records=400"], "raise data.eval_share, add data or lower gate.min_records$"),
        (["gate.min_records=200", *DRAWN], None),  # as many more as it takes are drawn
        (["gate.min_records=200", *DRAWN, "evaluate.max_records=20"], "^20 records .* evaluate.records,"),
    ],
    ids=str,
)
def test_a_run_that_would_be_held_for_want_of_records_is_refused(config, store, published, keys, message):
    """About 320 of 400 held-out records are left when training has looked at its fifth."""
    asked = config_file.loads(config_file.dumps(config), keys)
    lack = lacking(judges(store, published(), asked), asked)
    assert re.search(message, lack) if message else not lack


def test_records_of_one_group_count_as_one_as_they_do_for_the_gate(config, store):
    grouped = [dataclasses.replace(each, group=f"g{number % 50}") for number, each in enumerate(records(range(NUMBER)))]
    uri = datasets.publish(store, train=records(range(1)), evaluation=grouped).uri
    asked = config_file.loads(config_file.dumps(config), ["data.group=topic", "gate.min_records=50"])
    judging = judges(store, uri, asked)
    groups = len({record.group for record in judging.records})
    assert lacking(judging, asked).startswith(f"{groups} groups of records are left for the gate")
    assert f"{groups} groups of records judge by loss" in power(judging, asked)["sentence"]


@pytest.mark.parametrize(
    ("number", "keys", "can_replace"),
    [
        (400, [], True),
        (320, [], False),
        (320, ["data.validation_share=0.01"], True),
        (320, ["gate.worse_than_champion_by=0.1"], True),
        (320, ["gate.much_worse_share=1"], True),
        (320, ["gate.metric=exact_match"], True),
        (400, [*DRAWN, "evaluate.max_records=100"], False),
    ],
    ids=str,
)
def test_that_no_candidate_can_replace_a_version_is_said_before_there_is_one(
    config, store, published, keys, number, can_replace
):
    """By the binomial distribution 0.99^299 is the first power below 0.05."""
    asked = config_file.loads(config_file.dumps(config), keys)
    tells = power(judges(store, published(range(number)), asked), asked)
    assert (tells["better_by"] is not None) is can_replace
    assert ("nothing can replace it, as only 299 would show rare large losses" in tells["sentence"]) is not can_replace


def test_long_answers_weigh_more_so_that_more_records_are_asked_for(config, store):
    """Half of the answers are of one token, and half of 26: by Kish's formula 400 weigh as 214."""
    lengths = [
        dataclasses.replace(each, answer="a" * (100 * (place % 2))) for place, each in enumerate(records(range(NUMBER)))
    ]
    uri = datasets.publish(store, train=records(range(1)), evaluation=lengths).uri
    asked = config_file.loads(config_file.dumps(config), ["data.validation_share=0.001"])
    tells = power(judges(store, uri, asked), asked)
    assert tells["fewest"] == pytest.approx(299 * 2 * (1 + 26**2) / 27**2, rel=0.02)
    by_answers = config_file.loads(config_file.dumps(asked), ["gate.metric=answer_loss"])
    assert power(judges(store, uri, by_answers), by_answers)["fewest"] == 299


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_records_either_choose_or_judge_in_the_proportion_asked_for(share):
    validation, test = validation_and_test(records(range(2000)), validation_share=share)
    assert {each.id for each in validation} | {each.id for each in test} == {f"r{number}" for number in range(2000)}
    assert len(validation) + len(test) == 2000
    assert len(validation) / 2000 == pytest.approx(share, abs=0.03)
    assert validation_and_test(records([1]), validation_share=share) == (records([1]), records([1]))  # one is in both
    assert [each.id for each in test] == sorted((each.id for each in test), key=lambda name: int(name[1:]))


def test_no_record_moves_when_others_come_or_go():
    before, _ = validation_and_test(records(range(300)), validation_share=0.2)
    some = random.Random(1).sample(range(300), 150)
    after, _ = validation_and_test(records([*some, *range(1000, 1400)]), validation_share=0.2)
    assert {each.id for each in after if int(each.id[1:]) < 300} == {
        each.id for each in before if int(each.id[1:]) in some
    }


def test_records_of_a_group_choose_or_judge_together():
    grouped = [dataclasses.replace(each, group=f"g{number // 3}") for number, each in enumerate(records(range(300)))]
    validation, test = ({each.group for each in part} for part in validation_and_test(grouped, validation_share=0.4))
    assert len(validation) + len(test) == len(validation | test) == 100
