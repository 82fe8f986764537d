"""A base of many gigabytes is read once to know its identity, and again when it is another."""

import hashlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.config.schema import ModelConfig
from ray_jobs.base import base_model, local_cache
from ray_jobs.base.local_cache import remembered

opened: list[str] = []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_file_is_read_once_by_all_processes_of_a_machine(tmp_path):
    path, known = tmp_path / "weights", tmp_path / "known"
    path.write_bytes(b"one")
    assert remembered(path, known) == sha256(b"one")
    opened.clear()
    assert remembered(path, known) == sha256(b"one")
    assert str(path) not in opened
    assert len([each for each in known.iterdir() if each.is_file()]) == 1


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


def test_a_local_base_is_resolved_again_without_reading_its_weights(
    tiny_base, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path))
    config = ModelConfig(base=str(tiny_base))
    first = base_model.resolve(config)
    opened.clear()
    assert base_model.resolve(config) == first
    assert not [each for each in opened if Path(each).suffix == ".safetensors"]
