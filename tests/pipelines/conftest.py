"""A cluster of stub jobs, a registry and a config: everything that a run needs but training."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.config.config_file import loads
from components.config.schema import RunConfig
from components.registry import aliases
from components.store.store import Store
from pipelines.cli import main
from pipelines.local.seaweedfs import Endpoint
from tests import warm
from tests.doubles import jobs_api
from tests.doubles.jobs_api import TOKEN, JobsApi
from tests.pipelines.command_line import publish_sums, require_documented, sums


@pytest.fixture(scope="session", autouse=True)
def _frames_without_source() -> Iterator[None]:
    """A pipeline is made in seconds otherwise in a process that other tests have imported torch into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", warm.stack)
        yield


@pytest.fixture
def stub_cluster(tmp_path: Path, s3_server: Endpoint) -> Iterator[JobsApi]:
    """A Jobs API whose `python -m ray_jobs.X` is the stub's; the environment points at it and at a store."""
    api = jobs_api.stub_cluster(tmp_path / "cluster", s3_server.environment())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_server.environment(), "RAY_ADDRESS": api.address}.items():
            patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        yield api
    api.close()


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    """Sixty records in a folder whose name a shell, a kfp condition and TOML could all trip over."""
    path = tmp_path / 'it\'s "my" data' / "records.jsonl"
    path.parent.mkdir()
    path.write_text(sums(0, 60))
    return path


@pytest.fixture
def config_path(tmp_path: Path, store: Store, data_path: Path) -> Path:
    """A config for the stub: its adapter's loss is train.weight_decay."""
    path = tmp_path / "config.toml"
    path.write_text(
        f"""
adapter.name = "sums"
model.base = "nobody/none"
data = {{source = {json.dumps(str(data_path))}, eval_share = 0.3}}
train.weight_decay = 1.0
gate.min_records = 2
registry = {{bucket = "{store.bucket}", prefix = "{store.prefix}"}}
"""
    )
    return path


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command, which must end with `exit_code`, and returns its JSON."""

    def run(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == exit_code
        body: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        require_documented(arguments, body)
        return body

    return run


@pytest.fixture
def answer(printed: Callable[..., dict[str, Any]], config_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a command with the config, as `printed` does."""
    return lambda *arguments, **expected: printed(*arguments, "-c", str(config_path), **expected)


@pytest.fixture
def make_config(config_path: Path) -> Callable[..., RunConfig]:
    """The config with some keys replaced."""
    return lambda *overrides: loads(config_path.read_text(), overrides)


@pytest.fixture
def published(store: Store) -> list[str]:
    """Two versions of one adapter, older first; the first is in production."""
    recipe = {"adapter": "lora", "serving": {"servable_as": "lora", "notes": ["a setting"]}}
    lineage = {"config": {"method": {"name": "qlora"}}, "recipe": recipe}
    made = [publish_sums(store, weights, run_id=f"run-{weights}", **lineage) for weights in ("one", "two")]
    aliases.promote(store, "sums", made[0])
    return made
