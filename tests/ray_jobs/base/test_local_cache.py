"""What processes of a machine build, read and ask a hub for once, and when again."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, JobError
from ray_jobs.base import base_model, local_cache
from ray_jobs.base.local_cache import forget_unused, once, remembered, touch
from tests.doubles import hub

ROOT = Path(__file__).parents[3]
DAY_S = 86400.0

KILLED = """
import os, signal, sys
from pathlib import Path
from ray_jobs.base.local_cache import once

def build(scratch):
    (scratch / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)

once(Path(sys.argv[1]), build)
"""


def test_what_a_killed_build_has_left_is_in_no_later_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "base"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "base").exists()
    assert list(tmp_path.glob("**/half"))
    once(tmp_path / "base", lambda scratch: (scratch / "whole").touch())
    assert [path.name for path in tmp_path.glob("**/*") if path.is_file() and path.suffix != ".lock"] == ["whole"]


def test_what_nobody_asks_for_is_forgotten_and_what_is_asked_for_is_not(tmp_path):
    for name in ("old", "asked", "locked", "young"):
        once(tmp_path / name, lambda scratch: (scratch / "file").touch())
        if name != "young":
            os.utime(tmp_path / name, (time.time() - 2 * DAY_S,) * 2)
    touch(tmp_path / "asked")
    with FileLock(f"{tmp_path / 'locked'}.lock"):
        forget_unused(tmp_path, DAY_S)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"asked", "locked", "young"}
    touch(tmp_path / "never-there")
    assert not (tmp_path / "never-there").exists()


opened: list[str] = []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_of_processes_that_ask_at_once_one_reads(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path, known, another = tmp_path / "weights", tmp_path / "known", threading.Event()
    path.write_bytes(b"one")
    read, begun = local_cache.sha256, []

    def slowly(file: Path) -> str:
        begun.append(file)
        if len(begun) > 1:
            another.set()
        another.wait(1.0)  # as long as a reading lasts, in which any other one would begin
        return read(file)

    monkeypatch.setattr(local_cache, "sha256", slowly)
    with ThreadPoolExecutor(8) as pool:  # a lock of files, which is the same among threads as among processes
        assert set(pool.map(lambda _: remembered(path, known), range(8))) == {sha256(b"one")}
    assert begun == [path]


def test_a_file_that_changed_is_read_again_though_its_size_and_its_time_did_not(tmp_path):
    path, known = tmp_path / "weights", tmp_path / "known"
    path.write_bytes(b"one")
    before = path.stat()
    remembered(path, known)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t leaves it
    assert remembered(path, known) == sha256(b"two")


def test_where_nothing_can_be_remembered_it_is_read_each_time(tmp_path):
    path, nowhere = tmp_path / "weights", tmp_path / "file"
    path.write_bytes(b"one")
    nowhere.touch()
    assert {remembered(path, nowhere / "known") for _ in range(2)} == {sha256(b"one")}


@pytest.mark.usefixtures("cache")
def test_a_local_base_is_resolved_again_without_reading_its_weights(tiny_base):
    config = ModelConfig(base=str(tiny_base))
    first = base_model.resolve(config)
    opened.clear()
    assert base_model.resolve(config) == first
    assert not [each for each in opened if Path(each).suffix == ".safetensors"]


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
    monkeypatch.setattr(local_cache, "time", SimpleNamespace(sleep=found.append))
    return found


def ask(served: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process asks that hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetched(served: hub.Hub, monkeypatch: pytest.MonkeyPatch, revision: str = hub.COMMIT) -> Path:
    ask(served, monkeypatch)
    return local_cache.snapshot(ModelConfig(base=NAME, revision=revision), ["*.json"])


@pytest.mark.usefixtures("waits")
def test_of_a_hub_model_the_weights_are_fetched_once_and_by_the_first_who_needs_them(
    tiny_base, repository, monkeypatch
):
    # What openai/gpt-oss-20b, mistralai/Mistral-7B-Instruct-v0.3 and repositories with an ONNX export hold beside them.
    others = ["original/model.safetensors", "original/config.json", "original/dtypes.json", "metal/model.bin"]
    others += ["consolidated.safetensors", "consolidated.safetensors.index.json", "onnx/model.safetensors", "LICENSE"]
    for name in others:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    files = {file.name for file in tiny_base.iterdir()}
    with hub.serving(NAME, repository) as served:
        ask(served, monkeypatch)
        unread = base_model.resolve(ModelConfig(base=NAME), weights=False)
        assert unread.path.name == hub.COMMIT
        assert served.sent == files - {"model.safetensors"}
        served.sent.clear()
        base = base_model.resolve(ModelConfig(base=NAME))
        assert served.sent == {"model.safetensors"}
        num_asked = len(served.asked)
        assert base_model.resolve(ModelConfig(base=NAME, revision=hub.COMMIT)) == base
        assert len(served.asked) == num_asked
    assert base.path == unread.path
    assert (base.path / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()


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
    assert all(0.5 <= wait / local_cache.AGAIN_S / 2**number <= 1.5 for number, wait in enumerate(waits))


def test_a_hub_that_stays_too_busy_is_no_mistake_of_the_user(repository, monkeypatch, waits):
    with hub.serving(NAME, repository) as served:
        served.refusals.extend([429] * 100)
        with pytest.raises(JobError, match=r"the model hub is too busy, with status 429 after 6 tries: set HF_TOKEN"):
            fetched(served, monkeypatch)


def test_what_the_hub_does_not_know_is_not_asked_for_again(repository, monkeypatch, waits):
    with hub.serving("org/other", repository) as served, pytest.raises(ConfigError, match="the model hub"):
        fetched(served, monkeypatch)
    assert waits == []
