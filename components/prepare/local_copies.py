"""Sources as local files: those in S3 and on a hub are fetched, the next few while one is read."""

import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from components.prepare import hub
from components.prepare.buckets import Buckets
from components.prepare.sources import EXAMPLES, Source

if TYPE_CHECKING:
    from components.store.store import Store

AHEAD = 4
ONE_REQUEST_BYTES = 2**23
"""Most bytes of an object to fetch with one request: boto3's download asks for its size first, and starts threads."""


def local_copies(sources: Sequence[Source]) -> Iterator[tuple[Source, Path | None]]:
    """Yield each source in order with the path of its local file; None for the example. A file that was fetched from S3
    is removed as soon as the next source is asked for.

    Raises:
        StoreError: an s3:// source cannot be read.
        DataError: a hub does not give one.
    """
    buckets = Buckets()
    pending: deque[tuple[Source, Future[Path | None]]] = deque()
    with tempfile.TemporaryDirectory(prefix="fineloop-source-") as scratch, ThreadPoolExecutor(AHEAD) as pool:

        def fetch(number: int, source: Source) -> Future[Path | None]:
            if source.name.startswith("s3://"):
                store, key = buckets.open(source.name)
                path = Path(scratch, str(number), Path(key).name)
                return pool.submit(_downloaded, store, key, path, source.size_bytes)
            if hub.is_address(source.name):
                return pool.submit(hub.fetched, source.name)
            found: Future[Path | None] = Future()
            found.set_result(None if source.name in EXAMPLES else Path(source.name))
            return found

        try:
            for number, source in enumerate(sources):
                pending.append((source, fetch(number, source)))
                if len(pending) > AHEAD:
                    yield from _next(pending, Path(scratch))
            while pending:
                yield from _next(pending, Path(scratch))
        finally:
            pool.shutdown(cancel_futures=True)


def _next(pending: "deque[tuple[Source, Future[Path | None]]]", scratch: Path) -> Iterator[tuple[Source, Path | None]]:
    source, found = pending.popleft()
    path = found.result()
    yield source, path
    if path is not None and path.is_relative_to(scratch):
        path.unlink()


def _downloaded(store: "Store", key: str, path: Path, size: int) -> Path:
    if size > ONE_REQUEST_BYTES:
        store.download(key, path)
    else:
        body = store.get(key)
        path.parent.mkdir()
        path.write_bytes(body)
    return path
