"""A version trained again from its lineage: the config for that, and the comparison with the first one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.erasures import require_none_erased
from components.registry.versions import Version, read_lineage
from components.shared.errors import ConfigError, DataError, IntegrityError, ObjectMissing
from components.store import folders
from pipelines.local.side_by_side import Compared, compare, read

if TYPE_CHECKING:
    from components.store.store import Store

PACKAGES = ("bitsandbytes", "deepspeed", "fineloop", "peft", "torch", "transformers")
COMPUTING = ("code.commit", "image", "python", *(f"packages.{name}" for name in PACKAGES))
"""Keys of the lineage's environment on which numbers depend."""


@dataclass(frozen=True)
class Recipe:
    """What a version was trained from."""

    config: RunConfig
    dataset_uri: str
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Reproduced:
    """A version and the one that was trained again."""

    version: str
    found: str
    differs: Mapping[str, Sequence[Any]]
    """Differences between what the two ran on: key to values then and now."""
    compared: Compared | None
    """The comparison of the new version with the first; None if they are the same bytes."""

    @property
    def is_same(self) -> bool:
        """Whether weights and adapter config are equal byte by byte: a version is named after them."""
        return self.version == self.found

    @property
    def agrees(self) -> bool:
        """Whether every metric's gain has zero between its bounds."""
        return self.compared is None or all(each.lower <= 0 <= each.upper for each in self.compared.gains.values())


def recipe(store: "Store", version: Version, config: RunConfig, overrides: Sequence[str], *, note: str) -> Recipe:
    """Return what trains the version again: its run's config, in the registry of `config`, with `overrides`.

    Raises:
        DataError: a record that it was trained on was erased.
        ConfigError: its base comes with code, or it was measured by a function, and `config` does not allow that.
        IntegrityError: the lineage is not the one that was published, or names no dataset.
        ObjectMissing: the dataset is gone.
    """
    lineage: Any = read_lineage(store, version)
    origin = f"lineage of {version.uri}"
    try:
        stored, dataset_uri, identity = lineage["config"], lineage["dataset"]["uri"], lineage["base"]["identity"]
    except (KeyError, TypeError) as exc:
        raise IntegrityError(f"{origin} does not say what the version was made from: {exc}") from exc
    if folders.find_manifest(store, store.key(dataset_uri).rstrip("/")) is None:
        raise ObjectMissing(f"{dataset_uri}, which {version.name} {version.version} was trained on, is gone")
    try:
        require_none_erased(store, dataset_uri)
    except DataError as exc:
        raise DataError(f"{version.name} {version.version} cannot be reproduced: {exc}") from exc
    own = config_file.validate(stored, overrides, origin=origin)
    permitted = config_file.with_stored(config, stored, origin=origin, commit=str(identity.get("commit", "")))
    if own.model.trust_remote_code and not permitted.model.trust_remote_code:
        raise ConfigError(f"{origin}: model.trust_remote_code is not this config's to allow")
    if unknown := [name for name in own.metrics if ":" in name and name not in config.metrics]:
        raise ConfigError(f"{origin}: it was measured by {unknown[0]}: allow that with evaluate.metrics of this config")
    revision = {"revision": identity["commit"]} if identity.get("commit") else {}
    changed = {
        "registry": config.registry,
        "adapter": own.adapter.model_copy(update={"note": note}),
        "model": own.model.model_copy(update=revision),
        "train": own.train.model_copy(update=_start(lineage)),
        "tune": own.tune.model_copy(update={"when": "never"}),  # the rate that was found is the recorded one
    }
    return Recipe(own.model_copy(update=changed), dataset_uri, lineage)


def compared(store: "Store", first: Version, found: str, made_from: Recipe) -> Reproduced:
    """Return the version trained again, with its comparison with the first one.

    Raises:
        IntegrityError: what the runs left is malformed.
    """
    again = f"{first.name}@{found}"
    if found == first.version:
        return Reproduced(first.version, found, {}, None)
    from components.registry.versions import resolve

    other = read_lineage(store, resolve(store, again))
    then, now = (_computing(each) for each in (made_from.lineage, other))
    differs = {key: [then.get(key), now.get(key)] for key in then if then.get(key) != now.get(key)}
    beside = compare(read(store, f"{first.name}@{first.version}"), read(store, again))
    return Reproduced(first.version, found, differs, beside)


def _start(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `train` keys for where the training began: at a version, which the lineage names by its address, or
    at the base, of which no share can stay in what it publishes."""
    for uri in lineage.get("parents", []):
        if "/versions/" in uri:
            name, _, version = uri.rstrip("/").rpartition("/adapters/")[2].partition("/versions/")
            return {"start_from": f"{name}@{version}"}
    return {"start_from": "base", "start_share": 0.0}


def _computing(lineage: Mapping[str, Any]) -> dict[str, Any]:
    environment = lineage.get("environment", {})
    found: dict[str, Any] = {key: _at(environment, key.split(".")) for key in COMPUTING} | {
        f"hardware.{key}": value for key, value in lineage.get("hardware", {}).items()
    }
    return {**found, "base": lineage.get("base", {}).get("identity")}


def _at(table: Any, path: Sequence[str]) -> Any:
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    return table
