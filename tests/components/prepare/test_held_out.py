import random
from dataclasses import replace

import pytest

from components.prepare.dataset import Message, Record
from components.prepare.split import validation_and_test


def records(*numbers: int) -> list[Record]:
    return [Record(f"r{number}", [Message("user", f"{number}?")], f"{number}!") for number in numbers]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_records_either_choose_or_judge_in_the_proportion_asked_for(share):
    validation, test = validation_and_test(records(*range(2000)), validation_share=share)
    assert {each.id for each in validation} | {each.id for each in test} == {f"r{number}" for number in range(2000)}
    assert len(validation) + len(test) == 2000
    assert len(validation) / 2000 == pytest.approx(share, abs=0.03)
    assert [each.id for each in test] == sorted((each.id for each in test), key=lambda name: int(name[1:]))


def test_no_record_moves_when_others_come_or_go():
    before, _ = validation_and_test(records(*range(300)), validation_share=0.2)
    some = random.Random(1).sample(range(300), 150)
    after, _ = validation_and_test(records(*some, *range(1000, 1400)), validation_share=0.2)
    assert {each.id for each in after if int(each.id[1:]) < 300} == {
        each.id for each in before if int(each.id[1:]) in some
    }


def test_records_of_a_group_choose_or_judge_together():
    grouped = [replace(each, group=f"g{number // 3}") for number, each in enumerate(records(*range(300)))]
    validation, test = ({each.group for each in part} for part in validation_and_test(grouped, validation_share=0.4))
    assert len(validation) + len(test) == len(validation | test) == 100


def test_of_a_single_record_both_hold_it():
    assert validation_and_test(records(1), validation_share=0.2) == (records(1), records(1))
