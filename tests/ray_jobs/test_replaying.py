"""Production answers earlier records, as plain transformers and peft have its version answer them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from components.config.schema import RunConfig
from components.prepare.dataset import load_split
from components.records import runs
from components.records.runs import Replayed
from components.registry.aliases import promote
from components.store import folders
from components.store.store import Store
from ray_jobs import replaying
from ray_jobs.replaying import training_data
from tests.doubles import datasets
from tests.models.tiny_version import RECORDS
from tests.ray_jobs.plain import plain_of, published

TRAIN, HELD_OUT, EARLIER = RECORDS[:4], RECORDS[4:8], RECORDS[8:40]
MAX_NEW_TOKENS = 8


@pytest.fixture
def config(placed: Callable[..., RunConfig]) -> RunConfig:
    replay = ["data.window_days=7", "data.replay_share=0.5", "data.replay_from=production"]
    return placed(*replay, "data.replay_metric=token_f1", "ray.num_workers=1")


@pytest.mark.usefixtures("in_this_process")
def test_what_production_answers_rightly_is_trained_on_in_its_own_words_and_all_else_as_it_is(
    config: RunConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = published(config, store, tmp_path, seed=1)
    promote(store, version.name, version.version)
    plain = plain_of(config, store, version, tmp_path)
    answers = {each.id: plain.answer(each, MAX_NEW_TOKENS) for each in EARLIER}
    known = [each for each in EARLIER if answers[each.id][2] and any(map(str.isalpha, answers[each.id][0]))]
    assert len(known) >= 6
    # The same words in capitals are as right by token F1, and are not what the version wrote.
    right = [dataclasses.replace(each, answer=answers[each.id][0].swapcase()) for each in known[::2]]
    wrong = [dataclasses.replace(each, answer="another thing altogether") for each in known[1::2]]
    prepared = datasets.publish(store, train=TRAIN, evaluation=HELD_OUT, replay=right + wrong)

    uri = training_data(config, store, prepared.uri, print, run_id="first")

    trained_on = load_split(store, uri, "train")
    assert trained_on[: len(TRAIN)] == TRAIN
    in_its_words = [dataclasses.replace(each, answer=answers[each.id][0]) for each in right]
    assert trained_on[len(TRAIN) :] == in_its_words + wrong
    assert load_split(store, uri, "eval") == HELD_OUT
    assert training_data(config, store, uri, print, run_id="on its own") == uri
    found = runs.read(store, "first", Replayed)
    assert (found.version, found.asked, found.kept) == (version.version, len(right + wrong), len(right))
    folders.verify(store, store.key(uri))

    monkeypatch.setattr(replaying, "_right", None)  # nobody asks again
    assert training_data(config, store, prepared.uri, print, run_id="second") == uri
    promote(store, version.name, published(config, store, tmp_path, seed=2).version)
    assert training_data(config, store, prepared.uri, print, run_id="first") == uri


def test_before_anything_is_in_production_earlier_records_are_replayed_as_they_are(
    config: RunConfig, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = datasets.publish(store, train=TRAIN, evaluation=HELD_OUT, replay=EARLIER)
    uri = training_data(config, store, prepared.uri, print, run_id="first")
    assert uri == datasets.publish(store, train=TRAIN + EARLIER, evaluation=HELD_OUT).uri
    assert "nothing is in production yet" in capsys.readouterr().out
    assert training_data(config, store, prepared.uri, print, run_id="second") == uri
    assert "as in an earlier run" in capsys.readouterr().out


def test_where_production_answers_nothing_rightly_the_records_are_replayed_as_they_are(
    config: RunConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = published(config, store, tmp_path, seed=1)
    promote(store, version.name, version.version)
    prepared = datasets.publish(store, train=TRAIN, evaluation=HELD_OUT, replay=EARLIER)
    monkeypatch.setattr(replaying, "_right", lambda *_: {})
    uri = training_data(config, store, prepared.uri, print, run_id="first")
    assert load_split(store, uri, "train") == TRAIN + EARLIER
    found = runs.read(store, "first", Replayed)
    assert (found.version, found.kept) == (version.version, 0)


def test_a_dataset_without_earlier_records_is_trained_on_as_it_is(config: RunConfig, store: Store) -> None:
    prepared = datasets.publish(store, train=TRAIN, evaluation=HELD_OUT)
    assert training_data(config, store, prepared.uri, print, run_id="first") == prepared.uri
    assert runs.find(store, "first", Replayed) is None
