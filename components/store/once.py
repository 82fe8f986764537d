"""A store whose objects are read once, however many callers ask for them."""

from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from components.store.store import BINARY, ObjectInfo, Store


class ReadOnce(Store):
    """A store that caches its small objects and listings once they are read, for the time that one report takes.

    In a folder that was listed, objects that the listing lacks are not requested. What is written through this store is
    read anew; what others write meanwhile is not seen. Like any store it may be shared between threads.
    """

    def __init__(self, store: Store) -> None:
        """Wrap a store, with an empty cache."""
        super().__init__(store._client, store.bucket, store.prefix, field=store._field)
        self.trusted_keys, self.evaluation_keys = store.trusted_keys, store.evaluation_keys
        self._objects: dict[str, tuple[bytes, str] | None] = {}
        self._listed: dict[str, dict[str, ObjectInfo]] = {}
        self._folders: dict[str, list[str]] = {}

    def read(self, key: str) -> tuple[bytes, str] | None:
        """As `Store.read`."""
        if key not in self._objects:
            listed = self._listed_at(key)
            self._objects[key] = super().read(key) if listed is None or key in listed else None
        return self._objects[key]

    def folders(self, prefix: str) -> Iterator[str]:
        """As `Store.folders`, all at once."""
        if prefix not in self._folders:
            self._folders[prefix] = [*super().folders(prefix)]
        return iter(self._folders[prefix])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As `Store.list`, all at once: for folders of a few thousand objects."""
        listed = self._listed_at(prefix)
        if listed is None:
            listed = self._listed[prefix] = {info.key: info for info in super().list(prefix)}
        return (info for key, info in listed.items() if key.startswith(prefix))

    def list_first(self, prefix: str, *folders: str) -> None:
        """Fill the listings of `folders` by one listing of `prefix`, in which little should come before them."""
        last = max(folders)
        until = takewhile(lambda info: info.key < last or info.key.startswith(last), super().list(prefix))
        found = {info.key: info for info in until}
        for folder in folders:
            self._listed[folder] = {key: info for key, info in found.items() if key.startswith(folder)}

    def put(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> None:
        """As `Store.put`."""
        self._forget(key)
        super().put(key, body, content_type=content_type)

    def create(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> str:
        """As `Store.create`."""
        self._forget(key)
        return super().create(key, body, content_type=content_type)

    def swap(self, key: str, body: bytes, etag: str, *, content_type: str = BINARY) -> str:
        """As `Store.swap`."""
        self._forget(key)
        return super().swap(key, body, etag, content_type=content_type)

    def delete(self, keys: Iterable[str]) -> None:
        """As `Store.delete`."""
        gone = [*keys]
        for key in gone:
            self._forget(key)
        super().delete(gone)

    def _listed_at(self, key: str) -> dict[str, ObjectInfo] | None:
        """Return the cached listing that covers this key or key prefix; None if there is none."""
        return next((found for prefix, found in [*self._listed.items()] if key.startswith(prefix)), None)

    def _forget(self, key: str) -> None:
        self._objects.pop(key, None)
        for known in (self._listed, self._folders):
            for prefix in [each for each in known if key.startswith(each)]:
                del known[prefix]
