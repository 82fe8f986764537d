"""The small objects of an adapter, byte for byte as one listing of it shows them, at two requests or three.

adapters/<name>/index/documents.json.gz holds those that were read before. One of them counts only where the listing
gives the MD5 of just these bytes as the object's etag; else it is read, as all are where the store encrypts with keys
of its own (SSE-KMS). So gc may decide by them: whoever may write the index may slow it down, and nothing else.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from components.registry.index import READS_AT_ONCE, remembered
from components.registry.names import adapter_key
from components.store.store import ObjectInfo, Store

WHAT = "documents"
MOST_INDEXED_BYTES = 64 * 2**20
"""Of an adapter's documents in all: of more than these, no index is kept, and each is read."""
TEXT = "latin-1"
"""Any bytes are a text in it, and come back from it as they were."""


def documents(store: Store, name: str, objects: Iterable[ObjectInfo]) -> dict[str, bytes]:
    """Key to content of those objects, all of the adapter; those that are gone since are left out."""
    infos = {info.key: info for info in objects}

    def read(key: str) -> bytes | None:
        found = store.read(key)
        return found[0] if found else None

    if sum(info.size for info in infos.values()) > MOST_INDEXED_BYTES:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = zip(infos, pool.map(read, infos), strict=True)
            return {key: body for key, body in found if body is not None}
    folder = adapter_key(name, "")

    def text(file: str) -> str | None:
        body = read(f"{folder}{file}")
        return None if body is None else body.decode(TEXT)

    files = [key.removeprefix(folder) for key in infos]
    known = remembered(
        store, name, WHAT, files, text, is_so=lambda file, each: _is_of(each, infos[f"{folder}{file}"]), always=True
    )
    return {f"{folder}{file}": each.encode(TEXT) for file, each in known.items()}


def _is_of(text: Any, info: ObjectInfo) -> bool:
    if not isinstance(text, str) or len(text) != info.size:
        return False
    try:
        return hashlib.md5(text.encode(TEXT), usedforsecurity=False).hexdigest() == info.etag
    except UnicodeEncodeError:  # no bytes have that text
        return False
