"""Three versions for whoever moves an alias between them."""

import pytest

from components.registry.versions import publish_version
from components.store.store import Store


@pytest.fixture
def versions(store: Store) -> list[str]:
    """Three published versions of the adapter icd."""
    weights = (b"one", b"two", b"three")
    return [
        publish_version(
            store, "icd", {"adapter_model.safetensors": body, "adapter_config.json": b"{}"}, lineage={"run_id": "r0"}
        ).version
        for body in weights
    ]
