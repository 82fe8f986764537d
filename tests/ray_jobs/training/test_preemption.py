"""A node that is drained in the middle of a training: Ray's own drain, on a cluster of several nodes on this machine.

The judge is the same training on nodes that nobody takes.
"""

import json

import pytest
from safetensors.torch import load

from components.records import runs
from tests.ray_jobs import own_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_WORKERS = 2
NUM_STEPS = 300


def test_a_training_whose_node_is_drained_goes_on_elsewhere_and_loses_no_step(config, store, tmp_path):
    toml = own_cluster.toml_of(config, store, tmp_path, f"train.max_steps={NUM_STEPS}")
    with own_cluster.driver(NUM_WORKERS + 1) as driver:
        unbroken, broken = (
            driver.submit(own_cluster.finetuned, toml, run_id, meanwhile).result(timeout=900)
            for run_id, meanwhile in (("unbroken", None), ("broken", own_cluster.drain_one))
        )
    assert broken["meanwhile"]
    assert broken["resumed_from_step"] > unbroken["resumed_from_step"] == 0
    curve, _ = store.read(runs.run_key("broken", runs.METRICS))
    assert [r["step"] for r in map(json.loads, curve.splitlines()) if r["kind"] == "train"] == [
        *range(1, NUM_STEPS + 1)
    ]
    first, second = (
        load(store.get(store.key(f"{result['version_uri']}/adapter_model.safetensors")))
        for result in (unbroken, broken)
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
