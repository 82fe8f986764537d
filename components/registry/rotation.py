"""Signs with a new key, before an old one may go, all versions that aliases hold or that a rollback may return to."""

from typing import NamedTuple

from components.registry import aliases, signing
from components.registry.names import adapter_key, version_key
from components.store import folders
from components.store.store import Store


class Signed(NamedTuple):
    """A statement signed by the key: the alias that the version may hold, or an empty one if it revokes the version."""

    version: str
    alias: str
    signature_uri: str


def sign_held(store: Store, name: str, key: signing.Signer) -> list[Signed]:
    """Sign every version of the adapter that is needed, and repeat trusted keys' revocations of stored versions.

    Raises:
        ObjectMissing: a version is gone.
        IntegrityError: a version or the log is damaged; the versions before it are signed.
    """
    signed = []
    for version in sorted(store.folders(adapter_key(name, "signatures/"))):
        manifest = folders.find_manifest(store, version_key(name, version))
        said = manifest and signing.said(store, name, version, manifest.sha256, store.trusted_keys)
        if said and said.revoked_by:
            signed.append(Signed(version, "", signing.revoke(store, name, version, key, reason=said.reason)))
    revoked = {each.version for each in signed}
    for pointer in aliases.list_aliases(store, name):
        for version, sha256 in aliases.needed(store, name, pointer).items():
            gone_since = signing.said(store, name, version, sha256, store.trusted_keys).revoked_by
            if version not in revoked and not gone_since:
                uri = signing.sign(store, name, version, key, alias=pointer.alias, manifest_sha256=sha256)
                signed.append(Signed(version, pointer.alias, uri))
    return signed
