"""`python -m ray_jobs.sweep` as a cluster runs it, on a Ray of its own: what its trials share, and how it fails."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.config import config_file
from components.records import runs
from components.records.sweep import SweepResult
from components.store.store import Store, open_uri
from tests.doubles.faulty_proxy import faulty_proxy
from tests.models.tiny import build_base, colour_rows

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Sweeps:
    """A config on the tiny base, and sweeps of it."""

    toml: str
    directory: Path
    environment: dict[str, str]

    def run(self, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = self.directory / "config.toml"
        # One trial takes every core of Ray's, so that one worker has them all.
        one_at_a_time = [f"ray.cpus_per_worker={os.cpu_count()}"]
        path.write_text(config_file.dumps(config_file.loads(self.toml, [*one_at_a_time, *settings])))
        return subprocess.run(
            [sys.executable, "-m", "ray_jobs.sweep", "--config", str(path), "--run-id", "s1"],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


@pytest.fixture
def sweeps(config, store: Store, tmp_path: Path) -> Sweeps:
    source = tmp_path / "colours.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", f"data.source={source}"]
    place += ["data.eval_share=0.3", "data.validation_share=0.5"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, "RAY_AUTH_MODE": "disabled", "FINELOOP_CACHE": str(tmp_path / "cache")}
    return Sweeps(config_file.dumps(config_file.loads(config_file.dumps(config), place)), tmp_path, environment)


@pytest.mark.full
def test_two_trials_share_one_download_one_quantisation_and_one_dataset(sweeps, store, tiny_base):
    """Counted by a proxy before the S3 server, and by the worker."""
    folder = store.uri("origin")
    there, key = open_uri(folder)
    for file in tiny_base.iterdir():
        there.put(f"{key}/{file.name}", file.read_bytes())
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        done = sweeps.run(
            *("method.name=qlora", f"model.base={folder}", "tune.max_steps=20"),
            "tune.learning_rates=[3e-3, 1e-2]",
            AWS_ENDPOINT_URL=proxy.url,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = runs.read(store, "s1", SweepResult)
    assert [trial.learning_rate for trial in result.trials] == [3e-3, 1e-2]
    assert {trial.status for trial in result.trials} <= {"finished", "stopped"}

    def count(method: str, what: str) -> int:
        return sum(asked == method and what in path for asked, path in proxy.asked)

    dataset = f"/datasets/{result.dataset['dataset_id']}"
    assert count("GET", "/origin/model.safetensors") == 1
    assert [trial.bases_loaded for trial in result.trials] == [1, 1]
    assert (count("PUT", f"{dataset}/manifest.json"), count("GET", f"{dataset}/train/")) == (1, 1)
    assert all(0 < trial.ready_s < trial.seconds for trial in result.trials)
    assert sorted((trial.waited_s or 0) > 0 for trial in result.trials) == [False, True]


@pytest.mark.full
def test_a_sweep_whose_every_trial_fails_fails_with_their_cause(sweeps, store, tmp_path):
    torn = build_base(tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = sweeps.run(f"model.base={torn}", "tune.learning_rates=[3e-3, 1e-2]")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no trial ended well, and 2 of 2 failed; the first, lora-r8-b16-0.003-s0: " in done.stdout
    assert "SafetensorError" in done.stdout
    assert runs.find(store, "s1", SweepResult) is None
    assert {trial.status for trial in runs.trials(store, "s1")} == {"failed"}
