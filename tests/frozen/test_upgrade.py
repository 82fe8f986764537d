"""A run that another release began, over Ray, on the registry as that release left it."""

import json
import os
import subprocess
import sys

import pytest

from tests.frozen.registry import Frozen
from tests.pipelines.command_line import ROOT

pytestmark = pytest.mark.e2e


@pytest.mark.full
def test_the_job_of_a_run_that_the_release_began_goes_on_from_its_checkpoint(frozen: Frozen, tmp_path):
    before = frozen.json("runs/promoted/finetune.json")
    config = frozen.store.uri("runs/promoted/config.toml")
    command = [sys.executable, "-m", "ray_jobs.finetune", "--config", config, "--run-id", "promoted"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(ROOT)
    command += ["--dataset", before["dataset_uri"]]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
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
