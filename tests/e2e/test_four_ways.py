"""One config, four ways to run it: here, submitted to Kubeflow, by its schedule, and as a bare Ray job."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.store.store import Store
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.e2e.conftest import CHECKOUT, Home, Tiny, settings

pytestmark = [pytest.mark.e2e, pytest.mark.full]


class Ways:
    """Each way has a folder of its own in the registry; nothing else of the config differs."""

    def __init__(self, home: Home, settings: list[str], environment: dict[str, str], kubeflow: KfpServer) -> None:
        self.home, self.settings, self.kubeflow = home, settings, kubeflow
        self.environment = environment

    def options(self, way: str) -> list[str]:
        return [*self.settings, "--set", f"registry.prefix={way}"]

    def here(self) -> dict[str, Any]:
        done = self.home.fineloop("run", *self.options("here"), "--run-id", "here")
        assert done.exit_code == 0, done.screen
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
        printed = self.printed("ray", *job.split(), *self.options("ray"), "--run-id", "ray")
        assert "step 4/4" in printed
        found = self.left("ray", "ray")
        assert found["version"] in printed
        return found

    def printed(self, program: str, *arguments: str) -> str:
        """What a command of this environment prints, from the checkout."""
        command = [str(Path(sys.executable).parent / program), *arguments]
        done = subprocess.run(
            command, cwd=CHECKOUT, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.screen
        return done.stdout

    def on_kubeflow(self, *arguments: str) -> dict[str, Any]:
        printed = self.printed("fineloop", *arguments, "--host", self.kubeflow.url, "--json")
        answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return answer

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
    environment = {**tiny.home.environment, **up}
    given = Store.open(RegistryConfig(prefix="given"))  # where every way can read it
    given.put("colours.jsonl", tiny.data)
    for path in tiny.base.iterdir():
        given.put(f"base/{path.name}", path)
    short = {"data.max_records": 120, "train.max_steps": 4, "evaluate.records": 20, "gate.limits": "[]"}
    short |= {"gate.min_records": 2, "data.source": given.uri("colours.jsonl"), "model.base": given.uri("base")}
    with serving(environment) as kubeflow:
        yield Ways(tiny.home, [*tiny.settings, *settings(short)], environment, kubeflow)


def test_every_way_makes_the_same_dataset_version_and_decision(ways: Ways) -> None:
    here = ways.here()
    assert here["decision"] == "promote", here["reasons"]
    assert ways.submitted() == here
    assert ways.scheduled() == here
    assert ways.ray_job() == {key: here[key] for key in ("dataset", "version", "losses")}
    assert Store.open(RegistryConfig(prefix="here")).exists("adapters/colours/aliases/production.json")
    assert not Store.open(RegistryConfig(prefix="ray")).exists("adapters/colours/aliases/production.json")
