"""Which tokens an evaluation measures: those that a training has left beside the dataset, or else its own."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.shared.answers import alike
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.scoring.contender import Contender
from ray_jobs.scoring.measure import measure_shard
from ray_jobs.text import chat_format, token_store
from tests.doubles import datasets
from tests.models.tiny import colour_rows

RECORDS = [Record(row["id"], [Message("user", row["prompt"])], row["completion"]) for row in colour_rows(12)]
# Under the same ids, so that one sees in the scores what was read.
OTHERS = [dataclasses.replace(each, prompt=RECORDS[place - 1].prompt) for place, each in enumerate(RECORDS)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A task sets the number of threads of its process."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def base(config: RunConfig, store: Store, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    here = config_file.loads(config_file.dumps(config), place)
    return Contender("base", here, None, base_model.resolve(config.model).identity)


def losses(contender: Contender, records: list[Record]) -> list[float]:
    return [score.nll for score in measure_shard([contender], records, shard_index=0).scores["base"]]


@pytest.mark.parametrize("are_there", [True, False])
def test_records_are_measured_on_the_tokens_of_their_dataset_where_it_has_some(base, store, are_there):
    uri = datasets.publish(store, train=RECORDS, evaluation=OTHERS).uri
    model = base.config.model
    if are_there:
        chat = chat_format.load(base_model.resolve(model), model)
        token_store.ensure(store, uri, "eval", chat, max_length=model.max_length)
    found = losses(dataclasses.replace(base, dataset_uri=uri), RECORDS[2:9])
    of_records, of_others = (losses(base, records[2:9]) for records in (RECORDS, OTHERS))
    assert found == (of_others if are_there else of_records)
    assert of_others != of_records


def test_a_record_that_does_not_fit_is_left_out_of_either(base, store):
    long = Record("long", [Message("user", "sky")], "x" * 80)
    records = [RECORDS[0], long, RECORDS[1]]
    uri = datasets.publish(store, train=RECORDS, evaluation=records).uri
    model = base.config.model
    token_store.ensure(store, uri, "eval", chat_format.load(base_model.resolve(model), model), max_length=64)
    found = measure_shard([dataclasses.replace(base, dataset_uri=uri)], records, shard_index=0)
    assert list(found.tokens) == [RECORDS[0].id, RECORDS[1].id]
    assert found.tokens == measure_shard([base], records, shard_index=0).tokens


def test_labels_that_only_their_writing_tells_apart_are_scored_as_such(base):
    asked = base.config.model_copy(
        update={"evaluate": base.config.evaluate.model_copy(update={"metrics": ["label_accuracy"]})}
    )
    base = dataclasses.replace(base, config=asked)
    (answer,) = measure_shard([base], RECORDS[:1], shard_index=0).scores["base"]
    assert answer.text.swapcase() != answer.text
    other = dataclasses.replace(RECORDS[0], answer=answer.text.swapcase())

    def marked(contender: Contender) -> float:
        return measure_shard([contender], [other], shard_index=0).scores["base"][0].marks["label_accuracy"]

    assert marked(base) == 1
    assert marked(dataclasses.replace(base, alike=alike([answer.text, other.answer]))) == 0
