"""The size of a base, by the listing of a real S3 server and of a double of the model hub, whose files are holes."""

import os

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
GIB = 2**30


def configured(base: str, *overrides: str) -> RunConfig:
    return config_file.loads(CONFIG.format(base=base), overrides)


def test_a_base_of_the_hub_that_no_pods_disk_holds_is_refused_by_its_listing(tmp_path, monkeypatch):
    sizes = {f"model-0000{number}-of-4.safetensors": 32 * GIB for number in range(4)}
    same_again = ("original/model.safetensors", "consolidated.safetensors", "model.bin")
    for name, size in {**sizes, **dict.fromkeys(same_again, 100 * GIB)}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, size)
    with serving("org/name", tmp_path) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=r"org/name and writes 128 GiB .* set ray\.cluster\.disk_gib=160"):
            submit.require_disk(configured("org/name"))
        submit.require_disk(configured("org/name", "ray.cluster.disk_gib=128"))
        assert not hub.sent
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    submit.require_disk(configured("org/name"))  # a hub that does not answer refuses nothing


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
