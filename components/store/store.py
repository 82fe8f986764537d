"""One bucket and prefix of an S3 store. Keys are relative to the prefix.

What boto3 raises never leaves a `Store`: it becomes one `StoreError` that names the environment variable or the config
field to change.
"""

import contextlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from components.shared.errors import ConfigError, Conflict, IntegrityError, ObjectMissing, StoreError, UserError
from components.store.client import ATTEMPTS, client_from_environment, create_from_file, transfer_config, translated

if TYPE_CHECKING:
    from components.config.schema import RegistryConfig

BINARY = "application/octet-stream"
JSON = "application/json"
CHUNK_BYTES = 2**20
PLATFORM_KEYS = {"trusted_keys": "FINELOOP_TRUSTED_KEYS", "evaluation_keys": "FINELOOP_TRUSTED_EVALUATION_KEYS"}
"""The environment variables by which a deployment fixes the keys of every config: public keys, separated by spaces."""


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing; `key` is relative to the store's prefix."""

    key: str
    size: int
    last_modified: datetime
    etag: str
    """Changes with the object's content."""


class Store:
    """One bucket and prefix. Safe to share between threads; does not survive pickling (open one in each process)."""

    def __init__(
        self,
        client: Any,
        bucket: str,
        prefix: str,
        *,
        field: str = "registry.bucket",
        trusted_keys: Sequence[str] = (),
        evaluation_keys: Sequence[str] = (),
    ) -> None:
        """`field` is the config key that an error message names when the bucket does not exist."""
        self.trusted_keys, self.evaluation_keys = tuple(trusted_keys), tuple(evaluation_keys)
        self.bucket = bucket
        self.prefix = prefix
        self.endpoint: str = client.meta.endpoint_url
        self._client = client
        self._field = field

    @classmethod
    def open(cls, registry: "RegistryConfig") -> Self:
        """Open the registry with the endpoint and the credentials that the environment holds. Sends nothing yet. Raises
        StoreError if AWS_ENDPOINT_URL is not a URL, or AWS_PROFILE names no profile; ConfigError if the environment
        fixes keys, and the config has none or others."""
        keys: dict[str, Any] = {}
        for field, variable in PLATFORM_KEYS.items():
            named = getattr(registry, field)
            fixed = os.environ.get(variable, "").split()
            if fixed and (not named or set(named) - set(fixed)):
                raise ConfigError(
                    f"registry.{field} is {named}, and this deployment takes no other keys than those in {variable}: "
                    f"set it to one or more of {', '.join(fixed)}"
                )
            keys[field] = fixed or named
        where = client_from_environment(), registry.bucket, registry.prefix
        return cls(*where, **keys)

    def uri(self, key: str) -> str:
        """The object's full address; the empty key gives the registry's own folder."""
        return f"s3://{self.bucket}/{self._full(key)}"

    def key(self, uri: str) -> str:
        """The inverse of `uri`. Raises UserError if it is no s3:// address, or lies outside this bucket and prefix."""
        bucket, full = split_uri(uri)
        if bucket == self.bucket and not self.prefix:
            return full
        if bucket == self.bucket and full.startswith(self.prefix + "/"):
            return full.removeprefix(self.prefix + "/")
        raise UserError(
            f"{uri} lies outside the registry {self.uri('')}: set registry.bucket and registry.prefix to where it lies"
        )

    def get(self, key: str) -> bytes:
        """The object's bytes, whole: for small objects. Raises ObjectMissing if there is none."""
        stored = self.read(key)
        if stored is None:
            raise ObjectMissing(f"{self.uri(key)} does not exist")
        return stored[0]

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Body and etag, or None when there is no such object. The etag is what `swap` wants back."""
        try:
            with self._errors(key):
                return self._read_whole(key)
        except ObjectMissing:
            return None

    def _read_whole(self, key: str, **options: str) -> tuple[bytes, str]:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(1, ATTEMPTS + 1):
            answer = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **options)
            try:
                return answer["Body"].read(), answer["ETag"]
            except (HTTPClientError, IncompleteReadError):  # botocore does not repeat a read whose body breaks off
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def chunks(self, key: str) -> Iterator[bytes]:
        """The object's bytes in pieces of 1 MiB, whatever its size. Raises ObjectMissing if there is none."""
        with self._errors(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=self._full(key))
            yield from answer["Body"].iter_chunks(CHUNK_BYTES)

    def part(self, key: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the object ends. Raises ObjectMissing if there is none."""
        with self._errors(key):
            return self._read_whole(key, Range=f"bytes={start}-{start + size - 1}")[0]

    def put(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> None:
        """Write unconditionally; a `Path` is streamed, in parts when it is large."""
        with self._errors(key):
            if isinstance(body, bytes):
                self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=body, ContentType=content_type)
            else:
                how = {"ExtraArgs": {"ContentType": content_type}, "Config": transfer_config()}
                self._client.upload_file(str(body), self.bucket, self._full(key), **how)

    def create(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> str:
        """Write only when there is no such object yet (If-None-Match: *); returns its etag.

        A `Path` is streamed, in parts when it is large. Raises Conflict: it exists. Of `bytes`, an object that holds
        these very ones, met after a lost answer, counts as ours; of a `Path`, the caller has to look.
        """
        if isinstance(body, bytes):
            return self._put_if(key, body, content_type, IfNoneMatch="*")
        with self._errors(key):
            return create_from_file(self._client, self.bucket, self._full(key), body, content_type=content_type)

    def claim(self, key: str, body: bytes, *, content_type: str = BINARY) -> bytes:
        """Write only when there is no such object yet, and return what is stored: the first writer decides."""
        try:
            self.create(key, body, content_type=content_type)
        except Conflict:
            return self.get(key)
        return body

    def swap(self, key: str, body: bytes, etag: str, *, content_type: str = BINARY) -> str:
        """Replace the object only while its etag is `etag` (If-Match); returns the new one.

        The body should say who wrote it: after a lost answer, an object with these very bytes counts as ours. Raises
        Conflict if it changed or was deleted since `etag` was read.
        """
        return self._put_if(key, body, content_type, IfMatch=etag)

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self.bucket, Key=self._full(key))
        except ObjectMissing:
            return False
        return True

    def get_json(self, key: str) -> Any:
        """The object parsed as JSON. Raises ObjectMissing if there is none; IntegrityError if it is not JSON."""
        return decode_json(self.get(key), self.uri(key))

    def put_json(self, key: str, value: Any) -> None:
        self.put(key, encode_json(value), content_type=JSON)

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under `prefix`, which ends with a slash or is empty."""
        full = self._full(prefix)
        for page in self._pages(full, Delimiter="/"):
            for entry in page.get("CommonPrefixes", []):
                yield entry["Prefix"].removeprefix(full).rstrip("/")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, page by page, in the order of their keys.

        Folder markers (empty objects that consoles write, with a key that ends with a slash) are left out.
        """
        for page in self._pages(self._full(prefix)):
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(
                        entry["Key"][len(self._full("")) :],
                        entry["Size"],
                        entry["LastModified"],
                        entry["ETag"].strip('"'),
                    )

    def delete(self, keys: Iterable[str]) -> None:
        """Those that do not exist are passed over."""
        pending = iter(keys)
        while batch := [{"Key": self._full(key)} for key in islice(pending, 1000)]:  # DeleteObjects takes so many
            with self._errors(""):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
            for failure in answer.get("Errors", []):
                raise StoreError(f"s3://{self.bucket}/{failure['Key']} could not be deleted: {failure.get('Code')}")

    def download(self, key: str, path: Path) -> None:
        """Stream the object to `path`, in parts when it is large. A failure leaves nothing at `path`. Raises
        ObjectMissing if there is none; FineloopError if the disk is full or not writable."""
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self.bucket, self._full(key), str(path), Config=transfer_config())

    def check(self) -> None:
        """Refuse a store that the registry cannot rely on, before anything is written to it.

        Writes, overwrites and deletes one object under `.check/`. Raises StoreError if unreachable, credentials
        refused, no such bucket, or conditional writes are not honoured.
        """
        next(self.list(".check/"), None)  # unlike HeadBucket, a listing says which of the three went wrong
        key = f".check/{uuid.uuid4().hex}"
        etag = ""

        def write(header: str, body: bytes, condition: str, *, holds: bool) -> None:
            nonlocal etag
            try:
                etag, is_written = self._put_if(key, body, BINARY, **{header.replace("-", ""): condition}), True
            except Conflict:
                stored, etag = self.read(key) or (b"", "")
                is_written = stored == body  # only this check writes this key: our own came twice
            if is_written != holds:
                how = "refuses a write whose condition holds" if holds else "overwrites although the condition fails"
                raise StoreError(
                    f"the store at {self.endpoint} does not honour {header} ({how}), so two runs could take one alias: "
                    "set AWS_ENDPOINT_URL to a store with conditional writes, such as Amazon S3 or SeaweedFS 4.30 or "
                    "newer"
                )

        try:
            write("If-None-Match", b"1", "*", holds=True)
            write("If-None-Match", b"2", "*", holds=False)
            write("If-Match", b"2", '"' + "0" * 32 + '"', holds=False)
            write("If-Match", b"3", etag, holds=True)
        finally:
            with contextlib.suppress(StoreError):
                self.delete([key])

    def _put_if(self, key: str, body: bytes, content_type: str, **condition: str) -> str:
        try:
            with self._errors(key):
                answer = self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._full(key),
                    Body=body,
                    ContentType=content_type,
                    ChecksumAlgorithm="SHA256",
                    **condition,
                )
            return str(answer["ETag"])
        except ObjectMissing as exc:  # If-Match on a deleted object
            raise Conflict(f"{self.uri(key)} was deleted by another writer") from exc
        except Conflict as exc:
            # A retry inside botocore may meet our own write, whose answer was lost on the way.
            refusal: Any = exc.__cause__
            stored = self.read(key) if refusal.response["ResponseMetadata"].get("RetryAttempts") else None
            if stored is None or stored[0] != body:
                raise
            return stored[1]

    def _pages(self, full_prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        with self._errors(""):
            pages = self._client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self.bucket, Prefix=full_prefix, **options)

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _errors(self, key: str) -> contextlib.AbstractContextManager[None]:
        return translated(uri=self.uri(key), endpoint=self.endpoint, bucket_field=self._field)


def open_uri(uri: str, *, field: str = "the s3:// address") -> tuple[Store, str]:
    """A store over the whole bucket that `uri` names, and the key within it; endpoint and credentials as ever.

    For reading what lies outside the registry. `field` names the config field that held `uri`, for error messages.
    Raises UserError if it is no s3:// address.
    """
    bucket, key = split_uri(uri)
    return Store(client_from_environment(), bucket, "", field=field), key


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address. Raises UserError if it is no s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UserError(f"{uri!r} is not an S3 address: write s3://BUCKET/KEY")
    return bucket, key


def encode_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8. Equal values give equal bytes. Raises ValueError if a number is
    NaN or infinite, which JSON cannot say."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode_json(body: bytes, uri: str) -> Any:
    """Parse what `encode_json` or a person wrote. Raises IntegrityError if it is not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        return json.loads(body, parse_constant=refuse)  # NaN and Infinity, which Python alone takes for numbers
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{uri} is not JSON: {exc}") from exc


class ReadOnce(Store):
    """A store that reads its small objects and listings once, for the time that one report takes.

    In a folder that was listed, objects that the listing lacks are not requested. What anybody writes meanwhile is not
    seen. Like any store it may be shared between threads.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store._client, store.bucket, store.prefix, field=store._field)
        self.trusted_keys, self.evaluation_keys = store.trusted_keys, store.evaluation_keys
        self._objects: dict[str, tuple[bytes, str] | None] = {}
        self._listed: dict[str, dict[str, ObjectInfo]] = {}

    def read(self, key: str) -> tuple[bytes, str] | None:
        if key not in self._objects:
            listed = self._listed_at(key)
            self._objects[key] = super().read(key) if listed is None or key in listed else None
        return self._objects[key]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All at once: for folders of a few thousand objects."""
        listed = self._listed_at(prefix)
        if listed is None:
            listed = self._listed[prefix] = {info.key: info for info in super().list(prefix)}
        return (info for key, info in listed.items() if key.startswith(prefix))

    def _listed_at(self, key: str) -> dict[str, ObjectInfo] | None:
        """The cached listing that covers this key or key prefix; None if there is none."""
        return next((infos for prefix, infos in [*self._listed.items()] if key.startswith(prefix)), None)


class ObjectFile(io.RawIOBase):
    """A seekable file over one object, such as Parquet, of which only the parts that are read are requested."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        """`size` is the object's size in a listing."""
        self._store, self._key, self._size, self._place = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Raises ObjectMissing if the object is gone."""
        left = max(0, self._size - self._place)
        size = left if size is None or size < 0 else min(size, left)
        body = self._store.part(self._key, self._place, size) if size else b""
        self._place += len(body)
        return body
