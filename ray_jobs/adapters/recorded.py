"""What is read of a version's lineage to run it: the base and method of its own run, and the device they were used on.

A lineage records and permits nothing: the caller's config decides whether a base's own code may run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.versions import Version, read_lineage
from components.shared.errors import IntegrityError
from components.store.store import Store


@dataclass(frozen=True)
class Recorded:
    """A version's own run, as far as it is needed to run the version."""

    config: RunConfig
    """The caller's, with the base and the method of the version's run."""
    base_identity: Mapping[str, str]
    """For `base_model.resolve`: what the version was trained on."""
    dataset_uri: str
    max_new_tokens: int | None
    """The length of an answer that its run settled on."""


def read(config: RunConfig, store: Store, version: Version) -> Recorded:
    """Read it, verified against the version's manifest.

    Raises:
        ConfigError: the base or the method is none that this release can use, or the base has code of its own and
            `config` does not allow that of this base.
        IntegrityError: the lineage is not the one that was published, or lacks one of these.
    """
    lineage: Any = read_lineage(store, version)
    origin = f"lineage of {version.uri}"
    try:
        stored, identity, dataset_uri = lineage["config"], lineage["base"]["identity"], lineage["dataset"]["uri"]
        max_new_tokens = stored.get("evaluate", {}).get("max_new_tokens")
        identity = {str(key): str(value) for key, value in identity.items()}
    except (KeyError, TypeError, AttributeError) as exc:
        raise IntegrityError(f"{origin} does not say what the version was made from: {exc}") from exc
    own = config_file.with_stored(config, stored, origin=origin, commit=identity.get("commit", ""))
    return Recorded(own, identity, str(dataset_uri), max_new_tokens)
