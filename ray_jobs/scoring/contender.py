"""The models that an evaluation compares."""

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
    """The run's config, with the base and the method that this model was trained with."""
    version: Version | None
    """The adapter's version; None for the base alone."""
    base_identity: Mapping[str, str]
    """Identity of the base that the adapter was trained on; for the base alone, of the candidate's base."""
    stands_on_sha256: str = ""
    """sha256 of the manifest of the adapter's own base, as `Recorded` has it."""
    published_sha256: str = ""
    """sha256 of the manifest that this run's own training published; a trusted key signs it once the gate lets it pass.
    """
    alike: frozenset[str] = frozenset()
    """Labels that only their writing tells apart in the records that it is measured on."""


def of_version(role: Role, config: RunConfig, store: Store, version: str) -> Contender:
    """The contender for a version of the config's adapter, with the base and the method of its own run.

    Raises:
        ObjectMissing: there is no such version.
        IntegrityError: its lineage is damaged.
        ConfigError: this release cannot run it.
    """
    found = resolve(store, f"{config.adapter.name}@{version}")
    theirs = recorded.read(config, store, found)
    return Contender(role, theirs.config, found, theirs.base_identity, theirs.stands_on_sha256)
