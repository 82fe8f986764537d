"""The small objects of an adapter, byte for byte as one listing of it shows them, in two or three requests.

adapters/<name>/index/documents.json.gz holds the objects read before. An entry counts only if the listing gives the MD5
of exactly its bytes as the object's etag; otherwise the object is read, as all are if the store encrypts with its own
keys (SSE-KMS). So gc may decide by them: write access to the index can slow gc down, and nothing else.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from components.registry.index import Index
from components.registry.names import adapter_key
from components.store.store import ObjectInfo, Store

WHAT = "documents"
MOST_INDEXED_BYTES = 64 * 2**20
"""Maximum total size of an adapter's indexed documents; above it no index is kept, and each document is read."""
TEXT = "latin-1"
"""An encoding that turns any bytes into text, and back without loss."""


def documents(store: Store, name: str, objects: Iterable[ObjectInfo]) -> dict[str, bytes]:
    """Return the content of these objects of the adapter, by key; objects that are gone are left out."""
    folder = adapter_key(name, "")
    infos = {info.key.removeprefix(folder): info for info in objects}

    def text(file: str) -> str | None:
        found = store.read(f"{folder}{file}")
        return found[0].decode(TEXT) if found else None

    is_small = sum(info.size for info in infos.values()) <= MOST_INDEXED_BYTES
    index = Index(store, name, WHAT, worth=0 if is_small else len(infos))
    known = index.of(infos, text, is_so=lambda file, each: _is_of(each, infos[file]))
    index.keep()
    return {f"{folder}{file}": each.encode(TEXT) for file, each in known.items()}


def _is_of(text: Any, info: ObjectInfo) -> bool:
    if not isinstance(text, str) or len(text) != info.size:
        return False
    try:
        return hashlib.md5(text.encode(TEXT), usedforsecurity=False).hexdigest() == info.etag
    except UnicodeEncodeError:  # no bytes have that text
        return False
