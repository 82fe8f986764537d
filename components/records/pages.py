"""What the registry's pages keep beside them: the list of adapters, which each run writes its own entry of."""

import contextlib

from components.records.runs import PAGES
from components.shared.errors import FineloopError
from components.store.store import Store

LISTED = f"{PAGES}index.json"
"""An entry for each adapter: read in one request, and no part of the registry."""


def forget(store: Store, name: str) -> None:
    """Have the next run, of whichever adapter, read this one's entry anew: a person has moved its alias.

    The move stands, so what the store refuses here is no error.
    """
    with contextlib.suppress(FineloopError):
        listed = store.get_json(LISTED)
        if isinstance(listed, dict) and listed.pop(name, None):
            store.put_json(LISTED, listed)
