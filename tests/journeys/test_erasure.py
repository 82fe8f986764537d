"""Somebody asks to be forgotten: their record was trained on, is erased, and is in nothing that is prepared later.

Each command is a process on a real S3 server; a stub of a Ray job stands for the training. The judge searches the bytes
of every object that boto3 lists, of Parquet files the decoded cells.
"""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.registry.aliases import promote
from pipelines.local.seaweedfs import Endpoint
from tests.doubles.jobs_api import JobsApi, stub_cluster
from tests.journeys.keeper import Keeper, keeper_at

SECRET = "Berta Zwilling of Gruenau"


@pytest.fixture
def cluster(tmp_path: Path, s3_server: Endpoint) -> Iterator[JobsApi]:
    with closing(stub_cluster(tmp_path / "cluster", s3_server.environment())) as cluster:
        yield cluster


@pytest.fixture
def keeper(tmp_path: Path, s3_server: Endpoint, cluster: JobsApi) -> Keeper:
    return keeper_at(tmp_path / "keeper", s3_server).on(cluster)


def holding(keeper: Keeper, text: str, folder: str) -> set[str]:
    """Objects of the folder with the text anywhere in them."""
    found = set()
    for key in keeper.keys(folder):
        body = keeper.registry.read(key)
        cells = str(pq.read_table(io.BytesIO(body)).to_pylist()) if key.endswith(".parquet") else ""
        if text.encode() in body or text in cells:
            found.add(key)
    return found


def rows(keeper: Keeper, name: str, ids: range, *more: str) -> None:
    given = [json.dumps({"id": f"p{n}", "prompt": f"How much is {n} + 1?", "completion": str(n + 1)}) for n in ids]
    keeper.has(name, "\n".join([*given, *more]))


@pytest.mark.full
def test_an_erased_record_is_in_nothing_that_comes_later_and_all_that_saw_it_is_named(keeper: Keeper) -> None:
    theirs = json.dumps({"id": "p4711", "prompt": f"Where does {SECRET} live?", "completion": "In a mill."})
    spoiled = [
        json.dumps({"id": "p4711", "prompt": f"{SECRET} again", "completion": ""}),
        f'{{"id": "p4711", "prompt": "{SECRET}',
    ]
    rows(keeper, "rows.jsonl", range(120), theirs, *spoiled)
    rows(keeper, "others.jsonl", range(200, 320))
    more = "-c sums.toml --set data.max_reject_share=0.1"
    run = f"fineloop run {more} --set train.weight_decay={{loss}} --json"

    other = keeper.does(f"{run.format(loss=1.9)} --set data.source=others.jsonl").answer
    first = keeper.does(run.format(loss=1.5)).answer
    promote(keeper.store, "sums", first["version"], "staging")
    before = {each: keeper.keys(f"datasets/{each}/") for each in keeper.store.folders("datasets/")}
    (seen,) = {key.split("/")[1] for key in holding(keeper, SECRET, "datasets/")}
    assert {key.rpartition("/")[2] for key in holding(keeper, SECRET, f"datasets/{seen}/")} >= {"rejects.parquet"}

    said = keeper.does("fineloop data erase p4711 -c sums.toml --by ada --json").answer
    assert [each["dataset_id"] for each in said["datasets"]] == [seen]
    assert set(said["datasets"][0]["parts"]) & {"train", "eval"}
    assert "rejects" in said["datasets"][0]["parts"]
    assert [(each["version"], each["aliases"]) for each in said["versions"]] == [(first["version"], ["staging"])]
    assert said["unread"] == []
    assert (said["erased"][0]["by"], said["erased"][0]["is_new"]) == ("ada", True)
    assert any("--set data.min_new_records=0" in each["command"] for each in said["next"])
    assert holding(keeper, "p4711", "erased/") == set()
    assert len(keeper.keys("erased/")) == 1

    refused = keeper.types("fineloop reproduce sums@staging -c sums.toml --json")
    assert refused.exit_code == 2
    assert "holds 1 record that was erased after it was made" in refused.screen

    second = keeper.does(run.format(loss=1.4) + " --set data.min_new_records=0").answer
    assert second["version"] not in {first["version"], other["version"]}
    (fresh,) = set(keeper.store.folders("datasets/")) - before.keys()
    assert holding(keeper, SECRET, f"datasets/{fresh}/") == set()
    assert holding(keeper, "p4711", f"datasets/{fresh}/") == set()
    assert holding(keeper, SECRET, f"runs/{second['run_id']}/") == set()
    profile = keeper.registry.json(f"datasets/{fresh}/profile.json")
    assert profile["dropped"]["erased"] == 2
    assert profile["rows"]["read"] == 123

    (untouched,) = before.keys() - {seen}
    assert keeper.keys(f"datasets/{untouched}/") == before[untouched]
    keeper.does(f"fineloop run {more} --set data.source=others.jsonl --set train.weight_decay=1.3 --json")
    assert set(keeper.store.folders("datasets/")) == {*before, fresh}

    again = keeper.does("fineloop data erase p4711 -c sums.toml --by bob --json").answer
    assert (again["erased"][0]["by"], again["erased"][0]["is_new"]) == ("ada", False)
    assert [each["version"] for each in again["versions"]] == [first["version"]]
    assert keeper.holder("staging") == first["version"]  # nothing went by itself
    assert keeper.keys(f"datasets/{seen}/") == before[seen]


@pytest.mark.slow
def test_a_look_beforehand_erases_nothing(keeper: Keeper) -> None:
    said = keeper.does("fineloop data erase p1 p2 --dry-run -c sums.toml")
    assert "nothing is erased" in said.stdout
    assert "in no dataset under this id: p1, p2" in said.stdout
    assert keeper.keys("erased/") == set()
    assert "2 records erased for good" in keeper.does("fineloop data erase p1 p2 p1 -c sums.toml").stdout
    assert "2 records erased for good, 1 of them before" in keeper.does("fineloop data erase p2 p3 -c sums.toml").stdout
