"""A tiny base model for the tests of the Ray jobs, made once a session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.versions import Version
from components.store.store import Store
from tests.models.tiny import build_base
from tests.models.tiny_version import publish

CONFIG = """
[adapter]
name = "colours"
[model]
base = "{base}"
max_length = 64
[data]
source = "unused.jsonl"
[method]
name = "lora"
rank = 8
[train]
learning_rate = 1e-2
batch_size = 16
micro_batch_size = 8
checkpoint_every_steps = 0
[ray]
num_workers = 2
[evaluate]
max_new_tokens = 8
"""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def config(tiny_base: Path) -> RunConfig:
    """Plain LoRA on the tiny base, two workers."""
    return config_file.loads(CONFIG.format(base=tiny_base))


@pytest.fixture
def placed(tiny_base: Path, store: Store) -> Callable[..., RunConfig]:
    """The same on the test's own registry, with further settings."""
    place = (f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}")
    return lambda *more: config_file.loads(CONFIG.format(base=tiny_base), [*place, *more])


@pytest.fixture
def version(config: RunConfig, store: Store, tmp_path: Path) -> Version:
    """A version by the test's own config, with an update drawn at random; nothing is left of its data."""
    return publish(config, store, tmp_path, with_data=False)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs measure here, in place of workers: tests/journeys/test_nights.py has those."""
    from ray_jobs import evaluate
    from ray_jobs.scoring.measure import measure_shard
    from ray_jobs.training import trainer

    def measured(task: Any, _store: Store, *, run_id: str, name: str = "") -> Any:
        return measure_shard(task.contenders, task.records, shard_index=0)

    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    for module in (evaluate, trainer):
        monkeypatch.setattr(module, "on_the_cluster", lambda config, _: config)
        monkeypatch.setattr(module, "measured", measured)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test; gives its folder of bases."""
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"
