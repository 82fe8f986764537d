"""The list of adapters that is kept beside the registry's pages. Each run writes its own adapter's entry."""

import contextlib

from components.records.runs import PAGES
from components.shared.errors import FineloopError
from components.store.store import Store

LISTED = f"{PAGES}index.json"
"""The key of the list, with an entry for each adapter: it is read in one request, and is not part of the registry."""


def forget(store: Store, name: str) -> None:
    """Remove the adapter's entry, as a person has moved its alias: the next run of any adapter then reads it again.

    The move stands, so that an error of the store is ignored here.
    """
    with contextlib.suppress(FineloopError):
        listed = store.get_json(LISTED)
        if isinstance(listed, dict) and listed.pop(name, None):
            store.put_json(LISTED, listed)
