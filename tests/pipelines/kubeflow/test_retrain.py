"""The real pipeline, submitted and scheduled through the real client; its Ray jobs are stubs that keep the contract."""

import json
from pathlib import Path

import pytest

from components.config import config_file
from components.registry import aliases
from components.registry.audit import audit
from components.store.store import Store
from tests.doubles.jobs_api import JobsApi
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.command_line import production, sums
from tests.pipelines.kubeflow.conftest import Fineloop

pytestmark = pytest.mark.usefixtures("stub_cluster")  # the server's steps find it


@pytest.fixture
def options(config_path: Path, store: Store) -> list[str]:
    """The config, its data in the store."""
    store.put("incoming/1.jsonl", sums(0, 60).encode())
    return ["-c", str(config_path), "--set", f"data.source={store.uri('incoming/')}"]


def test_a_submitted_run_promotes_what_the_local_run_would_with_a_config_of_any_size(
    server: KfpServer, fineloop: Fineloop, store: Store, options: list[str]
) -> None:
    layers = json.dumps([f"model.layers.{n}.attention.query" for n in range(1200)])
    answered = fineloop("submit", *options, "--set", f"method.target_modules={layers}", "--param", "rank=4")

    assert answered.exit_code == 0, answered.stderr
    run_id = answered.body["run_id"]
    body = store.get(f"runs/{run_id}/config.toml")
    assert len(body) > 40_000
    recorded = config_file.loads(body.decode())
    assert (recorded.method.rank, recorded.digest) == (4, answered.body["config_digest"])
    decision = store.get_json(f"runs/{run_id}/decision.json")
    assert decision["decision"] == "promote"
    assert production(store) == decision["version"]
    assert f"promoted: sums@production is now {decision['version']}" in answered.stderr
    assert {key: answered.body[key] for key in ("decision", "version", "reasons")} == {
        key: decision[key] for key in ("decision", "version", "reasons")
    }
    assert answered.body["metrics"]["champion"] is None
    assert answered.body["metrics"]["candidate"]["loss"] < answered.body["metrics"]["base"]["loss"]
    left_out = {step for step, state in answered.body["steps"].items() if state != "SUCCEEDED"}
    assert left_out == {"Leave the alias as it is", "Skip the training"}
    assert "sums: a new version is in production" in store.get(f"runs/{run_id}/report.html").decode()
    outputs = server.run(run_id).folder / "outputs"
    assert any(path.read_text().startswith("# Promote: sums@production") for path in outputs.rglob("summary"))


@pytest.mark.slow
def test_a_run_that_is_skipped_checks_production_and_takes_it_back_where_the_config_asks(
    server: KfpServer, fineloop: Fineloop, store: Store, options: list[str], stub_cluster: JobsApi
) -> None:
    versions = []
    for loss in (0.5, 0.9):  # the second is held
        answered = fineloop("submit", *options, "--set", f"train.weight_decay={loss}")
        assert answered.exit_code == 0, answered.stderr
        versions.append(answered.body["version"])
    aliases.promote(store, "sums", versions[1])
    store.put("incoming/2.jsonl", sums(60, 100).encode())
    few = ["--set", "data.min_new_records=50", "--set", "check.when_skipped=true"]

    looked = fineloop("submit", *options, *few)
    assert (looked.exit_code, looked.body["decision"]) == (0, "skipped"), looked.stderr
    assert any(f"{versions[1]} is worse than {versions[0]}, on 40 records" in why for why in looked.body["reasons"])
    assert looked.body["steps"].get("Roll it back") != "SUCCEEDED"
    assert production(store) == versions[1]

    jobs = len(stub_cluster.jobs)
    back = fineloop("submit", *options, *few, "--set", "check.roll_back=true")
    assert (back.exit_code, back.body["decision"]) == (0, "skipped"), back.stderr
    assert back.body["steps"]["Roll it back"] == "SUCCEEDED"
    assert production(store) == versions[0]
    assert len(stub_cluster.jobs) == jobs  # nothing was new: what the look before had found decides
    assert audit(store, "sums").findings == ()


@pytest.mark.slow
def test_a_run_that_fails_has_its_report(server, fineloop, store, options, monkeypatch):
    monkeypatch.setattr("pipelines.kubeflow.compile.RETRIES", 0)  # they wait for half a minute
    answered = fineloop("submit", *options, "--set", "method.dropout=0.1")
    assert answered.exit_code == 1
    assert answered.body["message"] == "[Fine-tune the adapter] data.source: every answer is empty"
    assert "[Fine-tune the adapter] data.source: every answer is empty" in answered.stderr
    page = store.get(f"runs/{answered.body['run_id']}/report.html").decode()
    assert "the finetune step failed" in page
