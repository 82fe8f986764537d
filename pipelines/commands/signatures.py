"""`fineloop adapters sign` and `fineloop adapters revoke`."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry

if TYPE_CHECKING:
    from components.registry.signing import Signer

REFERENCE = "NAME[@ALIAS|@VERSION]"


def add(verbs: Any, *, reference: str) -> None:
    """Add both to the group; `reference` says how a version is named."""
    key = "with the Ed25519 key in FINELOOP_SIGNING_KEY or the file in FINELOOP_SIGNING_KEY_FILE"
    sign = add_command(
        verbs,
        "sign",
        _sign,
        does=f"Sign that a version may hold an alias, {key}.",
        more="With --held, sign everything that an alias of the adapter holds or a rollback may need; use it "
        "before you remove a key.",
        example="fineloop adapters sign icd10-chapters@v3f2",
    )
    which = sign.add_mutually_exclusive_group(required=True)
    which.add_argument("reference", nargs="?", metavar=REFERENCE, help=reference)
    which.add_argument("--held", metavar="NAME", help="all that is needed of this adapter, each for its alias")
    sign.add_argument("--alias", default="", metavar="ALIAS", help="default: that of the reference, else production")
    revoke = add_command(
        verbs,
        "revoke",
        _revoke,
        does=f"Sign, {key}, that a version must not be used any more.",
        more="Registries that trust the key no longer fetch it or move an alias to it, whoever else signed it. An "
        "alias that points at it stays, for a rollback.",
        example="fineloop adapters revoke icd10-chapters@v3f2 --reason 'it was trained on the wrong data'",
    )
    revoke.add_argument("reference", metavar=REFERENCE, help=reference)
    revoke.add_argument("--reason", required=True, metavar="TEXT", help="signed with it")
    for parser in (sign, revoke):
        add_config(parser)
        add_home(parser)


def _sign(options: argparse.Namespace) -> Answer:
    from components.registry import signing
    from components.registry.aliases import PRODUCTION, sign_held
    from components.registry.versions import resolve

    key = _key()
    public = signing.public_text(key)
    with opened_registry(options) as store:
        if options.held:
            signed = sign_held(store, options.held, key)
            lines = [f"{each.version} {f'for {each.alias}' if each.alias else 'as revoked'}" for each in signed]
            body = {"name": options.held, "signed": [each._asdict() for each in signed], "public_key": public}
            return Answer(body, "\n  ".join([f"of {options.held}, {len(lines)} signed by {public}", *lines]))
        version = resolve(store, options.reference)
        alias = options.alias or version.asked_as or PRODUCTION
        uri = signing.sign(store, version.name, version.version, key, alias=alias)
    one = {"name": version.name, "version": version.version, "alias": alias, "signature_uri": uri, "public_key": public}
    return Answer(one, f"{version.name} {version.version} is signed for {alias} by {public}")


def _revoke(options: argparse.Namespace) -> Answer:
    from components.registry import signing
    from components.registry.versions import resolve
    from components.shared.errors import UserError

    key = _key()
    public = signing.public_text(key)
    with opened_registry(options) as store:
        if public not in store.trusted_keys:
            raise UserError(f"registry.trusted_keys lacks {public}, so its revocations would be ignored: add it there")
        version = resolve(store, options.reference)
        uri = signing.revoke(store, version.name, version.version, key, reason=options.reason)
    body = {"name": version.name, "version": version.version, "statement_uri": uri, "public_key": public}
    held = f"; {', '.join(version.aliases)} still at it, so roll back" if version.aliases else ""
    return Answer({**body, "aliases": list(version.aliases)}, f"{version.name} {version.version} is revoked{held}")


def _key() -> "Signer":
    from components.registry import signing
    from components.shared.errors import UserError

    key = signing.signer_from(os.environ)
    if key is None:
        raise UserError(f"no key to sign with: set {signing.KEY_FILE_VARIABLE} to a file with a private key in PEM")
    return key
