"""Tokens that are made once: found again by whoever would make the same, by nobody who would make others."""

import dataclasses
import io
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from components.prepare.dataset import RECORDS_AT_ONCE, Message, Record
from components.shared.errors import IntegrityError
from components.store import folders
from components.store.store import Store
from ray_jobs.text import token_store
from ray_jobs.text.batching import tokenize
from tests.doubles import datasets
from tests.models import chat_families
from tests.models.chat_families import FAMILIES, chat_of

TRAIN = [Record(f"r{i}", [Message("user", "x" * (i % 50))], "b" * (1 + i % 70)) for i in range(RECORDS_AT_ONCE + 9)]
TALK = Record("ünïcode", [Message("user", "sky"), Message("assistant", "blue"), Message("user", "sea")], "green")
FOLDER = "tokens"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def chat(tiny_base):
    return chat_of(tiny_base)


@pytest.fixture
def uri(store: Store) -> str:
    return datasets.publish(store, train=TRAIN, evaluation=[TALK]).uri


@pytest.mark.parametrize("loss_on", ["last", "all"])
@pytest.mark.parametrize("name", ["chatml", "qwen-3"])
def test_what_is_read_back_is_what_was_made(store, tmp_path, name, loss_on):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES[name]))
    records = [dataclasses.replace(TALK, id=f"{TALK.id}{i}", answer="b" * i) for i in range(1, 60)]
    asked = [Message("system", "Be brief. " * 20), Message("user", "coal")]
    records.append(Record("s", asked, "black"))
    uri = datasets.publish(store, train=records, evaluation=[TALK]).uri
    stored = token_store.ensure(store, uri, "train", chat, max_length=60, loss_on=loss_on)
    found, expected = token_store.load(store, stored), tokenize(records, chat, 60, loss_on)
    assert found.digest == expected.digest
    assert list(found.ids) == expected.ids
    assert (list(found.too_long), list(found.cut)) == (expected.too_long, expected.cut)
    assert list(found.cut_system) == expected.cut_system
    assert found.cut
    assert found.cut_system
    assert found.num_prompt_tokens.tolist() == expected.num_prompt_tokens.tolist()
    assert found.num_answer_tokens.tolist() == expected.num_answer_tokens.tolist()
    some = dataclasses.replace(stored, rows=np.array([3, 1]))
    assert token_store.load(store, some).digest == expected.take([3, 1]).digest


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_finds_the_tokens_of_its_base(tmp_path, name):
    """Its tokenizer is a copy, as it was saved."""
    folder = chat_families.build(tmp_path, FAMILIES[name])
    chat = chat_of(folder)
    chat.tokenizer.save_pretrained(tmp_path / "version")
    of_version = chat_of(folder, version=tmp_path / "version")
    expected = token_store.recipe(chat, "eval", 64, "last")
    assert token_store.recipe(of_version, "eval", 64, "last") == expected
    chat.tokenizer(["a", "long text"], padding=True, truncation=True, max_length=2)
    assert token_store.recipe(chat, "eval", 64, "last") == expected


def test_whatever_decides_tokens_decides_where_they_lie(store, uri, tmp_path):
    folder = chat_families.build(tmp_path, FAMILIES["qwen-3"])
    chat, thinking = chat_of(folder), chat_of(folder, thinking=True)
    other_words = chat_of(chat_families.build(tmp_path / "other", FAMILIES["chatml"]))
    other_words.tokenizer.chat_template = chat.tokenizer.chat_template
    other_template = chat_of(folder)
    other_template.tokenizer.chat_template += " "
    chats = [chat, thinking, other_words, other_template, dataclasses.replace(chat, stops=chat.stops | {0})]
    ways = [("eval", each, 64, "last") for each in chats]
    ways += [("train", chat, 64, "last"), ("eval", chat, 65, "last"), ("eval", chat, 64, "all")]
    keys = {
        token_store.ensure(store, uri, split, each, max_length=most, loss_on=loss_on).key
        for split, each, most, loss_on in ways
    }
    assert len(keys) == len(ways)
    assert all(key.startswith(f"{store.key(uri)}/{FOLDER}/") for key in keys)


def test_what_a_template_says_of_the_time_decides_too(tiny_base):
    chat = chat_of(tiny_base)
    chat.tokenizer.chat_template += "{{ strftime_now('%H%M%S%f') }}"
    first, second = (token_store.recipe(chat, "eval", 64, "last") for _ in range(2))
    assert {name for name in first if first[name] != second[name]} == {"probe"}


def test_two_who_make_them_at_once_make_the_same(store, uri, tiny_base, monkeypatch):
    both_made = threading.Barrier(2)
    publish = folders.publish

    def publish_together(*arguments, **how):
        both_made.wait(timeout=60)
        return publish(*arguments, **how)

    monkeypatch.setattr(folders, "publish", publish_together)
    chats = [chat_of(tiny_base) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda chat: token_store.ensure(store, uri, "train", chat, max_length=64), chats)
    assert first == second
    folders.verify(store, first.key, manifest_sha256=first.manifest_sha256)
    assert token_store.load(store, first).digest == tokenize(TRAIN, chats[0], 64).digest


@pytest.mark.slow
def test_tokenising_holds_a_part_of_the_records_at_a_time(store, chat):
    def peak_bytes(num_parts: int) -> int:
        records = [Record(f"r{i}", [Message("user", "x" * 40)], "b" * 40) for i in range(num_parts * RECORDS_AT_ONCE)]
        uri = datasets.publish(store, train=records, evaluation=[TALK]).uri
        del records
        tracemalloc.start()
        try:
            token_store.ensure(store, uri, "train", chat, max_length=128)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(4) < 2 * peak_bytes(1)


def test_a_machine_fetches_them_once(store, uri, chat, cache):
    cache = cache.parent / FOLDER
    stored = token_store.ensure(store, uri, "train", chat, max_length=64)
    assert list(cache.iterdir()) == []
    first = token_store.load(store, stored)
    store.delete([info.key for info in store.list(stored.key)])
    assert token_store.load(store, stored).digest == first.digest
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [stored.manifest_sha256]
    assert not first.tokens.flags.owndata  # it lies in the file, which the processes of a machine share
    assert not first.tokens.flags.writeable
    again = token_store.ensure(store, uri, "train", chat, max_length=64)
    assert again.content_sha256 == stored.content_sha256
    assert again.manifest_sha256 != stored.manifest_sha256  # it says when it was written


def test_tokens_that_are_not_what_was_written_are_not_read(store, uri, chat):
    stored = token_store.ensure(store, uri, "eval", chat, max_length=64)
    for file, load in ((token_store.TOKENS_FILE, token_store.load), (token_store.ROWS, token_store.load_rows)):
        body = bytearray(store.get(f"{stored.key}/{file}"))
        body[-1] ^= 1
        store.put(f"{stored.key}/{file}", bytes(body))
        with pytest.raises(IntegrityError, match=rf"is damaged: .*{file} has sha256"):
            load(store, stored)


def planted(store: Store, key: str, changes: dict[str, bytes]) -> None:
    """What somebody who may write to the bucket does: other files, and a manifest that lists them."""
    about = store.get_json(f"{key}/manifest.json")
    for name, body in changes.items():
        store.put(f"{key}/{name}", body)
        about["files"][name] = folders.digest_of(body)
    store.put_json(f"{key}/manifest.json", about)


def as_npy(array) -> bytes:
    body = io.BytesIO()
    np.save(body, array)
    return body.getvalue()


@pytest.fixture
def colours(store: Store) -> str:
    """A dataset whose answers are "red", but for some that do not fit."""
    records = [Record(f"r{i}", [Message("user", f"{i} blood")], "red" * (1 + 99 * (i % 40 == 7))) for i in range(1100)]
    return datasets.publish(store, train=records, evaluation=[TALK]).uri


@pytest.mark.parametrize("file", [token_store.TOKENS_FILE, token_store.LABELLED, token_store.ROWS, token_store.IDS])
def test_tokens_that_somebody_planted_are_refused_and_those_of_the_dataset_are_not(store, colours, chat, file):
    honest = token_store.ensure(store, colours, "train", chat, max_length=64)
    assert token_store.load(store, honest).too_long
    assert token_store.ensure(store, colours, "train", chat, max_length=64) == honest
    array = np.load(io.BytesIO(store.get(f"{honest.key}/{file}")))
    other = array[:-1] if file == token_store.ROWS else np.roll(array, 1)
    planted(store, honest.key, {file: as_npy(other)})
    with pytest.raises(IntegrityError, match=rf"{honest.key} does not hold the tokens that .* of {colours}: somebody "):
        token_store.ensure(store, colours, "train", chat, max_length=64)


def test_tokens_of_a_part_of_the_dataset_are_refused(store, uri, chat):
    half = datasets.publish(store, train=TRAIN[: len(TRAIN) // 2], evaluation=[TALK]).uri
    whole, part = (token_store.ensure(store, each, "train", chat, max_length=64).key for each in (uri, half))
    planted(store, whole, {name: store.get(f"{part}/{name}") for name in token_store.FILES})
    with pytest.raises(IntegrityError, match="somebody has written others there"):
        token_store.ensure(store, uri, "train", chat, max_length=64)


def test_tokens_that_somebody_plants_while_they_are_made_are_refused(store, colours, chat, monkeypatch):
    honest = token_store.ensure(store, colours, "train", chat, max_length=64)
    find = folders.find_manifest
    monkeypatch.setattr(folders, "find_manifest", lambda store, key: monkeypatch.undo())
    planted(store, honest.key, {token_store.IDS: b"others"})
    assert find(store, honest.key)
    with pytest.raises(IntegrityError, match="somebody has written others there"):
        token_store.ensure(store, colours, "train", chat, max_length=64)


def test_a_sample_is_another_each_time(store, chat, monkeypatch):
    monkeypatch.setattr(token_store, "SAMPLE", 4)
    uri = datasets.publish(store, train=TRAIN[:8], evaluation=[TALK]).uri
    honest = token_store.ensure(store, uri, "train", chat, max_length=64)
    tokens = np.load(io.BytesIO(store.get(f"{honest.key}/{token_store.TOKENS_FILE}")))
    tokens[0] += 1  # of a single record, which every second sample has
    planted(store, honest.key, {token_store.TOKENS_FILE: as_npy(tokens)})
    refused = 0
    for _ in range(30):
        try:
            token_store.ensure(store, uri, "train", chat, max_length=64)
        except IntegrityError:
            refused += 1
    assert 0 < refused < 30
