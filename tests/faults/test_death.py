"""A process that dies, and a server that does, at any point: what was acknowledged is there, and nothing half-way."""

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.registry.aliases import Cause, promote
from components.registry.event_log import events
from components.registry.identity import verify_whole, version_key
from components.registry.versions import Version, list_versions, resolve, verify_version
from components.shared.errors import IntegrityError, StoreError
from components.store.store import Store
from pipelines.local import guard, seaweedfs, server

WRITES = ("put_object", "complete_multipart_upload", "delete_objects")


class Died(BaseException):
    """Not even `except Exception` sees it, as nothing sees SIGKILL."""


class Mortal:
    """An S3 client whose process dies at its n-th write, before it is sent or before the answer is read."""

    def __init__(self, client: Any, dies_at: int, *, sent: bool) -> None:
        self._client, self._left, self._sent = client, dies_at, sent
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name not in WRITES:
            return call

        def write(**arguments: Any) -> Any:
            with self._lock:
                self._left -= 1
                left = self._left
            if left < 0 or (left == 0 and not self._sent):
                raise Died
            answer = call(**arguments)
            if left == 0:
                raise Died
            return answer

        return write


@pytest.mark.parametrize(
    "sent", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before it is sent", "before its answer is read"]
)
def test_a_run_that_dies_at_any_write_leaves_nothing_half_there_and_is_completed_by_the_next(
    store: Store, publish, assert_sound, sent: bool
) -> None:
    died, unsaid = 0, []
    while True:
        name = f"icd-{died}"
        before = publish(store, "first", name=name)
        promote(store, name, before)
        mortal = Store(Mortal(store._client, died + 1, sent=sent), store.bucket, store.prefix)
        cause = Cause("run-2", reason="better")
        try:
            candidate = publish(mortal, "second", name=name, **{"README.md": b"# Card"})
            promote(mortal, name, candidate, expected=before, cause=cause)
        except Died:
            died += 1
        else:
            break
        for version in list_versions(store, name):
            verify_whole(store, version_key(name, version.version), manifest_sha256=version.manifest_sha256)
        verify_version(store, resolve(store, f"{name}@production"))
        unsaid += [version for version in list_versions(store, name) if not said_of(store, version)]
        candidate = publish(store, "second", name=name, **{"README.md": b"# Card"})
        event = promote(store, name, candidate, expected=before, cause=cause)
        assert_sound(store, name, reported=[event])
        kinds = [event.kind for event in events(store, name)]
        assert sorted(kinds) == ["promoted", "promoted", "published", "published"]
    assert died >= 7  # weights, config, lineage, card, manifest, event, alias; and the event of the move
    assert len(unsaid) == 1  # where it died between the manifest and the event


def said_of(store: Store, version: Version) -> bool:
    """Whether the log says that the version was published; where it does not, nobody is given the version."""
    try:
        verify_version(store, version)
    except IntegrityError:
        with pytest.raises(IntegrityError, match="its publication did not end"):
            promote(store, version.name, version.version)
        return False
    return True


@pytest.mark.slow
def test_a_store_killed_under_load_keeps_what_it_acknowledged(
    tmp_path: Path, publish, assert_sound, monkeypatch
) -> None:
    reported: list[Any] = []
    stopping = threading.Event()

    def writer(store: Store, number: int) -> None:
        for count in range(10**6):
            with contextlib.suppress(StoreError):
                version = publish(store, f"{number}-{count}")
                reported.append(promote(store, "icd", version))
            if stopping.is_set():
                return

    running = server.start(seaweedfs.SeaweedFS(tmp_path, "killed"))
    for name, value in seaweedfs.Endpoint.read(running.endpoint).environment().items():
        monkeypatch.setenv(name, value)
    store = Store.open(RegistryConfig(bucket="killed"))
    writers = [threading.Thread(target=writer, args=(store, number)) for number in range(3)]
    try:
        for each in writers:
            each.start()
        for _ in range(4):
            enough = len(reported) + 5
            while len(reported) < enough:
                writers[0].join(0.02)
            for pid in guard.descendants(running.process.pid):
                os.kill(pid, signal.SIGKILL)
            running.process.wait()
            running.stop()
            running = server.start(seaweedfs.SeaweedFS(tmp_path, "killed"))
        stopping.set()
        for each in writers:
            each.join()
        reported.append(promote(store, "icd", publish(store, "last")))
        assert_sound(store, reported=reported)
    finally:
        stopping.set()
        running.stop()
