"""A node that runs out of memory, as Ray sees it: here it counts a thousandth of the machine's as all there is."""

from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig, RunConfig
from components.shared.errors import FineloopError
from components.store.store import Store
from ray_jobs.training import trainer
from tests.ray_jobs import own_ray

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def waits(arguments: dict[str, Any]) -> dict[str, Any]:
    """On each worker, for what ends it."""
    import time

    time.sleep(600)
    return {}


def run(config: RunConfig) -> str:
    """In a driver's process: what `trainer.run` raises."""
    try:
        trainer.run(waits, {}, config, Store.open(config.registry), run_id="r", name="ray", max_failures=0)
    except FineloopError as exc:
        return str(exc)
    return "nothing"


def test_a_training_that_ray_ends_for_memory_says_so(
    config: RunConfig, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    with own_ray.driver(2) as pool:
        said = pool.submit(run, config).result(timeout=600)
    assert said.startswith("the workers failed: a node ran out of memory")
