"""Three versions for whoever moves an alias between them."""

import pytest

from components.store.store import Store
from tests.components.registry.adapters import published


@pytest.fixture
def versions(store: Store) -> list[str]:
    """Three published versions of the adapter icd."""
    return [published(store, body, run_id="r0").version for body in (b"one", b"two", b"three")]
