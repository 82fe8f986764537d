"""Which of the held-out records judge, run after run."""

import pytest

from components.config import config_file
from components.prepare import dataset
from components.prepare.dataset import Message, Record
from components.registry.event_log import append_event
from components.shared.errors import DataError
from ray_jobs.scoring.judges import judges

NUMBER = 400


def records(numbers: range) -> list[Record]:
    return [Record(f"r{number}", [Message("user", f"{number}?")], "a") for number in numbers]


@pytest.fixture
def published(store):
    def publish(numbers: range = range(NUMBER)) -> str:
        return dataset.publish(store, train=records(range(1)), evaluation=records(numbers), rejects=[], profile={}).uri

    return publish


def in_folds(config, number: int, decisions: int = 2):
    return config_file.loads(
        config_file.dumps(config), [f"evaluate.folds={number}", f"evaluate.decisions_per_fold={decisions}"]
    )


def decide(store, config, run_id: str, found) -> None:
    body = {"alias": config.adapter.alias, "run_id": run_id, "test_set": list(found.sample)}
    append_event(store, config.adapter.name, "refused", body)


def test_a_part_judges_until_it_is_worn_out_and_the_others_lie_in_reserve(config, store, published):
    config, uri = in_folds(config, 3), published()
    turns = []
    for run in range(8):
        found = judges(store, uri, config, run_id=f"run-{run}")
        decide(store, config, f"run-{run}", found)
        turns.append(found.fold)
    assert turns == [1, 1, 2, 2, 3, 3, 1, 2]
    assert judges(store, uri, config, run_id="run-7").fold == 2  # a step that is repeated asks the same ones


def test_the_parts_are_apart_and_a_refresh_moves_no_record(config, store, published):
    config = in_folds(config, 3, decisions=1)
    before, after = [], []
    for run, (uri, seen) in enumerate([(published(), before)] * 3 + [(published(range(100, 2 * NUMBER)), after)] * 3):
        found = judges(store, uri, config, run_id=f"run-{run}")
        decide(store, config, f"run-{run}", found)
        seen.append({record.id for record in found.records})
    assert len(set.union(*before)) == sum(map(len, before))
    assert min(map(len, before)) > 70
    assert all(sum(len(one & other) > 0 for other in after) == 1 for one in before)


def test_a_test_set_is_known_again_however_much_of_it_was_used(config, store, published):
    uri = published()
    asked = [config_file.loads(config_file.dumps(config), [f"evaluate.records={number}"]) for number in (20, 300)]
    few, many = (judges(store, uri, each, run_id="r").sample for each in asked)
    assert few == many
    assert len(few) == 16


def test_parts_without_records_are_refused(config, store, published):
    with pytest.raises(DataError, match=r"too few for evaluate\.folds 9"):
        judges(store, published(range(6)), in_folds(config, 9), run_id="r")
