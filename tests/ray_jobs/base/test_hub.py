"""A hub that many machines ask at once, on loopback: what it refuses for now is asked for again, and nothing twice."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, JobError
from ray_jobs.base import local_cache as ours
from tests.doubles import hub

NAME = "org/name"


@pytest.fixture
def repository(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "repository")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A cache of its own, and the seconds that nobody has to wait for."""
    found: list[float] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub's own waits
    monkeypatch.setattr(ours, "time", SimpleNamespace(sleep=found.append))
    return found


def fetched(served: hub.Hub, monkeypatch: pytest.MonkeyPatch, revision: str = hub.COMMIT) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return ours.snapshot(ModelConfig(base=NAME, revision=revision), ["*.json"])


# Of a commit huggingface_hub itself asks six times.
@pytest.mark.parametrize(("revision", "refusals"), [("", [429, 503]), (hub.COMMIT, [429] * 14)])
def test_a_hub_that_is_too_busy_is_asked_again_later_and_not_all_at_the_same_time(
    repository, monkeypatch, waits, revision, refusals
):
    with hub.serving(NAME, repository) as served:
        served.refusals.extend(refusals)
        folder = fetched(served, monkeypatch, revision)
    assert (folder / "config.json").read_bytes() == (repository / "config.json").read_bytes()
    assert len(set(waits)) == 2
    assert all(0.5 <= wait / ours.AGAIN_S / 2**number <= 1.5 for number, wait in enumerate(waits))


def test_a_hub_that_stays_too_busy_is_no_mistake_of_the_user(repository, monkeypatch, waits):
    with hub.serving(NAME, repository) as served:
        served.refusals.extend([429] * 100)
        with pytest.raises(JobError, match=r"the model hub is too busy, with status 429 after 6 tries: set HF_TOKEN"):
            fetched(served, monkeypatch)


def test_what_the_hub_does_not_know_is_not_asked_for_again(repository, monkeypatch, waits):
    with hub.serving("org/other", repository) as served, pytest.raises(ConfigError, match="the model hub"):
        fetched(served, monkeypatch)
    assert waits == []


def test_the_next_worker_of_a_machine_asks_the_hub_nothing(repository, monkeypatch, waits):
    with hub.serving(NAME, repository) as served:
        first = fetched(served, monkeypatch)
        asked = len(served.asked)
        assert asked > 0
        assert fetched(served, monkeypatch) == first
        assert len(served.asked) == asked
