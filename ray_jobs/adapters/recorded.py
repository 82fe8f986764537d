"""Reading a version's lineage in order to run the version: the base, method and dataset of its training run.

A lineage only records, it permits nothing: the caller's config decides whether a base's own code may run.
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
    """The parts of a version's training run that are needed to run the version."""

    config: RunConfig
    """The caller's config, with the base and the method of the version's run."""
    base_identity: Mapping[str, str]
    """Identity of the base that the version was trained on, for `base_model.resolve`."""
    stands_on_sha256: str
    """sha256 of the manifest of the version's own base, for `own_base.find`; empty where it has none."""
    dataset_uri: str
    max_new_tokens: int | None
    """Maximum number of tokens in an answer, as chosen by the version's run; None where the lineage has none."""


def read(config: RunConfig, store: Store, version: Version) -> Recorded:
    """Read the version's lineage, verified against its manifest.

    Raises:
        ConfigError: this release does not support the method, or the base has code that `config` does not allow.
        IntegrityError: the lineage differs from the published one, or lacks one of these fields.
    """
    lineage: Any = read_lineage(store, version)
    origin = f"lineage of {version.uri}"
    try:
        stored, identity, dataset_uri = lineage["config"], lineage["base"]["identity"], lineage["dataset"]["uri"]
        max_new_tokens = stored.get("evaluate", {}).get("max_new_tokens")
        identity = {str(key): str(value) for key, value in identity.items()}
        stands_on_sha256 = str(lineage.get("recipe", {}).get("stands_on_sha256", ""))
    except (KeyError, TypeError, AttributeError) as exc:
        raise IntegrityError(f"{origin} does not say what the version was made from: {exc}") from exc
    own = config_file.with_stored(config, stored, origin=origin, commit=identity.get("commit", ""))
    return Recorded(own, identity, stands_on_sha256, str(dataset_uri), max_new_tokens)


def of_run(config: RunConfig, store: Store, version: Version) -> Recorded:
    """Read the lineage of the candidate of the run that has this config. Raises as `read`; IntegrityError: it names
    another base or chat format than the config, which alone says what a candidate is measured on."""
    theirs = read(config, store, version)
    for field in ("base", "revision", "thinking"):
        ours, its = getattr(config.model, field), getattr(theirs.config.model, field)
        if ours != its:
            raise IntegrityError(
                f"lineage of {version.uri} has model.{field} = {its!r}, and the config of its run has {ours!r}: a "
                "candidate is measured on the base of its run alone, so train it again"
            )
    return theirs
