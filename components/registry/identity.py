"""The identity of a version: two of its files, from which its id is made."""

import hashlib
import re
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from components.config.schema import Name
from components.shared.errors import IntegrityError, UserError
from components.store.folders import FileDigest, Manifest, verify
from components.store.store import Store

WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
IDENTITY = (WEIGHTS, ADAPTER_CONFIG)
"""The files that make a version what it is; the others describe it."""
ID_DIGITS = 15
VERSION_PATTERN = re.compile(rf"v[0-9a-f]{{1,{ID_DIGITS}}}")


def version_id(digests: Mapping[str, FileDigest]) -> str:
    """The id of the version with these weights and this adapter config: v and 15 hex digits (60 bits)."""
    identity = "".join(f"{path} {digests[path]['sha256']}\n" for path in IDENTITY)
    return "v" + hashlib.sha256(identity.encode()).hexdigest()[:ID_DIGITS]


def require_identity(store: Store, key: str, manifest: Manifest) -> Manifest:
    """Check the manifest of the version's folder `key`, whose last part is its id, and return it. Raises IntegrityError
    if the manifest lists other weights or another adapter config than the id says."""
    if not set(IDENTITY) <= manifest.files.keys() or version_id(manifest.files) != key.rpartition("/")[2]:
        raise IntegrityError(f"{store.uri(key)} holds another adapter than its id says")
    return manifest


def verify_whole(store: Store, key: str, *, manifest_sha256: str | None = None) -> Manifest:
    """Read every byte of the version's folder `key`; check it against the manifest, and the manifest against the id.
    Raises ObjectMissing if there is no such version; IntegrityError if a file is missing, differs or is not listed, the
    id does not fit, or the manifest's sha256 is not `manifest_sha256`."""
    return require_identity(store, key, verify(store, key, manifest_sha256=manifest_sha256))


TOKENS = "tokens"
"""The subfolder of a dataset for what was made from its records: separate folders, which its manifest does not list."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)


def adapter_key(name: str, *parts: str) -> str:
    """The key of an adapter's folder, or of something in it. Raises UserError if the name is not one that adapter.name
    allows."""
    return "/".join(["adapters", checked_name(name, "adapter name"), *parts])


def version_key(name: str, version: str) -> str:
    """The key of a version's folder."""
    return adapter_key(name, "versions", version)


def checked_name(name: str, what: str) -> str:
    """Check a name and return it. `what` says what it names, for the error. Raises UserError if it has anything but
    lower-case letters, digits, '.', '_' and '-', or is longer than 63 characters."""
    try:
        return _NAME.validate_python(name)
    except ValidationError as exc:
        raise UserError(
            f"{what} {name!r} is not allowed: at most 63 lower-case letters, digits, '.', '_' and '-', "
            "with a letter or digit at either end"
        ) from exc
