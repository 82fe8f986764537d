"""An object as a file of which only the requested parts are read: a column of a Parquet file, not the whole."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.store.store import Store


class ObjectFile(io.RawIOBase):
    """A seekable file over one object; each read is one request."""

    def __init__(self, store: "Store", key: str, size: int) -> None:
        """Open the object; `size` is its size in a listing."""
        self._store, self._key, self._size, self._place = store, key, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position at which the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, fewer at the end; -1 and None read to the end.

        Raises:
            ObjectMissing: the object is gone.
        """
        left = max(0, self._size - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        body = self._store.part(self._key, self._place, wanted) if wanted else b""
        self._place += len(body)
        return body
