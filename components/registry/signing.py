"""Signatures of versions: an in-toto statement in a DSSE envelope, signed with Ed25519.

The statement is SLSA's verification summary (slsa.dev/spec/v1.0/verification_summary): of the version, by the sha256 of
its manifest, that it passed the policy of a decision, having looked at its lineage and evaluation. It names no time, so
that signing again gives the same bytes, in adapters/<name>/signatures/<version>/<first digits of the key's id>-<of the
statement>.dsse.json. The private key comes from the environment of whoever signs, and goes nowhere; or a KMS keeps it.
"""

import base64
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.registry import folders, runs
from components.registry.identity import verify_whole
from components.registry.names import adapter_key, version_key
from components.registry.records import Decision, Evaluation
from components.registry.store import JSON, Store, encode_json
from components.shared.errors import IntegrityError, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KEY_VARIABLE, KEY_FILE_VARIABLE = "FINELOOP_SIGNING_KEY", "FINELOOP_SIGNING_KEY_FILE"
SIGNER_VARIABLE = "FINELOOP_SIGNER"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/verification_summary/v1"
LINEAGE = "lineage.json"
SCHEME = "ed25519:"
DIGITS = 12


class Signer(Protocol):
    """An Ed25519 key that signs: cryptography's `Ed25519PrivateKey`, or one that a KMS keeps, by the same methods."""

    def sign(self, data: bytes, /) -> bytes:
        """The signature, 64 bytes."""

    def public_key(self) -> "Ed25519PublicKey":
        """What verifies it."""


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """What is signed of an envelope: DSSE's PAE (github.com/secure-systems-lab/dsse, protocol.md, v1)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def signer_from(environment: Mapping[str, str]) -> Signer | None:
    """What to sign with, or None: what the function that FINELOOP_SIGNER names as PACKAGE.MODULE:FUNCTION gives, else
    the key, PEM in FINELOOP_SIGNING_KEY or in the file that FINELOOP_SIGNING_KEY_FILE names.

    Raises:
        UserError: there is no such function, or the key cannot be read, or is no unencrypted Ed25519 private key.
    """
    if named := environment.get(SIGNER_VARIABLE, ""):
        module, _, function = named.partition(":")
        try:
            signer: Signer = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError, ValueError) as exc:
            raise UserError(f"{SIGNER_VARIABLE} is {named!r}, and has to be PACKAGE.MODULE:FUNCTION: {exc}") from exc
        return signer
    return _key_from(environment)


def _key_from(environment: Mapping[str, str]) -> Signer | None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path, text = environment.get(KEY_FILE_VARIABLE, ""), environment.get(KEY_VARIABLE, "")
    if not path and not text:
        return None
    variable = KEY_VARIABLE if text else KEY_FILE_VARIABLE
    try:
        key = load_pem_private_key(text.encode() if text else Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as exc:
        raise UserError(f"{variable} gives no key ({type(exc).__name__}): {_how_to_make_one()}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{variable} gives a key of another kind than Ed25519: {_how_to_make_one()}")
    return key


def public_text(key: Signer) -> str:
    """The public key as registry.trusted_keys takes it."""
    return SCHEME + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def key_id(public: str) -> str:
    """What an envelope calls a key: the sha256 of its 32 bytes."""
    return hashlib.sha256(base64.b64decode(public.removeprefix(SCHEME))).hexdigest()


def sign(store: Store, name: str, version: str, key: Signer, *, decision: Decision | None = None) -> str:
    """Read the version whole, sign it and return the signature's URI. Signing again changes nothing.

    `decision` is what it is signed for; None when a person vouches for it.

    Raises:
        ObjectMissing: there is no such version.
        IntegrityError: it is damaged, or what the key signed is not what its public key verifies.
    """
    from cryptography.exceptions import InvalidSignature

    manifest = verify_whole(store, version_key(name, version))
    payload = encode_json(_statement(store, name, version, manifest, decision))
    public = public_text(key)
    signature = key.sign(pre_authentication(PAYLOAD_TYPE, payload))
    try:
        key.public_key().verify(signature, pre_authentication(PAYLOAD_TYPE, payload))
    except InvalidSignature as exc:
        raise IntegrityError(f"the signer does not sign with the key that it names, {public}") from exc
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(public), "sig": base64.b64encode(signature).decode()}],
    }
    file = f"{key_id(public)[:DIGITS]}-{hashlib.sha256(payload).hexdigest()[:DIGITS]}.dsse.json"
    where = f"{_folder(name, version)}{file}"
    store.claim(where, encode_json(envelope), content_type=JSON)
    return store.uri(where)


def opened(envelope: bytes, uri: str, trusted: Sequence[str]) -> dict[str, Any] | None:
    """The statement of an envelope that one of the trusted keys signed; None where none of them did.

    Raises:
        IntegrityError: it is no envelope of a statement, or a trusted key is named whose signature is another's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        record = json.loads(envelope)
        payload = base64.b64decode(record["payload"], validate=True)
        signatures = {str(each["keyid"]): base64.b64decode(each["sig"]) for each in record["signatures"]}
        kind, statement = str(record["payloadType"]), json.loads(payload)
        statement["subject"][0]["digest"]["sha256"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
        raise IntegrityError(f"{uri} is no DSSE envelope of an in-toto statement: {type(exc).__name__}") from exc
    for public in trusted:
        signature = signatures.get(key_id(public))
        if signature is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix(SCHEME))).verify(
                signature, pre_authentication(kind, payload)
            )
        except InvalidSignature as exc:
            raise IntegrityError(f"{uri} is not what {public} signed: it was changed, or forged") from exc
        return dict(statement)
    return None


def signers(store: Store, name: str, version: str, manifest_sha256: str, trusted: Sequence[str]) -> list[str]:
    """Addresses of the signatures by which a trusted key vouches for these very bytes of the version.

    Raises:
        IntegrityError: one of them is forged or damaged.
    """
    found = []
    for info in store.list(_folder(name, version)):
        statement = opened(store.get(info.key), store.uri(info.key), trusted)
        if statement is None or statement.get("predicateType") != PREDICATE_TYPE:
            continue
        vouched = {(each["name"], each["digest"]["sha256"]) for each in statement["subject"]}
        if (f"{name}/{version}", manifest_sha256) in vouched:
            found.append(store.uri(info.key))
    return found


def require_signed(store: Store, name: str, version: str, manifest_sha256: str) -> None:
    """Nothing where the registry's config trusts no key.

    Raises:
        IntegrityError: none of the keys that it trusts has signed the version.
    """
    if store.trusted_keys and not signers(store, name, version, manifest_sha256, store.trusted_keys):
        raise IntegrityError(
            f"{name} {version} is signed by none of registry.trusted_keys: let a run promote it that has a key in "
            f"{KEY_VARIABLE}, or vouch for it with `fineloop adapters sign {name}@{version}`"
        )


def _statement(
    store: Store, name: str, version: str, manifest: folders.Manifest, decision: Decision | None
) -> dict[str, Any]:
    key = version_key(name, version)
    looked_at = [{"uri": store.uri(f"{key}/{LINEAGE}"), "digest": {"sha256": manifest.files[LINEAGE]["sha256"]}}]
    policy: dict[str, Any] = {"uri": "urn:fineloop:a-person"}
    if decision is not None:
        evaluation = runs.run_key(decision.run_id, Evaluation.FILE)
        digest = hashlib.sha256(store.get(evaluation)).hexdigest()
        looked_at.append({"uri": store.uri(evaluation), "digest": {"sha256": digest}})
        decided = runs.run_key(decision.run_id, Decision.FILE)
        policy |= {"uri": store.uri(decided), "digest": {"sha256": decision.sha256}}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f"{name}/{version}", "digest": {"sha256": manifest.sha256}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "verifier": {"id": "urn:fineloop"},
            "resourceUri": store.uri(key),
            "policy": policy,
            "inputAttestations": looked_at,
            "verificationResult": "PASSED",
            "verifiedLevels": [],
        },
    }


def _folder(name: str, version: str) -> str:
    return adapter_key(name, "signatures", version, "")


def _how_to_make_one() -> str:
    return "make one with `openssl genpkey -algorithm ed25519`, and keep it out of the config"
