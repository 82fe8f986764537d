"""The records that a training reads, and which of them are left out or cut."""

import pickle
from dataclasses import replace

import pytest

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.prepare.split import judges, validation_and_test
from components.shared.errors import ConfigError, DataError
from components.store import folders
from ray_jobs.base import base_model
from ray_jobs.text import chat_format, token_store
from ray_jobs.text.batching import tokenize
from ray_jobs.training import starting
from tests.doubles import datasets


def records(*lengths):
    return [Record(f"r{place}", [Message("user", "x" * length)], "blue") for place, length in enumerate(lengths)]


@pytest.fixture
def chat(config):
    return chat_format.load(base_model.resolve(config.model), config.model)


def planned(train, evaluation, chat, config, store):
    """What the driver knows of both splits, and what it says."""
    folder = datasets.publish(store, train=train, evaluation=evaluation)
    said = []
    return starting.read_splits(store, folder.uri, resolved(chat, config), said.append), said


def resolved(chat, config):
    base = base_model.resolve(config.model)
    return starting.ResolvedBase(config, base, base_model.load_config(base.path, config.model), chat)


def test_prompts_that_are_cut_are_counted_and_limited_as_answers_are(config, chat, store):
    most = config_file.loads(config_file.dumps(config), ["data.max_reject_share=0.25"])
    (train, _), said = planned(records(10, 100, 10, 10), records(20), chat, most, store)
    assert len(train) == 4
    assert said == ["made 1 prompt shorter, to fit model.max_length 64"]
    split = token_store.load(store, train.stored)
    assert (list(split.cut), list(split.too_long)) == (["r1"], [])
    with pytest.raises(DataError, match=r"the prompts of 2 of 4 records \(50%; as 'r1'\) are too long for model\.max"):
        planned(records(10, 100, 100, 10), records(20), chat, most, store)


def test_system_messages_that_lose_their_end_are_counted(config, chat, store):
    asked = [Message("system", "s" * 80), Message("user", "x" * 10)]
    train = [Record("s", asked, "b"), *records(100, 10)]
    allowing = config_file.loads(config_file.dumps(config), ["data.max_reject_share=1"])
    _, said = planned(train, records(20), chat, allowing, store)
    assert said == ["made 2 prompts shorter, to fit model.max_length 64, 1 of them in the system message too"]


def test_answers_that_are_too_long_are_left_out_counted_and_limited(config, chat, store):
    most = config_file.loads(config_file.dumps(config), ["data.max_reject_share=0.25"])
    long = [Record("r9", [Message("user", "x" * 10)], "b" * 80)]
    (train, _), said = planned([*records(10, 10), *long, *records(*[10] * 3)[2:]], records(20), chat, most, store)
    why = "their answers do not fit model.max_length 64, or hold a token that ends an answer"
    assert said == [f"left out 1 record: {why}"]
    assert list(token_store.load(store, train.stored).ids) == ["r0", "r1", "r2"]
    with pytest.raises(DataError, match=r"the answers of 1 of 3 records \(33%; as 'r9'\) are too long for model\.max"):
        planned([*long, *records(10, 10)], records(20), chat, most, store)
    with pytest.raises(DataError, match=r"the answers of 1 of 1 records \(100%; as 'r9'\) are too long for model\.max"):
        planned(records(10), long, chat, most, store)


def test_the_gate_decides_on_records_that_no_training_looks_at(config, chat, store):
    """None of them is counted either: the evaluation says which it leaves out."""
    held_out = records(*[20] * 60)
    judging = judges_of(held_out, config, store)
    spoiled = [replace(each, answer="b" * 80) if each.id in judging else each for each in held_out]
    (_, chosen_on), said = planned(records(10, 10), spoiled, chat, config, store)
    assert said == []
    assert 0 < len(judging) < len(held_out)
    assert set(token_store.load(store, chosen_on.stored).ids) == {record.id for record in held_out} - judging


def test_the_driver_knows_the_lengths_of_what_workers_read(config, chat, store):
    few = config_file.loads(config_file.dumps(config), ["train.eval_records=7", "data.max_reject_share=1"])
    train, held_out = records(10, 100, 20, 30), records(*range(10, 60))
    found, _ = planned(train, held_out, chat, few, store)
    validation, _ = validation_and_test(held_out, validation_share=few.data.validation_share)
    for split, expected in zip(found, [train, validation[:7]], strict=True):
        plain = tokenize(expected, chat, few.model.max_length)
        read = token_store.load(store, split.stored)
        assert read.digest == plain.digest
        assert list(read.ids) == plain.ids
        assert split.lengths.tolist() == plain.lengths.tolist()
        assert split.num_answer_tokens.tolist() == plain.num_answer_tokens.tolist() == read.num_answer_tokens.tolist()
        assert len(pickle.dumps(split.stored)) < 1000


def test_a_dataset_is_recorded_with_the_tokens_that_were_read(config, chat, store):
    uri = datasets.publish(store, train=records(10, 20), evaluation=records(20)).uri
    assert starting.dataset_record(store, uri).tokens == {}
    read = starting.read_splits(store, uri, resolved(chat, config), print)
    recorded = starting.dataset_record(store, uri, *(split.stored for split in read)).tokens
    (train, held_out) = recorded.values()
    assert train != held_out
    for folder, sha256 in recorded.items():
        assert folders.read_manifest(store, f"{store.key(uri)}/tokens/{folder}").content_sha256 == sha256


def judges_of(held_out, config, store) -> set[str]:
    folder = datasets.publish(store, train=records(10, 10), evaluation=held_out)
    return {record.id for record in judges(store, folder.uri, config).records}


def test_tokens_that_the_base_has_no_embeddings_for_are_refused_where_records_write_them(config, chat, store):
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<LOC>"]}, replace_extra_special_tokens=False)
    planned(records(10), records(20), chat, config, store)
    tagged = [Record("t", [Message("user", "Rome")], "<LOC>")]
    with pytest.raises(ConfigError, match=r"writes token 260 \('<LOC>'\), and the base has embeddings for 260"):
        planned(tagged, records(20), chat, config, store)
