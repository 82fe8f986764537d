"""The start of a training: the base alone, or a version of the same shape on the same base."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.records import runs
from components.registry.aliases import read_alias
from components.registry.event_log import require_published
from components.registry.identity import WEIGHTS, require_identity, version_key
from components.registry.signing import require_signed
from components.registry.versions import Version, read_lineage, resolve
from components.shared.errors import ConfigError, IntegrityError
from components.store import folders
from components.store.store import JSON, Store, decode_json, encode_json
from ray_jobs.adapters import recorded
from ray_jobs.base import base_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

BASE, PRODUCTION = "base", "production"


def choose(config: RunConfig, store: Store, run_id: str, base: base_model.Base) -> Version | None:
    """The version that `train.start_from` names; None for the base alone.

    Where nothing is in production yet, "production" means the base. `base` is the base that this run trains on.

    Raises:
        ConfigError: the version was trained with another method, rank or layers.
        UserError: the reference is malformed, or fits several versions.
        ObjectMissing: there is no such version.
        IntegrityError: it stands on another base, or its lineage is damaged.
    """
    wanted = config.train.start_from
    if wanted == BASE:
        return None
    if wanted == PRODUCTION:
        pointer = read_alias(store, config.adapter.name, config.adapter.alias)
        wanted = f"{config.adapter.name}@{pointer.version}" if pointer else ""
    found = resolve(store, wanted) if wanted else None
    first = encode_json({"version": f"{found.name}@{found.version}" if found else ""})
    key = runs.run_key(run_id, runs.START)  # the first attempt decides for all later ones, even if the alias has moved
    chosen = decode_json(store.claim(key, first, content_type=JSON), store.uri(key))["version"]
    if not chosen:
        return None
    version = resolve(store, chosen)
    theirs = recorded.read(config, store, version)
    if base.is_known:  # otherwise the workers compare it, when they read it, with the identity from `base_of`
        base_model.require_same(base, theirs.base_identity)
    _require_same_shape(config, theirs.config, version)
    return version


def base_of(config: RunConfig, store: Store, start: Version, base: base_model.Base) -> base_model.Base:
    """The base with the identity that it must have in a training that starts from version `start`."""
    return base if base.is_known else replace(base, identity=dict(recorded.read(config, store, start).base_identity))


def weights(store: Store, version: Version) -> dict[str, "torch.Tensor"]:
    """Load a version's adapter weights, with the same verification of digests and signatures as `pull_version`.

    Raises:
        IntegrityError: they differ from the version's manifest, the manifest is not the published one, or no trusted
            key signed it.
    """
    from safetensors.torch import load

    key = version_key(version.name, version.version)
    manifest = require_identity(store, key, folders.read_manifest(store, key))
    require_published(store, version.name, version.version, manifest)
    require_signed(store, version.name, version.version, manifest.sha256)
    body = store.get(f"{key}/{WEIGHTS}")
    if folders.digest_of(body) != manifest.files[WEIGHTS]:
        raise IntegrityError(f"{store.uri(key)}/{WEIGHTS} is not the one that the manifest lists")
    return dict(load(body))


def flops_of(store: Store, version: Version | None) -> float | None:
    """FLOPs of the version's training and of all trainings that it builds on; None where one of them is unknown, 0
    without a version."""
    if version is None:
        return 0.0
    more = read_lineage(store, version).get("training", {}).get("more", {})
    found = (more.get("usage") or {}).get("flops_with_parents")
    return None if found is None else float(found)


def begin(adapted: "PeftModel", start: Mapping[str, "torch.Tensor"]) -> None:
    """Load a version's weights into a fresh adapter, including DoRA's magnitudes and VeRA's matrices.

    Raises:
        ConfigError: they belong to other layers, or have other shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if differing := sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name)):
        raise ConfigError(
            f"train.start_from: the version adapts other layers than this run, such as {differing[0]} "
            f"({theirs.get(differing[0])}, here {shapes.get(differing[0])}): set method.target_modules as it had them"
        )
    set_peft_model_state_dict(adapted, dict(start))


def _require_same_shape(config: RunConfig, theirs: RunConfig, version: Version) -> None:
    ours, other = _shape(config), _shape(theirs)
    for field, value in ours.items():
        if other[field] != value:
            raise ConfigError(
                f"train.start_from = {config.train.start_from!r}: {version.name} {version.version} was trained with "
                f"method.{field} = {other[field]!r}, and this run has {value!r}: set it so, or start from the base"
            )


def _shape(config: RunConfig) -> dict[str, Any]:
    """The settings of the method that a version's weights depend on, by the config's names."""
    method = config.method
    row = {axis: getattr(method.row, axis) for axis in ("adapter", "scaling", "init", "base")}
    return {**row, "rank": method.r, "alpha": method.lora_alpha, "target_modules": method.target_modules}
