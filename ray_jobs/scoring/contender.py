"""A model of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.config.schema import RunConfig
from components.records.steps import Role
from components.registry.versions import Version, resolve
from components.store.store import Store
from ray_jobs.adapters import recorded


@dataclass(frozen=True)
class Contender:
    """A model to measure: the base alone, or an adapter on the base that it was trained on."""

    role: Role
    config: RunConfig
    """The run's, with the base and the method that this model was trained with."""
    version: Version | None
    base_identity: Mapping[str, str]
    """Of the base that the adapter was trained on; of the base alone, what the candidate was."""
    published_sha256: str = ""
    """Of the manifest that this run's own training published: a trusted key signs it once the gate has let it pass."""
    dataset_uri: str = ""
    """Of the records that it is measured on, beside which a training may have left their tokens."""


def of_version(role: Role, config: RunConfig, store: Store, version: str) -> Contender:
    """A version of the config's adapter, on the base and with the method of its own run.

    Raises:
        ObjectMissing: there is no such version.
        IntegrityError: its lineage is damaged.
        ConfigError: this release cannot run it.
    """
    found = resolve(store, f"{config.adapter.name}@{version}")
    theirs = recorded.read(config, store, found)
    return Contender(role, theirs.config, found, theirs.base_identity)
