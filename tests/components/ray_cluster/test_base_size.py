"""The size of a base, by the listing of a real S3 server and of a double of the model hub, whose files are holes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.finetune.finetune import finetune
from components.ray_cluster import submit
from components.shared.errors import ConfigError
from components.step.step import StepRun
from components.store.store import Store
from tests.doubles.hub import serving

CONFIG = """
[adapter]
name = "colours"
[model]
base = "{base}"
[data]
source = "s3://data/colours/"
[ray]
use_gpu = true
gpu = "H100"
[ray.cluster]
kind = "rayjob"
"""
ASK = """
import sys
from pathlib import Path
from components.config import config_file
from components.ray_cluster.submit import require_disk
from components.shared.errors import ConfigError
try:
    require_disk(config_file.load(Path(sys.argv[1]), sys.argv[2:]))
except ConfigError as exc:
    print(exc)
"""
GIB = 2**30


def configured(base: str) -> RunConfig:
    return config_file.loads(CONFIG.format(base=base))


def asked(folder: Path, url: str, *overrides: str) -> str:
    """In a process of its own, as huggingface_hub reads its settings when it is imported."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(base="org/name"))
    about = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", ASK, str(config), *overrides]
    done = subprocess.run(command, env=os.environ | about, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def hole(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_a_base_of_the_hub_that_no_pods_disk_holds_is_refused_by_its_listing(tmp_path):
    repository = tmp_path / "repository"
    for number in range(4):
        hole(repository / f"model-0000{number}-of-4.safetensors", 32 * GIB)
    for same_again in ("original/model.safetensors", "consolidated.safetensors", "model.bin"):
        hole(repository / same_again, 100 * GIB)
    with serving("org/name", repository) as hub:
        assert asked(tmp_path, hub.url) == (
            "each pod downloads org/name and writes 128 GiB to its disk, and ray.cluster.disk_gib is 100, beyond which "
            "it is evicted: set ray.cluster.disk_gib=160"
        )
        assert asked(tmp_path, hub.url, "ray.cluster.disk_gib=128") == ""
        assert not hub.sent


def test_a_hub_that_does_not_answer_refuses_nothing(tmp_path):
    assert asked(tmp_path, "http://127.0.0.1:9") == ""


def test_a_base_in_s3_has_the_size_of_all_that_a_pod_downloads(store: Store):
    for name, size in {"config.json": 3, "model.safetensors": 1000, "more/tokens.txt": 20}.items():
        store.put(f"bases/one/{name}", bytes(size))
    store.put("bases/one-more/model.safetensors", bytes(7))
    assert submit.base_bytes(configured(store.uri("bases/one")).model) == 1023
    assert submit.base_bytes(configured(store.uri("bases/none")).model) is None


def test_a_finetune_step_refuses_before_it_asks_for_pods(store, monkeypatch):
    """A request for pods would fail here, as no Kubernetes is there, and with another error."""
    monkeypatch.setattr(submit, "base_bytes", lambda _: 101 * GIB)
    run = StepRun("finetune", "night-1", configured("s3://bases/one"), store)
    with pytest.raises(ConfigError, match=r"writes 101 GiB .* set ray\.cluster\.disk_gib=127"):
        finetune(run, dataset_uri=store.uri("datasets/set"))
