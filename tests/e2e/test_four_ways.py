"""One config, four ways to run it: here, submitted to Kubeflow, by its schedule, and as a bare Ray job."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.store.store import Store
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.e2e.conftest import CHECKOUT, Home, Tiny, settings
from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e, pytest.mark.full]


@dataclass(frozen=True)
class Ways:
    """Each way has a folder of its own in the registry; nothing else of the config differs."""

    home: Home
    settings: list[str]
    client: Person
    """At the checkout, with what it takes to use the home's store and Ray head."""
    kubeflow: KfpServer

    def options(self, way: str) -> list[str]:
        return [*self.settings, "--set", f"registry.prefix={way}"]

    def here(self) -> dict[str, Any]:
        self.home.does("run", *self.options("here"), "--run-id", "here")
        return self.left("here", "here")

    def submitted(self) -> dict[str, Any]:
        done = self.on_kubeflow("submit", *self.options("submitted"))
        assert done["state"] == "SUCCEEDED", self.kubeflow.run(done["run_id"]).log
        return self.left("submitted", done["run_id"])

    def scheduled(self) -> dict[str, Any]:
        self.on_kubeflow("schedule", "create", "nightly", "--cron", "0 2 * * *", *self.options("scheduled"))
        (run,) = self.kubeflow.tick(datetime(2030, 1, 1, 2, 0, 1, tzinfo=UTC))
        assert run.wait() == "SUCCEEDED", run.log
        return self.left("scheduled", run.record["run_id"])

    def ray_job(self) -> dict[str, Any]:
        job = "job submit --working-dir . -- python -m ray_jobs.finetune --config pipelines/configs/icd10.toml"
        printed = self.client.does(shlex.join(["ray", *job.split(), *self.options("ray"), "--run-id", "ray"])).stdout
        assert "step 4/4" in printed
        found = self.left("ray", "ray")
        assert found["version"] in printed
        return found

    def on_kubeflow(self, *arguments: str) -> dict[str, Any]:
        return self.client.does(shlex.join(["fineloop", *arguments, "--host", self.kubeflow.url, "--json"])).answer

    def left(self, way: str, run_id: str) -> dict[str, Any]:
        """What the run left in the store, without what names the run or the way."""
        store = Store.open(RegistryConfig(prefix=way))
        trained = store.get_json(f"runs/{run_id}/finetune.json")
        found = {"dataset": trained["dataset_uri"].rpartition("/")[2], "version": trained["version"]}
        curve = store.get(f"runs/{run_id}/metrics.jsonl").decode().splitlines()
        found["losses"] = [json.loads(line)["loss"] for line in curve]
        if store.exists(f"runs/{run_id}/decision.json"):
            decision = store.get_json(f"runs/{run_id}/decision.json")
            found |= {key: decision[key] for key in ("decision", "reasons", "rules")}
        return found


@pytest.fixture
def ways(tiny: Tiny, up: dict[str, str], store: Store) -> Iterator[Ways]:
    given = Store.open(RegistryConfig(prefix="given"))  # where every way can read it
    given.put("colours.jsonl", tiny.data)
    for path in tiny.base.iterdir():
        given.put(f"base/{path.name}", path)
    short = {"data.max_records": 120, "train.max_steps": 4, "evaluate.records": 20, "gate.limits": "[]"}
    short |= {"gate.min_records": 2, "data.source": given.uri("colours.jsonl"), "model.base": given.uri("base")}
    client = Person(CHECKOUT, up)
    with serving(client.environment) as kubeflow:
        yield Ways(tiny.home, [*tiny.settings, *settings(short)], client, kubeflow)


def test_every_way_makes_the_same_dataset_version_and_decision(ways: Ways) -> None:
    here = ways.here()
    assert here["decision"] == "promote", here["reasons"]
    assert ways.submitted() == here
    assert ways.scheduled() == here
    assert ways.ray_job() == {key: here[key] for key in ("dataset", "version", "losses")}
    assert Store.open(RegistryConfig(prefix="here")).exists("adapters/colours/aliases/production.json")
    assert not Store.open(RegistryConfig(prefix="ray")).exists("adapters/colours/aliases/production.json")
