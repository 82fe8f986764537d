"""Folders that exist once their manifest does.

Every file is created, never overwritten (If-None-Match), and `manifest.json`, which lists each with its size and
sha256, is created last. So a writer that dies half-way leaves nothing that a reader sees, and if two write at once, the
slower one changes nothing that the faster one's manifest lists.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from components.shared.errors import Conflict, IntegrityError, ObjectMissing, UserError
from components.shared.protocol import counted
from components.store.client import disk_errors
from components.store.store import BINARY, CHUNK_BYTES, JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
FILES_AT_ONCE = 4
FAULTS_SHOWN = 5
CONTENT_TYPES = {".json": JSON, ".md": "text/markdown; charset=utf-8", ".html": "text/html; charset=utf-8"}


class FileDigest(TypedDict):
    """The manifest's entry for one file; sha256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder's manifest, as stored."""

    files: dict[str, FileDigest]
    """Digest of each file, by its path within the folder, with forward slashes."""
    about: dict[str, Any]
    """Metadata by the writer, to be read without opening a file."""
    created_at: str
    """Time of creation in UTC, ISO 8601 with microseconds, so that it sorts as text."""
    sha256: str
    """SHA-256 of `body`, in hex. The manifest holds the hash of every file, so this covers the whole folder."""
    body: bytes
    """The bytes of manifest.json as stored."""

    @property
    def content_sha256(self) -> str:
        """A sha256 of the files, in hex; unlike `sha256` the same whoever wrote them, and whenever."""
        return hashlib.sha256(encode_json({path: digest["sha256"] for path, digest in self.files.items()})).hexdigest()


def now() -> str:
    """Return the current time in the registry's format."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def publish(
    store: Store,
    key: str,
    files: Mapping[str, bytes | Path],
    *,
    about: Mapping[str, Any] | None = None,
    identity: Collection[str] | None = None,
    apart: Collection[str] = (),
) -> Manifest:
    """Write the folder `key`, manifest last. Writing the same files again returns the stored manifest, unchanged.

    A folder that another writer left without a manifest, or is writing now, is completed: the manifest lists what is
    stored, and files that the caller did not write are read for it. `identity` names the files that must be as given,
    by default all; of any other file, the one stored first stays. Writers of one folder should agree on the names of
    its files: a file created after the manifest belongs to nothing. `apart` names subfolders that do not belong to it.
    Raises Conflict if the folder exists with other files, or has no manifest yet and differs in its identity, UserError
    if a path in `files` is absolute, leaves the folder, or is the manifest's own.
    """
    if outside := [path for path in files if not _is_inside(path)]:
        raise UserError(f"cannot publish {outside[0]!r} in {store.uri(key)}: use a relative path other than {MANIFEST}")
    digests = {path: digest_of(files[path]) for path in sorted(files)}
    existing = find_manifest(store, key)
    if existing is not None:
        return _same(store, key, existing, digests)
    logger.info("publishing %s to %s", counted(len(files), "file"), store.uri(key))

    def create(path: str) -> str | None:
        content_type = CONTENT_TYPES.get(PurePosixPath(path).suffix, BINARY)
        try:
            store.create(f"{key}/{path}", files[path], content_type=content_type)
        except Conflict:  # there is one by another writer, which stays as it is
            return None
        return path

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        created = pool.map(create, digests.keys() - _sizes(store, key, apart))
        stored = {path: digests[path] for path in created if path}
    # What was to be written is there, whether or not the store's listings show it yet.
    for path in (_sizes(store, key, apart).keys() | digests.keys()) - stored.keys() - {MANIFEST}:
        stored[path] = _digest(store.chunks(f"{key}/{path}"))
    fixed = {*stored, *digests} if identity is None else identity
    if differing := _differing(stored, digests, fixed):
        raise Conflict(f"{store.uri(key)} has no {MANIFEST} yet, and another writer's {differing}: remove the folder")
    body = encode_json({"format": FORMAT, "files": stored, "about": dict(about or {}), "created_at": now()})
    try:
        store.create(f"{key}/{MANIFEST}", body, content_type=JSON)
    except Conflict:
        return _same(store, key, read_manifest(store, key), digests)
    return parse_manifest(body, store.uri(f"{key}/{MANIFEST}"))


def find_manifest(store: Store, key: str) -> Manifest | None:
    """Read the folder's manifest; None if there is no such folder."""
    stored = store.read(f"{key}/{MANIFEST}")
    return parse_manifest(stored[0], store.uri(f"{key}/{MANIFEST}")) if stored else None


def read_manifest(store: Store, key: str, *, manifest_sha256: str | None = None) -> Manifest:
    """Read the folder's manifest. Raises ObjectMissing if there is no such folder, or its writer has not finished,
    IntegrityError if it is not a manifest of a format that this version knows, or not the one with `manifest_sha256`.
    """
    manifest = find_manifest(store, key)
    if manifest is None:
        raise ObjectMissing(f"{store.uri(key)} does not exist: it has no {MANIFEST}")
    if manifest_sha256 is not None and manifest.sha256 != manifest_sha256:
        raise IntegrityError(
            f"{store.uri(f'{key}/{MANIFEST}')} has sha256 {manifest.sha256}, but {manifest_sha256} was vouched for"
        )
    return manifest


def pull(store: Store, key: str, target: Path, *, manifest_sha256: str | None = None) -> Manifest:
    """Copy the folder to `target`, manifest included, every byte verified before anything appears there.

    A target that already holds this very folder is verified and kept; an empty folder is replaced. Raises ObjectMissing
    if there is no such folder; IntegrityError if a file is missing or differs, or the manifest is not the one with
    `manifest_sha256`; UserError if the target holds something else.
    """
    manifest = read_manifest(store, key, manifest_sha256=manifest_sha256)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        if target.is_dir() and _holds(target, manifest):
            return manifest
        raise UserError(f"{target} exists and is not {store.uri(key)}: remove it or choose another folder")

    def download(path: str) -> FileDigest:
        store.download(f"{key}/{path}", folder / path)
        return digest_of(folder / path)

    with disk_errors(target), beside(target) as folder:
        _check(store, key, manifest, download)
        (folder / MANIFEST).write_bytes(manifest.body)
        try:
            folder.rename(target)
        except OSError:
            if not (target.is_dir() and _holds(target, manifest)):  # otherwise another process has just made the same
                raise
    return manifest


def verify(store: Store, key: str, *, manifest_sha256: str | None = None, apart: Collection[str] = ()) -> Manifest:
    """Check every byte of the folder against its manifest.

    `apart` names subfolders that do not belong to it, and may hold anything. Raises ObjectMissing if there is no such
    folder; IntegrityError if a file is missing, differs or is not listed, or the manifest's sha256 is not
    `manifest_sha256`.
    """
    manifest = read_manifest(store, key, manifest_sha256=manifest_sha256)
    _check(store, key, manifest, lambda path: _digest(store.chunks(f"{key}/{path}")), apart)
    return manifest


def digest_of(body: bytes | Path) -> FileDigest:
    """Return size and sha256; a file is streamed."""
    if isinstance(body, bytes):
        return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    with body.open("rb") as file:
        return _digest(iter(lambda: file.read(CHUNK_BYTES), b""))


def _digest(chunks: Iterable[bytes]) -> FileDigest:
    size, sha256 = 0, hashlib.sha256()
    for chunk in chunks:
        size += len(chunk)
        sha256.update(chunk)
    return {"size": size, "sha256": sha256.hexdigest()}


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path == "/".join(parts) and path not in ("", MANIFEST) and not {"..", "/"} & set(parts) and "\\" not in path


def parse_manifest(body: bytes, uri: str) -> Manifest:
    """Parse a manifest; `uri` is the address of its object. Raises IntegrityError if it is not a manifest of a format
    that this version knows."""
    data = decode_json(body, uri)
    try:
        if data["format"] != FORMAT:
            raise IntegrityError(f"{uri} has format {data['format']!r}, this version reads {FORMAT}")
        files = {
            str(path): FileDigest(size=int(entry["size"]), sha256=str(entry["sha256"]))
            for path, entry in data["files"].items()
        }
        about, created_at = dict(data["about"]), str(data["created_at"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise IntegrityError(f"{uri} is not a manifest: {type(exc).__name__} {exc}") from exc
    for path in files:  # a manifest from elsewhere must not be able to write outside the folder it is pulled into
        if not _is_inside(path):
            raise IntegrityError(f"{uri} lists {path!r}, which does not lie in its folder")
    return Manifest(files, about, created_at, hashlib.sha256(body).hexdigest(), body)


def _same(store: Store, key: str, existing: Manifest, digests: Mapping[str, FileDigest]) -> Manifest:
    if differing := _differing(existing.files, digests, {*existing.files, *digests}):
        raise Conflict(
            f"{store.uri(key)} exists since {existing.created_at} with other content in {differing}, and is never "
            "rewritten: publish under another name"
        )
    return existing


def _differing(stored: Mapping[str, FileDigest], digests: Mapping[str, FileDigest], paths: Collection[str]) -> str:
    paths = [path for path in sorted(paths) if stored.get(path) != digests.get(path)]
    return ", ".join(paths[:FAULTS_SHOWN])


def _sizes(store: Store, key: str, apart: Collection[str] = ()) -> dict[str, int]:
    sizes = {info.key.removeprefix(f"{key}/"): info.size for info in store.list(f"{key}/")}
    return {path: size for path, size in sizes.items() if path.partition("/")[0] not in apart}


def _check(
    store: Store, key: str, manifest: Manifest, read: Callable[[str], FileDigest], apart: Collection[str] = ()
) -> None:
    """Compare the folder with its manifest: the listing first, and if that agrees, what `read` makes of each file.
    Raises IntegrityError if they differ."""
    sizes = _sizes(store, key, apart)
    faults = [f"{path} is not in the manifest" for path in sizes if path not in manifest.files and path != MANIFEST]
    for path, listed in manifest.files.items():
        if path not in sizes:
            faults.append(f"{path} is missing")
        elif sizes[path] != listed["size"]:
            faults.append(f"{path} has {sizes[path]} bytes, the manifest says {listed['size']}")

    def content_fault(path: str) -> str | None:
        try:
            stored, listed = read(path), manifest.files[path]
        except ObjectMissing:
            return f"{path} is missing"
        same = stored == listed
        return None if same else f"{path} has sha256 {stored['sha256']}, the manifest says {listed['sha256']}"

    if not faults:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            faults = [fault for fault in pool.map(content_fault, manifest.files) if fault]
    if faults:
        more = f" and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise IntegrityError(f"{store.uri(key)} is damaged: {'; '.join(faults[:FAULTS_SHOWN])}{more}")


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the target's disk, to be filled and renamed to it; removed at the end if it was not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "folder"  # unlike the scratch folder itself, readable as the umask allows
        folder.mkdir()
        yield folder


def _holds(target: Path, manifest: Manifest) -> bool:
    wanted = {**{path: entry["sha256"] for path, entry in manifest.files.items()}, MANIFEST: manifest.sha256}
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    return present == set(wanted) and all(digest_of(target / path)["sha256"] == wanted[path] for path in wanted)
