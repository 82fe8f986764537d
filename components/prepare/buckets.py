"""The S3 buckets that hold data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.store.store import Store


class Buckets:
    """Buckets by their name. Each is opened once, because a client costs a tenth of a second."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}

    def open(self, uri: str) -> "tuple[Store, str]":
        """The bucket that an s3:// address names, and the key within it.

        Raises:
            UserError: it is no s3:// address.
        """
        from components.store.store import open_uri, split_uri

        bucket, key = split_uri(uri)
        if bucket not in self._stores:
            self._stores[bucket], _ = open_uri(uri, field="data.source")
        return self._stores[bucket], key
