"""A home that another release began: today's whole pipeline, over Ray, on the registry as that release left it."""

import json
import os
import subprocess
import sys

import pytest

from tests.frozen.registry import ADAPTER, PLACE, Frozen
from tests.pipelines.command_line import ROOT, body, fineloop

pytestmark = pytest.mark.e2e


@pytest.mark.full
def test_a_run_meets_the_release_s_champion_takes_its_place_and_is_rolled_back(frozen: Frozen, tmp_path):
    old = frozen.version("promoted")
    changes = ["--set", "train.seed=1", "--set", "gate.worse_than_champion_by=0.5"]
    home = ["--home", tmp_path / "home", "--json"]
    config = frozen.path("runs/promoted/config.toml")
    done = fineloop("run", "-c", config, *changes, *home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = body(done)
    assert answer["decision"] == "promote", answer["reasons"]
    was = frozen.json("runs/promoted/evaluation.json")["models"]["candidate"]["metrics"]["loss"]
    assert answer["metrics"]["champion"]["loss"] == pytest.approx(was, abs=0.03)

    done = fineloop("adapters", "rollback", ADAPTER, *PLACE, *home, cwd=tmp_path)
    assert (body(done)["from"], body(done)["to"]) == (answer["version"], old)


@pytest.mark.full
def test_the_job_of_a_run_that_the_release_began_goes_on_from_its_checkpoint(frozen: Frozen, tmp_path):
    before = frozen.json("runs/promoted/finetune.json")
    config = frozen.store.uri("runs/promoted/config.toml")
    command = [sys.executable, "-m", "ray_jobs.finetune", "--config", config, "--run-id", "promoted"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run(
        [*command, "--dataset", before["dataset_uri"]],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    after = frozen.store.get_json("runs/promoted/finetune.json")
    assert after["resumed_from_step"] == 100
    assert after["steps"] == before["steps"]
    # Steps from before the checkpoint stay in the curve; those after it are the release's own again. What was measured
    # between them was measured on other records: today's gate judges on some of those that the release chose on.
    then, now = frozen.path("runs/promoted/metrics.jsonl").read_text(), frozen.store.get("runs/promoted/metrics.jsonl")
    assert now.decode().splitlines()[:100] == then.splitlines()[:100]
    was, became = (
        [line["loss"] for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
        for text in (then, now.decode())
    )
    assert became == pytest.approx(was, abs=0.05)
