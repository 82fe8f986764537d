import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.shared.errors import Conflict, IntegrityError, ObjectMissing, UserError
from components.store import folders
from components.store.folders import MANIFEST, Manifest, find_manifest, publish, pull, read_manifest, verify
from components.store.store import JSON, ObjectInfo, Store, encode_json
from pipelines.local.seaweedfs import Endpoint

KEY = "datasets/d1"
FILES: dict[str, bytes | Path] = {"train/part-0.parquet": b"training", "eval/part-0.parquet": b"held out", "empty": b""}


def listing(store: Store) -> dict[str, object]:
    return {info.key: info.last_modified for info in store.list("")}


class Lagging(Store):
    """A store whose listings do not show yet what was just written, as Swift's and old Ceph's may not."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())


def test_a_manifest_lists_what_was_written_where_listings_lag(store: Store) -> None:
    lagging = Lagging(store._client, store.bucket, store.prefix)
    store.create(f"{KEY}/lineage.json", b"claimed before")
    manifest = publish(lagging, KEY, {**FILES, "lineage.json": b"claimed before"})
    assert manifest.files.keys() == {*FILES, "lineage.json"}
    assert verify(store, KEY) == manifest


def test_a_published_folder_verifies_and_is_pulled_whole(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"{}")
    manifest = publish(store, KEY, {**FILES, "profile.json": path}, about={"records": 2})
    assert read_manifest(store, KEY) == manifest == verify(store, KEY)
    assert manifest.about == {"records": 2}
    assert manifest.files["profile.json"]["size"] == 2
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # printf '{}' | sha256sum
    assert manifest.files["profile.json"]["sha256"] == digest
    target = tmp_path / "deep" / "target"
    assert pull(store, KEY, target) == manifest
    assert {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()} == {
        **FILES,
        "profile.json": b"{}",
        MANIFEST: manifest.body,
    }
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_the_manifest_is_written_last_and_by_creation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    create = store.create
    monkeypatch.setattr(store, "put", None)
    monkeypatch.setattr(store, "create", lambda key, body, **how: (create(key, body, **how), writes.append(key))[0])
    publish(store, KEY, FILES)
    assert sorted(writes[:-1]) == sorted(f"{KEY}/{path}" for path in FILES)
    assert writes[-1] == f"{KEY}/{MANIFEST}"


def test_a_publication_killed_before_its_manifest_is_invisible_and_the_next_completes_it(
    store: Store, s3_server: Endpoint, tmp_path: Path
) -> None:
    program = f"""
import os
from components.store import folders
from components.store.store import Store
from components.config.schema import RegistryConfig
store = Store.open(RegistryConfig(bucket={store.bucket!r}, prefix={store.prefix!r}))
create = store.create
def killed(key, body, **how):
    return os.kill(os.getpid(), 9) if key.endswith("manifest.json") else create(key, body, **how)
store.create = killed
folders.publish(store, {KEY!r}, {{"a": b"from the first", "left": b"over"}})
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert [info.key for info in store.list("")] == [f"{KEY}/a", f"{KEY}/left"]
    assert find_manifest(store, KEY) is None
    for read in (read_manifest, verify, lambda store, key: pull(store, key, tmp_path / "target")):
        with pytest.raises(ObjectMissing, match=f"{KEY} does not exist: it has no manifest.json"):
            read(store, KEY)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Conflict, match=r"has no manifest\.json yet, and another writer's a, left: remove the folder"):
        publish(store, KEY, {"a": b"from the second"})
    assert find_manifest(store, KEY) is None
    manifest = publish(store, KEY, {"a": b"from the second", "b": b""}, identity=["b"])
    assert verify(store, KEY) == manifest
    assert manifest.files == {
        "a": folders.digest_of(b"from the first"),
        "b": folders.digest_of(b""),
        "left": folders.digest_of(b"over"),
    }


def test_publishing_the_same_files_again_changes_nothing(store: Store) -> None:
    first = publish(store, KEY, FILES, about={"try": 1})
    before = listing(store)
    assert publish(store, KEY, FILES, about={"try": 2}) == first
    assert listing(store) == before


@pytest.mark.parametrize("other", [{**FILES, "empty": b"no more"}, {**FILES, "more": b""}, {"empty": b""}])
def test_publishing_other_files_is_a_conflict_that_changes_nothing(
    store: Store, other: dict[str, bytes | Path]
) -> None:
    publish(store, KEY, FILES)
    before = listing(store)
    with pytest.raises(Conflict, match="never rewritten"):
        publish(store, KEY, other)
    assert listing(store) == before
    verify(store, KEY)


def test_the_loser_of_two_publications_gets_the_winners_manifest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = store.create
    body = encode_json(
        {
            "format": 1,
            "files": {path: folders.digest_of(body) for path, body in FILES.items()},
            "about": {"by": "the other"},
            "created_at": folders.now(),
        }
    )

    def overtaken(key: str, own: bytes, *, content_type: str) -> str:
        if key.endswith(MANIFEST):
            create(key, body, content_type=content_type)
        return create(key, own, content_type=content_type)

    monkeypatch.setattr(store, "create", overtaken)
    assert publish(store, KEY, FILES).about == {"by": "the other"}
    assert read_manifest(store, KEY).body == body


def test_of_two_unequal_publishers_at_once_neither_damages_what_the_other_is_told(store: Store) -> None:
    rounds = 20
    stores = [store, Store.open(RegistryConfig(bucket=store.bucket, prefix=store.prefix))]
    barrier = threading.Barrier(2)

    def write(writer: int) -> list[Manifest | Conflict]:
        results: list[Manifest | Conflict] = []
        for number in range(rounds):
            own = {f"{name}.json": f"{writer}".encode() * (1 + writer) for name in "abc"}
            barrier.wait()
            try:
                found = publish(
                    stores[writer], f"f/{number}", {"same": b"x", **own}, about={"by": writer}, identity=["same"]
                )
                results.append(found)
            except Conflict as exc:
                results.append(exc)
        return results

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(zip(*pool.map(write, range(2)), strict=True))
    for number, outcome in enumerate(outcomes):
        stored = verify(store, f"f/{number}")
        winners = [
            writer for writer, results in enumerate(outcome) if results == stored and stored.about == {"by": writer}
        ]
        assert len(winners) == 1, outcome
        other = outcome[1 - winners[0]]
        assert other == stored or isinstance(other, Conflict)


def test_a_large_file_is_created_once(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1000) * 35_000)
    manifest = publish(store, KEY, {"weights": path})
    assert verify(store, KEY) == manifest
    before = listing(store)
    with pytest.raises(Conflict):
        store.create(f"{KEY}/weights", path)
    assert listing(store) == before
    assert not store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


@pytest.mark.parametrize("path", ["../a", "/a", "a/../../b", "a//b", "./a", "", MANIFEST, "a\\b"])
def test_a_path_that_leaves_the_folder_is_not_published(store: Store, path: str) -> None:
    with pytest.raises(UserError, match="relative path"):
        publish(store, KEY, {path: b""})
    assert listing(store) == {}


def test_a_manifest_that_lists_a_path_outside_its_folder_is_refused(store: Store, tmp_path: Path) -> None:
    files = {"../escaped": folders.digest_of(b"x")}
    body = encode_json({"format": 1, "files": files, "about": {}, "created_at": folders.now()})
    store.create(f"{KEY}/{MANIFEST}", body, content_type=JSON)
    with pytest.raises(IntegrityError, match=r"lists '\.\./escaped'"):
        pull(store, KEY, tmp_path / "target")


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"format":2}', b'{"format":1,"files":{"a":1}}'])
def test_a_manifest_that_is_none_is_refused(store: Store, body: bytes) -> None:
    store.put(f"{KEY}/{MANIFEST}", body)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(store, KEY)


def changed_byte(store: Store) -> None:
    store.put(f"{KEY}/train/part-0.parquet", b"trainin9")


def missing_file(store: Store) -> None:
    store.delete([f"{KEY}/train/part-0.parquet"])


def extra_file(store: Store) -> None:
    store.put(f"{KEY}/train/part-1.parquet", b"more")


def wrong_size(store: Store) -> None:
    store.put(f"{KEY}/train/part-0.parquet", b"training more")


DAMAGE = [
    (changed_byte, "part-0.parquet has sha256"),
    (missing_file, "part-0.parquet is missing"),
    (extra_file, "part-1.parquet is not in the manifest"),
    (wrong_size, "part-0.parquet has 13 bytes, the manifest says 8"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_damage_is_found_by_verify_and_by_pull_which_leaves_nothing(
    store: Store, tmp_path: Path, damage: object, said: str
) -> None:
    assert callable(damage)
    publish(store, KEY, FILES)
    damage(store)
    with pytest.raises(IntegrityError, match=said):
        verify(store, KEY)
    with pytest.raises(IntegrityError, match=said):
        pull(store, KEY, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_nobody_vouched_for_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = publish(store, KEY, FILES)
    verify(store, KEY, manifest_sha256=manifest.sha256)
    for read in (verify, lambda store, key, **how: pull(store, key, tmp_path / "target", **how)):
        with pytest.raises(IntegrityError, match="was vouched for"):
            read(store, KEY, manifest_sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_pulling_again_keeps_a_target_that_is_whole_and_refuses_any_other(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "target"
    publish(store, KEY, FILES)
    target.mkdir()
    pull(store, KEY, target)
    before = (target / "empty").stat().st_mtime_ns
    pull(store, KEY, target)
    assert (target / "empty").stat().st_mtime_ns == before
    (target / "train/part-0.parquet").write_bytes(b"trainin9")
    with pytest.raises(UserError, match=f"{target} exists and is not"):
        pull(store, KEY, target)
    assert (target / "train/part-0.parquet").read_bytes() == b"trainin9"
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        pull(store, KEY, file)
    assert file.read_bytes() == b"mine"


def test_a_pulled_folder_is_as_readable_as_the_umask_lets_it(store: Store, tmp_path: Path) -> None:
    publish(store, KEY, FILES)
    pull(store, KEY, tmp_path / "target")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_said_and_leaves_nothing_at_the_target(
    store: Store, s3_server: Endpoint, tmp_path: Path
) -> None:
    publish(store, KEY, {"small": b"x", "large": os.urandom(3 * 2**20)})
    program = f"""
import resource, sys
from pathlib import Path
from components.store import folders
from components.store.store import Store
from components.config.schema import RegistryConfig
from components.shared.errors import FineloopError
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
store = Store.open(RegistryConfig(bucket={store.bucket!r}, prefix={store.prefix!r}))
try:
    folders.pull(store, {KEY!r}, Path({str(tmp_path / "target")!r}))
except FineloopError as exc:
    print(type(exc).__name__, exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FineloopError")
    assert "large" in done.stdout
    assert "File too large: free some space there, or choose another folder" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_pull_that_is_killed_leaves_nothing_at_the_target(store: Store, s3_server: Endpoint, tmp_path: Path) -> None:
    publish(store, KEY, FILES)
    program = f"""
import os
from pathlib import Path
from components.store import folders
from components.store.store import Store
from components.config.schema import RegistryConfig
store = Store.open(RegistryConfig(bucket={store.bucket!r}, prefix={store.prefix!r}))
download = store.download
store.download = lambda key, path: (download(key, path), os.kill(os.getpid(), 9))
folders.pull(store, {KEY!r}, Path({str(tmp_path / "target")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "target").exists()
    pull(store, KEY, tmp_path / "target")


def test_a_file_of_another_size_is_not_fetched_to_find_that_out(store: Store, tmp_path: Path) -> None:
    publish(store, KEY, FILES)
    store.put(f"{KEY}/empty", b"no longer")
    asked: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.url) or None)
    with pytest.raises(IntegrityError, match="empty has 9 bytes, the manifest says 0"):
        pull(store, KEY, tmp_path / "pulled")
    assert [url for url in asked if "/train/" in url or "/empty" in url] == []
