import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.shared.errors import Conflict, FineloopError, IntegrityError, ObjectMissing, UserError
from components.store import folders
from components.store.folders import MANIFEST, find_manifest, publish, pull, read_manifest, verify
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
    assert read_manifest(store, KEY) == manifest == verify(store, KEY, manifest_sha256=manifest.sha256)
    assert manifest.about == {"records": 2}
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # printf '{}' | sha256sum
    assert manifest.files["profile.json"] == {"size": 2, "sha256": digest}
    target = tmp_path / "deep" / "target"
    assert pull(store, KEY, target) == manifest
    pulled = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert pulled == {**FILES, "profile.json": b"{}", MANIFEST: manifest.body}
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as the umask lets it


def test_the_manifest_is_written_last_and_by_creation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    create = store.create
    monkeypatch.setattr(store, "put", None)
    monkeypatch.setattr(store, "create", lambda key, body, **how: (create(key, body, **how), writes.append(key))[0])
    publish(store, KEY, FILES)
    assert sorted(writes[:-1]) == sorted(f"{KEY}/{path}" for path in FILES)
    assert writes[-1] == f"{KEY}/{MANIFEST}"


def test_a_publication_killed_before_its_manifest_is_invisible_and_the_next_completes_it(
    store: Store, tmp_path: Path
) -> None:
    for path, body in (("a", b"from the first"), ("left", b"over")):
        store.create(f"{KEY}/{path}", body)
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
    contents = {"a": b"from the first", "b": b"", "left": b"over"}
    assert manifest.files == {path: folders.digest_of(body) for path, body in contents.items()}


def test_publishing_the_same_files_again_changes_nothing_and_other_files_are_a_conflict(store: Store) -> None:
    first = publish(store, KEY, FILES, about={"try": 1})
    before = listing(store)
    assert publish(store, KEY, FILES, about={"try": 2}) == first
    others: tuple[dict[str, bytes | Path], ...] = ({**FILES, "empty": b"more"}, {**FILES, "more": b""}, {"empty": b""})
    for other in others:
        with pytest.raises(Conflict, match="never rewritten"):
            publish(store, KEY, other)
    assert listing(store) == before


def test_the_loser_of_two_publications_gets_the_winners_manifest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = store.create
    files = {path: folders.digest_of(body) for path, body in FILES.items()}
    body = encode_json({"format": 1, "files": files, "about": {"by": "the other"}, "created_at": folders.now()})

    def overtaken(key: str, own: bytes, *, content_type: str) -> str:
        if key.endswith(MANIFEST):
            create(key, body, content_type=content_type)
        return create(key, own, content_type=content_type)

    monkeypatch.setattr(store, "create", overtaken)
    assert publish(store, KEY, FILES).about == {"by": "the other"}
    assert read_manifest(store, KEY).body == body


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


PART = f"{KEY}/train/part-0.parquet"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda store: store.put(PART, b"trainin9"), "part-0.parquet has sha256"),
        (lambda store: store.delete([PART]), "part-0.parquet is missing"),
        (lambda store: store.put(f"{KEY}/train/part-1.parquet", b""), "part-1.parquet is not in the manifest"),
        (lambda store: store.put(PART, b"training more"), "part-0.parquet has 13 bytes, the manifest says 8"),
    ],
)
def test_damage_is_found_by_verify_and_by_pull_which_leaves_nothing(
    store: Store, tmp_path: Path, damage: Callable[[Store], None], message: str
) -> None:
    publish(store, KEY, FILES)
    damage(store)
    with pytest.raises(IntegrityError, match=message):
        verify(store, KEY)
    with pytest.raises(IntegrityError, match=message):
        pull(store, KEY, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_nobody_vouched_for_is_refused(store: Store, tmp_path: Path) -> None:
    publish(store, KEY, FILES)
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
    (file := tmp_path / "file").write_bytes(b"mine")
    for taken in (target, file):
        with pytest.raises(UserError, match=f"{taken} exists and is not"):
            pull(store, KEY, taken)
    assert (target / "train/part-0.parquet").read_bytes() == b"trainin9"
    assert file.read_bytes() == b"mine"


PULLING = """
import os, resource
from pathlib import Path
from components.store import folders
from components.store.store import Store
from components.config.schema import RegistryConfig
from components.shared.errors import FineloopError
store = Store.open(RegistryConfig(bucket={bucket!r}, prefix={prefix!r}))
download = store.download
{before}
try:
    folders.pull(store, {key!r}, Path({target!r}))
except FineloopError as exc:
    print(type(exc).__name__, exc)
"""


def pulled_by_another_process(store: Store, target: Path, before: str) -> subprocess.CompletedProcess[str]:
    program = PULLING.format(bucket=store.bucket, prefix=store.prefix, key=KEY, target=str(target), before=before)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_full_disk_or_a_kill_leaves_nothing_at_the_target(store: Store, s3_server: Endpoint, tmp_path: Path) -> None:
    publish(store, KEY, {"small": b"x", "large": os.urandom(3 * 2**20)})
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    done = pulled_by_another_process(store, tmp_path / "target", full)
    assert done.stdout.startswith("FineloopError"), done.stderr
    assert "large" in done.stdout
    assert "File too large: free some space there, or choose another folder" in done.stdout
    assert list(tmp_path.iterdir()) == []
    killed = "store.download = lambda key, path: (download(key, path), os.kill(os.getpid(), 9))"
    assert pulled_by_another_process(store, tmp_path / "target", killed).returncode == -9
    assert not (tmp_path / "target").exists()
    pull(store, KEY, tmp_path / "target")


@pytest.mark.parametrize(("theirs", "is_kept"), [(KEY, True), ("datasets/other", False)])
def test_a_target_that_somebody_else_fills_meanwhile_is_kept_if_it_holds_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, theirs: str, is_kept: bool
) -> None:
    manifest, target, download = publish(store, KEY, {"a": b"1"}), tmp_path / "target", store.download
    publish(store, "datasets/other", {"a": b"2"})

    def and_another(key: str, path: Path) -> None:
        monkeypatch.setattr(store, "download", download)
        pull(store, theirs, target)
        download(key, path)

    monkeypatch.setattr(store, "download", and_another)
    if is_kept:
        assert pull(store, KEY, target) == manifest
    else:
        with pytest.raises(FineloopError, match="not empty"):
            pull(store, KEY, target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
