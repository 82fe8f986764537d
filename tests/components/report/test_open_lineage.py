"""What an OpenLineage server receives of a run, by OpenLineage's own client, over HTTP."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from components.records.steps import StepRecord
from components.report import report
from components.store.store import Store
from tests.components.report.example_runs import CANDIDATE, CHAMPION, CONFIG, DATASET, promoted_run


class Server(HTTPServer):
    """Takes events, and answers as it is set to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = 201
        self.received: list[tuple[str, str | None, dict[str, Any]]] = []
        """Path, Authorization and event."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Authorization"], json.loads(body)))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the environment names, as OpenLineage's documentation says."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("OPENLINEAGE_API_KEY", "the-key")
        yield made
        made.shutdown()
        thread.join()


def test_a_run_that_succeeded_is_sent_from_its_sources_base_dataset_and_parent_to_its_version(
    server: Server, store: Store
) -> None:
    report.emit(CONFIG, store, promoted_run())
    assert {(path, key) for path, key, _ in server.received} == {("/api/v1/lineage", "Bearer the-key")}
    start, complete = (event for _, _, event in server.received)
    # The keys that RunEvent requires, in spec/OpenLineage.json 2-0-2, as BaseEvent does.
    for event in (start, complete):
        assert {"eventTime", "producer", "schemaURL", "run", "job"} <= event.keys()
        assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        assert event["job"]["namespace"] == "fineloop"
        assert event["job"]["name"] == CONFIG.adapter.name
        assert event["job"]["facets"].keys() == {"jobType"}  # nothing of the folder that this runs in
    assert [start["eventType"], complete["eventType"]] == ["START", "COMPLETE"]
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert start["eventTime"] < complete["eventTime"]
    bucket = f"s3://{store.bucket}"
    named = {(each["namespace"], each["name"]) for each in complete["inputs"]}
    assert (bucket, f"{store.prefix}/datasets/{DATASET}") in named
    assert ("s3://fineloop", f"adapters/{CONFIG.adapter.name}/versions/{CHAMPION}") in named
    assert ("fineloop", CONFIG.model.base) in named
    (output,) = complete["outputs"]
    key = f"{store.prefix}/adapters/{CONFIG.adapter.name}/versions/{CANDIDATE}"
    assert (output["namespace"], output["name"]) == (bucket, key)
    assert output["facets"]["version"]["datasetVersion"] == CANDIDATE
    assert start["outputs"] == []


def test_a_run_that_failed_says_where_and_why(server: Server, store: Store) -> None:
    error = {"kind": "DataError", "message": "no record is usable"}
    step = StepRecord(
        step="prepare", status="failed", started_at="2026-11-24T02:00:00+00:00", seconds=1, result={"error": error}
    )
    report.emit(CONFIG, store, replace(promoted_run(), steps=[step], lineage=None, evaluation=None, decision=None))
    _, _, event = server.received[-1]
    assert event["eventType"] == "FAIL"
    assert event["run"]["facets"]["errorMessage"]["message"] == "prepare: no record is usable"
    assert event["outputs"] == []
    assert event["inputs"] == server.received[0][2]["inputs"] != []


def test_a_server_that_refuses_fails_no_run(server: Server, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = 403
    report.emit(CONFIG, store, promoted_run())
    assert "OpenLineage did not get the events of this run: 403" in caplog.text
    assert "the-key" not in caplog.text


def test_nothing_is_sent_where_no_server_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.CONFIGURED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(report, "events_of", None)
    report.emit(CONFIG, store, promoted_run())


def test_a_run_is_known_by_kubeflow_s_id_or_by_one_that_its_name_gives(store: Store) -> None:
    kubeflow = "7506d98d-86d6-4032-ad2c-97c8dca660a4"
    assert report.run_uuid(store, kubeflow) == kubeflow
    assert report.run_uuid(store, "r1") == report.run_uuid(store, "r1") != report.run_uuid(store, "r2")


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        # openlineage.io/docs/spec/naming: the rows for S3, GCS and the local file system
        ("s3://intake/2026/day.jsonl", ("s3://intake", "2026/day.jsonl")),
        ("s3://intake", ("s3://intake", "/")),
        ("gs://intake/day.jsonl", ("gs://intake", "day.jsonl")),
        ("/data/day.jsonl", ("file", "/data/day.jsonl")),
        ("org/base", ("fineloop", "org/base")),
        ("icd10", ("fineloop", "icd10")),
    ],
)
def test_datasets_are_named_as_openlineage_names_them(reference: str, named: tuple[str, str]) -> None:
    assert report._named(reference) == named
