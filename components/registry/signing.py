"""Signatures of versions: an in-toto statement in a DSSE envelope, signed with Ed25519.

The statement is SLSA's verification summary (slsa.dev/spec/v1.0/verification_summary). It names the version by the
sha256 of its manifest and by its address, and says that it passed the policy of a decision and may hold an alias; or,
with FAILED, that it is revoked, which takes precedence. It holds no time, so that signing again gives the same bytes,
under a name that only the holder of the key can predict, and so occupy. The private key comes from the signer's
environment, or a KMS keeps it. Another key signs evaluations: gate and promotion decide on nothing else.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry.event_log import Event, events, require_published
from components.registry.identity import adapter_key, verify_whole, version_key
from components.shared.errors import ConfigError, IntegrityError, UserError
from components.store import folders
from components.store.store import JSON, ObjectInfo, Store, encode_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

logger = logging.getLogger(__name__)

KEY_VARIABLE, KEY_FILE_VARIABLE = "FINELOOP_SIGNING_KEY", "FINELOOP_SIGNING_KEY_FILE"
SIGNER_VARIABLE = "FINELOOP_SIGNER"
OF_VERSIONS = (KEY_VARIABLE, KEY_FILE_VARIABLE, SIGNER_VARIABLE)
OF_EVALUATIONS = ("FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_KEY_FILE", "FINELOOP_EVALUATION_SIGNER")
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/verification_summary/v1"
EVALUATION_TYPE = "urn:fineloop:evaluation:v1"
LINEAGE = "lineage.json"
SCHEME = "ed25519:"
DIGITS = 12
MOST_BYTES = 1 << 16
"""Maximum size of an envelope; ours have two thousand bytes."""


@dataclass(frozen=True)
class Statements:
    """What the trusted keys state about exactly these bytes of a version."""

    passed: frozenset[str]
    """Aliases that the version may hold."""
    revoked_by: str
    """Address of the statement that revokes the version (no alias may hold it, nobody fetch it); empty if none does."""
    reason: str
    """The reason that the revocation gives."""
    junk: Mapping[str, str]
    """Objects among the signatures that are not signatures: address to reason."""


class Signer(Protocol):
    """An Ed25519 key that signs: cryptography's `Ed25519PrivateKey`, or one that a KMS keeps, by the same methods."""

    def sign(self, data: bytes, /) -> bytes: ...

    def public_key(self) -> "Ed25519PublicKey": ...


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's PAE (github.com/secure-systems-lab/dsse, protocol.md, v1)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def signer_from(environment: Mapping[str, str], variables: tuple[str, str, str] = OF_VERSIONS) -> Signer | None:
    """Return the key to sign with, or None if none is set.

    It comes from the function that the last of the variables names as PACKAGE.MODULE:FUNCTION, or else from PEM text in
    the first or in the file that the second names. Raises UserError if there is no such function, it fails or gives no
    key; or the key cannot be read, or is no unencrypted Ed25519 private key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    in_text, in_file, by_function = variables
    if named := environment.get(by_function, ""):
        module, _, function = named.partition(":")
        try:
            signer: Signer = getattr(importlib.import_module(module), function)()
            if not isinstance(public := signer.public_key(), Ed25519PublicKey):
                raise TypeError(f"it gives a {type(public).__name__}")
        except Exception as exc:  # what the user's code raises
            raise UserError(
                f"{by_function} is {named!r}, and has to be PACKAGE.MODULE:FUNCTION, of a function that takes "
                f"nothing and gives an Ed25519 key: {exc}"
            ) from exc
        return signer
    path, text = environment.get(in_file, ""), environment.get(in_text, "")
    if not path and not text:
        return None
    variable, how = in_text if text else in_file, "make one with `openssl genpkey -algorithm ed25519`"
    try:
        key = load_pem_private_key(text.encode() if text else Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as exc:
        raise UserError(
            f"{variable} gives no key ({type(exc).__name__}): {how}, and keep it out of the config"
        ) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{variable} gives a key of another kind than Ed25519: {how}")
    return key


def public_text(key: Signer) -> str:
    """The public key in the format of registry.trusted_keys."""
    return SCHEME + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def key_id(public: str) -> str:
    """Return the id of a key in an envelope: the sha256 of its 32 bytes."""
    return hashlib.sha256(base64.b64decode(public.removeprefix(SCHEME))).hexdigest()


def sign(
    store: Store,
    name: str,
    version: str,
    key: Signer,
    *,
    alias: str,
    decision: Decision | None = None,
    manifest_sha256: str | None = None,
) -> str:
    """Verify the whole version, sign that it may hold the alias and return the signature's URI.

    Signing again changes nothing. `decision` is the decision that it is signed for; None if a person vouches for it.
    Raises ObjectMissing if there is no such version; IntegrityError if it is damaged, not as it was published or not
    the one with `manifest_sha256`, or revoked; or what the key signed is not what its public key verifies.
    """
    manifest = verify_whole(store, version_key(name, version), manifest_sha256=manifest_sha256)
    require_published(store, name, version, manifest)
    facts = statements(store, name, version, manifest.sha256, [*store.trusted_keys, public_text(key)])
    if facts.revoked_by:
        raise _revoked(name, version, facts)
    verdict = {"verificationResult": "PASSED", "fineloop_alias": alias}
    return _sign(store, name, version, key, manifest, verdict, decision)


def revoke(store: Store, name: str, version: str, key: Signer, *, reason: str) -> str:
    """Sign that the version may hold no alias and not be fetched, and return the statement's URI. Raises ObjectMissing
    if there is no such version; IntegrityError if what the key signed is not what its public key verifies."""
    manifest = folders.read_manifest(store, version_key(name, version))
    verdict = {"verificationResult": "FAILED", "fineloop_reason": reason}
    return _sign(store, name, version, key, manifest, verdict)


def sign_evaluation(store: Store, name: str, run_id: str, key: Signer) -> str:
    """Sign the run's evaluation of a version of this adapter, as it is stored, and return the signature's URI. Raises
    ObjectMissing if there is no evaluation, or the version is gone; IntegrityError if the evaluation is malformed, or
    what the key signed is not what its public key verifies."""
    where = runs.key_of(store, run_id, runs.EVALUATION)
    body = store.get(where)
    candidate = Evaluation.from_json(body, store.uri(where)).model("candidate")
    version = str(candidate and candidate.version)
    manifest = folders.read_manifest(store, version_key(name, version)).sha256
    # The evaluation names the hash of its records, the dataset, and the version that it compared this one with.
    measured = _measured(store, name, version, run_id, hashlib.sha256(body).hexdigest())
    predicate = {"manifest_sha256": manifest, **measured}
    statement = _statement(name, version, manifest, EVALUATION_TYPE, predicate)
    signature = runs.key_of(store, run_id, runs.EVALUATION_SIGNATURE)
    store.put(signature, _envelope(key, statement), content_type=JSON)
    return store.uri(signature)


def require_evaluated(store: Store, name: str, version: str | None, run_id: str, evaluation_sha256: str) -> str | None:
    """Require that a key of registry.evaluation_keys signed this evaluation of the version by this run; return the
    sha256 of the manifest that the version had. None, and nothing required, where the registry trusts no key. Raises
    ConfigError if the registry trusts keys, and none for evaluations; IntegrityError if none of them signed it."""
    if not store.trusted_keys:
        return None
    require_evaluation_keys(store)
    key = runs.key_of(store, run_id, runs.EVALUATION_SIGNATURE)
    stored = store.read(key)
    statement = opened(stored[0], store.uri(key), store.evaluation_keys) if stored else None
    predicate = (statement or {}).get("predicate", {})
    if _measured(store, name, str(version), run_id, evaluation_sha256).items() <= predicate.items():
        return str(predicate["manifest_sha256"])
    raise IntegrityError(
        f"what run {run_id} measured of {name} {version} is signed by none of registry.evaluation_keys, so nothing is "
        f"decided on it: only the step evaluate signs, with the key in {OF_EVALUATIONS[0]}; run that step again"
    )


def _measured(store: Store, name: str, version: str, run_id: str, evaluation_sha256: str) -> dict[str, str]:
    uri = store.uri(version_key(name, version))
    return {"resourceUri": uri, "run_id": run_id, "evaluation_sha256": evaluation_sha256}


def require_evaluation_keys(store: Store) -> None:
    """Raise a ConfigError where the registry trusts keys, and none for evaluations."""
    if store.trusted_keys and not store.evaluation_keys:
        raise ConfigError(
            "registry.trusted_keys are set and registry.evaluation_keys are not, so no evaluation could be believed: "
            f"make a key for the step evaluate, which reads it from {OF_EVALUATIONS[0]}, and name its public key there"
        )


def decision_behind(store: Store, name: str, event: Event) -> Decision | None:
    """Return the decision behind an event; None if there is none, or it did not let pass what the event promotes.

    Where the registry trusts keys, only one that says the same and whose evaluation is signed: a training, which may
    write events, can neither add to the decisions on a test set nor hide one.
    """
    body, run_id = event.body, str(event.body.get("run_id", ""))
    decision = runs.decision_of(store, run_id)
    if decision is None or (event.kind == "promoted" and not (decision.promoted or decision.waits)):
        return None
    if not store.trusted_keys:
        return decision
    test_set = body.get("test_set") or body.get("evidence", {}).get("test_set") or ()
    event_is_about = (name, body.get("version", body.get("to")), body.get("alias"), run_id, tuple(test_set))
    if event_is_about != (decision.adapter, decision.version, decision.alias, decision.run_id, decision.test_set):
        return None
    try:
        require_evaluated(store, name, decision.version, run_id, decision.evaluation_sha256)
    except IntegrityError:
        return None
    return decision


def counts(store: Store, name: str, event: Event) -> bool:
    """Whether there is a decision behind an event of the log: a training may write events too."""
    if store.trusted_keys:
        return decision_behind(store, name, event) is not None
    return runs.has_decided(store, str(event.body.get("run_id", "")))


def believed(store: Store, name: str) -> list[Event]:
    """The adapter's log, oldest first; where the registry trusts keys, without the refusals and proposals that no such
    decision is behind: a training that writes them can neither hold a version back nor stop its approval."""
    return [event for event in events(store, name) if _is_believed(store, name, event)]


def _is_believed(store: Store, name: str, event: Event) -> bool:
    if not store.trusted_keys or event.kind not in ("refused", "proposed"):
        return True
    if not counts(store, name, event):
        return False
    stored = runs.lying(store, str(event.body["run_id"]), runs.DECISION, to_show=False)
    written = hashlib.sha256(stored[0]).hexdigest() if stored else ""
    return event.kind == "refused" or event.body.get("decision_sha256") == written


def _sign(
    store: Store,
    name: str,
    version: str,
    key: Signer,
    manifest: folders.Manifest,
    verdict: Mapping[str, str],
    decision: Decision | None = None,
) -> str:
    folder = version_key(name, version)
    looked_at = [{"uri": store.uri(f"{folder}/{LINEAGE}"), "digest": {"sha256": manifest.files[LINEAGE]["sha256"]}}]
    policy: dict[str, Any] = {"uri": "urn:fineloop:a-person"}
    if decision is not None:
        evaluation, decided = (runs.key_of(store, decision.run_id, kind.FILE) for kind in (Evaluation, Decision))
        digest = hashlib.sha256(store.get(evaluation)).hexdigest()
        looked_at.append({"uri": store.uri(evaluation), "digest": {"sha256": digest}})
        policy = {"uri": store.uri(decided), "digest": {"sha256": decision.sha256}}
    summary = {
        "verifier": {"id": "urn:fineloop"},
        "resourceUri": store.uri(folder),
        "policy": policy,
        "inputAttestations": looked_at,
        "verifiedLevels": [],
        **verdict,
    }
    envelope = _envelope(key, _statement(name, version, manifest.sha256, PREDICATE_TYPE, summary))
    file = f"{key_id(public_text(key))[:DIGITS]}-{hashlib.sha256(envelope).hexdigest()[:DIGITS]}.dsse.json"
    where = f"{signatures_key(name)}{version}/{file}"
    if store.claim(where, envelope, content_type=JSON) != envelope:
        raise IntegrityError(f"{store.uri(where)} is another's, where this signature belongs: remove it and sign again")
    return store.uri(where)


def _envelope(key: Signer, statement: Mapping[str, Any]) -> bytes:
    from cryptography.exceptions import InvalidSignature

    payload, public = encode_json(statement), public_text(key)
    signature = key.sign(pre_authentication(PAYLOAD_TYPE, payload))
    try:
        key.public_key().verify(signature, pre_authentication(PAYLOAD_TYPE, payload))
    except InvalidSignature as exc:
        raise IntegrityError(f"the signer does not sign with the key that it names, {public}") from exc
    signatures = [{"keyid": key_id(public), "sig": base64.b64encode(signature).decode()}]
    text = base64.b64encode(payload).decode()
    return encode_json({"payloadType": PAYLOAD_TYPE, "payload": text, "signatures": signatures})


def opened(envelope: bytes, uri: str, trusted: Sequence[str]) -> dict[str, Any] | None:
    """Return the statement of an envelope that one of the trusted keys signed; None if none of them did. Raises
    IntegrityError if it is not an envelope of a statement, or its signature by a trusted key does not verify."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        record = json.loads(envelope)
        payload = base64.b64decode(record["payload"], validate=True)
        signatures = {str(signature["keyid"]): base64.b64decode(signature["sig"]) for signature in record["signatures"]}
        kind, statement = str(record["payloadType"]), dict(json.loads(payload))
        if (kind, statement["_type"]) != (PAYLOAD_TYPE, STATEMENT_TYPE):
            raise ValueError(f"it is {kind} and {statement['_type']}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
        raise IntegrityError(f"{uri} is no DSSE envelope of an in-toto statement: {type(exc).__name__}") from exc
    named = [public for public in trusted if key_id(public) in signatures]
    for public in named:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix(SCHEME)))
        with contextlib.suppress(InvalidSignature):
            key.verify(signatures[key_id(public)], pre_authentication(kind, payload))
            return statement
    if named:
        raise IntegrityError(f"{uri} is not what {named[-1]} signed: it was changed, or forged")
    return None


def statements(
    store: Store,
    name: str,
    version: str,
    manifest_sha256: str,
    trusted: Sequence[str],
    *,
    objects: Iterable[ObjectInfo] | None = None,
    bodies: Mapping[str, bytes] | None = None,
) -> Statements:
    """Return what the trusted keys state about exactly these bytes of the version, in this registry.

    `objects` are those in its folder of signatures, and `bodies` their content by key, as far as the caller has them.
    """
    passed, revoked_by, reason, junk = set(), "", "", {}
    subject = {"name": f"{name}/{version}", "digest": {"sha256": manifest_sha256}}
    for info in store.list(f"{signatures_key(name)}{version}/") if objects is None else objects:
        uri = store.uri(info.key)
        try:
            if info.size > MOST_BYTES:
                raise IntegrityError(f"{uri} has {info.size:,} bytes, and an envelope at most {MOST_BYTES:,}")
            body = bodies[info.key] if bodies and info.key in bodies else store.get(info.key)
            statement = opened(body, uri, trusted) or {}
        except IntegrityError as exc:
            junk[uri] = str(exc)
            continue
        predicate, subjects = statement.get("predicate"), statement.get("subject")
        if statement.get("predicateType") != PREDICATE_TYPE or not isinstance(predicate, dict):
            continue
        if subjects != [subject] or predicate.get("resourceUri") != store.uri(version_key(name, version)):
            continue
        match predicate:
            case {"verificationResult": "FAILED"}:
                revoked_by, reason = uri, str(predicate.get("fineloop_reason"))
            case {"verificationResult": "PASSED", "fineloop_alias": str(alias)}:
                passed.add(alias)
    return Statements(frozenset(passed), revoked_by, reason, junk)


def require_signed(store: Store, name: str, version: str, manifest_sha256: str, *, alias: str = "") -> None:
    """Require a trusted signature, unless the registry's config trusts no key. An empty alias means any. Raises
    IntegrityError if none of the keys that it trusts has signed the version for the alias, or one has revoked it."""
    if not store.trusted_keys:
        return
    facts = statements(store, name, version, manifest_sha256, store.trusted_keys)
    for why in facts.junk.values():
        logger.warning("%s; passed over", why)
    if facts.revoked_by:
        raise _revoked(name, version, facts)
    if not facts.passed or (alias and alias not in facts.passed):
        raise IntegrityError(
            f"{name} {version} is signed by none of registry.trusted_keys{alias and f' for {alias}'}: let a run "
            f"promote it that has a key in {KEY_VARIABLE}, or vouch for it with "
            f"`fineloop adapters sign {name}@{version}{alias and f' --alias {alias}'}`"
        )


def signatures_key(name: str) -> str:
    """Key prefix of an adapter's signatures, with a trailing slash."""
    return adapter_key(name, "signatures/")


def is_revoked(store: Store, name: str, version: str) -> bool:
    """Whether a trusted key has revoked the stored version. Raises ObjectMissing if there is no such version."""
    sha256 = folders.read_manifest(store, version_key(name, version)).sha256
    return bool(statements(store, name, version, sha256, store.trusted_keys).revoked_by)


def _revoked(name: str, version: str, facts: Statements) -> IntegrityError:
    return IntegrityError(
        f"{name} {version} is revoked ({facts.reason}; {facts.revoked_by}): take another version, by --to in a rollback"
    )


def _statement(name: str, version: str, manifest_sha256: str, kind: str, predicate: Mapping[str, Any]) -> Any:
    subject = {"name": f"{name}/{version}", "digest": {"sha256": manifest_sha256}}
    return {"_type": STATEMENT_TYPE, "subject": [subject], "predicateType": kind, "predicate": predicate}
