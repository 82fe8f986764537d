"""The records that a training reads, and which of them are left out or cut."""

import pytest

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.prepare.judges import judges
from components.shared.errors import DataError
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.training import splits
from tests.doubles import datasets


def records(*lengths):
    return [Record(f"r{place}", [Message("user", "x" * length)], "blue") for place, length in enumerate(lengths)]


@pytest.fixture
def chat(config):
    return chat_format.load(base_model.resolve(config.model), config.model)


def test_prompts_that_are_cut_are_counted_and_limited_as_answers_are(config, chat):
    most = config_file.loads(config_file.dumps(config), ["data.max_reject_share=0.25"])
    said = []
    split = splits.tokenized(records(10, 100, 10, 10), chat, most, said.append)
    assert (len(split), split.cut, split.too_long) == (4, ["r1"], [])
    assert said == ["cut 1 prompts at their beginning: they do not fit model.max_length 64"]
    with pytest.raises(DataError, match=r"the prompts of 2 of 4 records \(50%; as 'r1'\) are too long for model\.max"):
        splits.tokenized(records(10, 100, 100, 10), chat, most, said.append)


def test_the_gate_decides_on_records_that_no_training_looks_at(config, chat, store):
    held_out = records(*[20] * 60)
    folder = datasets.publish(store, train=records(10, 10), evaluation=held_out)
    _, chosen_on = splits.read(store, folder.uri, chat, config, print)
    decided_on = {record.id for record in judges(store, folder.uri, config, run_id="r").records}
    assert decided_on.isdisjoint(chosen_on.ids)
    assert decided_on | set(chosen_on.ids) == {record.id for record in held_out}
