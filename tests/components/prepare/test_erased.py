"""Erased records in a preparation: whatever the source holds, none of their text goes on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config.train import ColumnsConfig
from components.prepare.dataset import load_split
from components.prepare.prepare import prepare
from components.prepare.sources import find_sources
from components.registry.between_runs import Erased, erase, record_hash
from tests.doubles import datasets
from tests.doubles.datasets import Read

Write = Callable[..., str]


def rows(start: int, end: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, end)]


def read(source: str, *ids: str, **options: Any) -> Read:
    return datasets.read(find_sources(source), erased=Erased(frozenset(map(record_hash, ids))), **options)


def kept(found: Read) -> list[str]:
    return [each.record.id for each in found.accepted]


def test_rows_of_an_erased_id_are_counted_and_nothing_else(write_rows: Write) -> None:
    found = read(write_rows([*rows(0, 5), {"id": "3", "prompt": "later", "completion": "row"}]), "3", "99")
    assert kept(found) == ["0", "1", "2", "4"]
    total = found.counts.total
    assert (total.rows, total.rejected, total.erased, total.accepted) == (6, 0, 2, 4)


def test_a_row_without_an_id_is_known_by_its_content(write_rows: Write) -> None:
    path = write_rows([{"prompt": f"question {i}", "completion": "a"} for i in range(4)])
    (*_, last) = kept(read(path))
    content = hashlib.sha256(b"user:10:question 3answer:a").hexdigest()
    assert last == content[:16]
    for by in (content[:16], content):
        assert read(path, by).counts.total.erased == 1
        assert last not in kept(read(path, by))


def test_every_source_of_two_is_counted_by_itself(write_rows: Write, tmp_path: Path) -> None:
    write_rows(rows(0, 5), "in/1.jsonl")
    write_rows(rows(3, 9), "in/2.jsonl")
    found = read(str(tmp_path / "in"), "3", "8")
    assert [each.erased for _, each in found.counts.sources] == [1, 2]
    assert kept(found) == ["0", "1", "2", "4", "4", "5", "6", "7"]


@pytest.mark.parametrize("named", [ColumnsConfig(), ColumnsConfig(id="who")])
def test_the_id_is_that_of_the_column_that_the_config_names(write_rows: Write, named: ColumnsConfig) -> None:
    path = write_rows([{"id": "a", "who": "b", "prompt": f"{n}", "completion": "x"} for n in range(3)])
    assert read(path, "b", columns=named).counts.total.erased == (3 if named.id else 0)
    assert read(path, "a", columns=named).counts.total.erased == (0 if named.id else 3)
    path = write_rows([{"id": "a", "prompt": "p", "completion": "x"}, {"who": "b", "prompt": "q", "completion": "x"}])
    assert kept(read(path, "a", columns=ColumnsConfig(id="who"))) == ["b"]


def test_an_unusable_row_of_theirs_is_no_reject(write_rows: Write) -> None:
    found = read(write_rows([*rows(0, 3), {"id": 9, "prompt": "secret", "completion": ""}]), "9")
    assert found.rejects == []
    assert found.counts.total.erased == 1


def test_of_an_unusable_row_that_may_be_theirs_no_text_is_kept(write_rows: Write) -> None:
    bad = ['{"id": 9, "prompt": "secret', {"prompt": "secret"}, '{"id": "\\ud800", "prompt": "secret"}']
    others = {"id": 8, "prompt": "of somebody else"}
    path = write_rows([*rows(0, 3), *bad, others])
    *theirs, last = read(path, "9").rejects
    assert len(theirs) == 3
    assert not any("secret" in each.row for each in theirs)
    assert json.loads(last.row) == others
    assert all("secret" in each.row for each in read(path).rejects[:3])  # where nobody was erased, as ever


def test_a_preparation_says_how_many_are_left_out_and_accounts_for_every_row(write_rows, store, run_config) -> None:
    config = run_config(write_rows(rows(0, 100)), eval_share=0.3)
    before = prepare(config, store)
    for each in ("7", "8"):
        erase(store, each, by="ada")
    after = prepare(config, store)
    assert after.left_out["erased"] == 2
    assert "left out: 2 erased" in after.summary
    assert after.dataset_id != before.dataset_id
    profile = store.get_json(f"datasets/{after.dataset_id}/profile.json")
    assert profile["dropped"]["erased"] == 2
    records = [each["records"] for each in profile["splits"].values()]
    assert profile["rows"]["read"] == 100 == sum(profile["dropped"].values()) + sum(records)
    ids = {each.id for split in ("train", "eval") for each in load_split(store, after.uri, split)}
    assert ids == {str(n) for n in range(100)} - {"7", "8"}
