"""Signatures, checked with OpenSSL and against the vector of DSSE's own specification."""

import base64
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from components.config.schema import RegistryConfig
from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry import signing
from components.registry.aliases import promote, rollback, sign_held
from components.registry.audit import audit
from components.registry.versions import pull_version, resolve
from components.shared.errors import IntegrityError, UserError
from components.store.store import Store
from tests.components.registry import adapters


@pytest.fixture
def key(tmp_path: Path) -> Ed25519PrivateKey:
    """Made by OpenSSL, as the message of a missing one says."""
    made = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / "key.pem")]
    subprocess.run(made, check=True, capture_output=True)
    found = signing.signer_from({signing.KEY_FILE_VARIABLE: str(tmp_path / "key.pem")})
    assert found is not None
    return found


def signed_by_hand(key: Ed25519PrivateKey, statement: object, kind: str = "application/vnd.in-toto+json") -> bytes:
    """An envelope as DSSE's specification makes it, by the cryptography library alone."""
    payload = json.dumps(statement).encode()
    signature = key.sign(b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload))
    identity = hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()
    signatures = [{"keyid": identity, "sig": base64.b64encode(signature).decode()}]
    envelope = {"payloadType": kind, "payload": base64.b64encode(payload).decode(), "signatures": signatures}
    return json.dumps(envelope).encode()


def published(store: Store, weights: bytes = b"one") -> str:
    return adapters.published(store, weights, run_id="r1").version


def trusting(store: Store, *keys: Ed25519PrivateKey) -> Store:
    public = [signing.public_text(key) for key in keys]
    return Store(store._client, store.bucket, store.prefix, trusted_keys=public)


def test_what_is_signed_is_the_encoding_of_dsse() -> None:
    # github.com/secure-systems-lab/dsse, protocol.md: the test vector
    found = signing.pre_authentication("http://example.com/HelloWorld", b"hello world")
    assert found == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_openssl_verifies_a_statement_that_names_version_lineage_evaluation_and_decision(
    store: Store, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    version = published(store)
    about = {"adapter": "icd", "alias": "production", "run_id": "r1", "version": version}
    decision = Decision(decision="promote", reasons=("better",), **about)
    runs.write(store, "r1", decision)
    runs.write(store, "r1", Evaluation(run_id="r1", records=1, models={}))
    uri = signing.sign(store, "icd", version, key, alias="production", decision=decision)
    assert signing.sign(store, "icd", version, key, alias="production", decision=decision) == uri
    envelope = store.get_json(store.key(uri))
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "signed").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload))
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    for command in (
        "openssl pkey -in key.pem -pubout -out public.pem",
        "openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in signed -sigfile signature",
    ):
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    statement = json.loads(payload)
    assert statement["subject"][0]["digest"]["sha256"] == resolve(store, f"icd@{version}").manifest_sha256
    named = [each["uri"] for each in statement["predicate"]["inputAttestations"]]
    assert [uri.rpartition("/")[2] for uri in named] == ["lineage.json", "evaluation.json"]
    assert statement["predicate"]["policy"]["digest"]["sha256"] == decision.sha256


def test_where_keys_are_trusted_nothing_moves_to_what_none_of_them_signed_and_nobody_fetches_it(
    store: Store, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    one, two = published(store), published(store, b"two")
    strict = trusting(store, key)
    signing.sign(store, "icd", one, key, alias="production")
    signing.sign(store, "icd", two, Ed25519PrivateKey.generate(), alias="production")  # of somebody whom nobody trusts
    promote(strict, "icd", one)
    with pytest.raises(IntegrityError, match=f"icd {two} is signed by none of registry.trusted_keys"):
        promote(strict, "icd", two)
    promote(store, "icd", two)  # who trusts no key asks for no signature
    with pytest.raises(IntegrityError, match="signed by none"):
        pull_version(strict, resolve(strict, "icd@production"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert rollback(strict, "icd").body["to"] == one


@pytest.mark.parametrize("damage", ["payload", "signature", "another version's", "junk"])
def test_a_forged_signature_is_none(store: Store, key: Ed25519PrivateKey, damage: str) -> None:
    one, two = published(store), published(store, b"two")
    where = store.key(signing.sign(store, "icd", one, key, alias="production"))
    envelope = store.get_json(where)
    if damage == "payload":
        changed = base64.b64decode(envelope["payload"]).replace(b"PASSED", b"FAILED")
        envelope["payload"] = base64.b64encode(changed).decode()
    elif damage == "signature":
        envelope["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    elif damage == "junk":
        envelope = {"payload": 3}
    if damage == "another version's":
        store.put_json(where.replace(one, two), envelope)
    else:
        store.put_json(where, envelope)
    with pytest.raises(IntegrityError, match="signed by none"):
        promote(trusting(store, key), "icd", two if damage == "another version's" else one)


def test_junk_among_the_signatures_stops_nobody(
    store: Store, key: Ed25519PrivateKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = published(store), published(store, b"two")
    strict = trusting(store, key)
    for version in (one, two):
        where = store.key(signing.sign(store, "icd", version, key, alias="production"))
        forged = store.get(where).replace(b'"sig":"', b'"sig":"AA')
        unsigned = b'{"payload": "e30=", "signatures": []}'
        for number, junk in enumerate((b"{}", b"\xff", unsigned, b" " * 100_000, forged)):
            store.put(f"adapters/icd/signatures/{version}/a-junk-{number}.dsse.json", junk)
    promote(strict, "icd", one)
    promote(strict, "icd", two)
    assert rollback(strict, "icd").body["to"] == one
    pull_version(strict, resolve(strict, "icd@production"), tmp_path / "adapter")
    assert "an envelope at most 65,536" in caplog.text
    assert all(f"a-junk-{number}" in caplog.text for number in (0, 1, 2, 4))
    assert len([finding for finding in audit(strict, "icd").findings if "a-junk" in finding.where]) == 10


def test_who_writes_first_under_a_signatures_name_is_found_out(store: Store, key: Ed25519PrivateKey) -> None:
    version = published(store)
    uri = signing.sign(store, "icd", version, key, alias="production")
    # The name is that of bytes which only the key makes (RFC 8032): nobody else writes there first.
    named = uri.split("-")[-1].removesuffix(".dsse.json")
    assert hashlib.sha256(store.get(store.key(uri))).hexdigest().startswith(named)
    store.put(store.key(uri), b"{}")
    with pytest.raises(IntegrityError, match="is another's, where this signature belongs"):
        signing.sign(store, "icd", version, key, alias="production")


def altered(statement: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**statement, "predicate": {**statement["predicate"], **keys}}


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "of another kind of payload": lambda statement: (statement, "text/plain"),
    "no statement of in-toto's": lambda statement: {**statement, "_type": "https://example.com/Statement/v9"},
    "of another predicate": lambda statement: {**statement, "predicateType": "https://slsa.dev/provenance/v1"},
    "without a predicate": lambda statement: {**statement, "predicate": None},
    "without a verdict": lambda statement: altered(statement, verificationResult=None),
    "of another registry": lambda statement: altered(statement, resourceUri="s3://dev/adapters/icd/versions/v1"),
    "for another alias": lambda statement: altered(statement, fineloop_alias="staging"),
    "for no alias": lambda statement: altered(statement, fineloop_alias=None),
    "of other bytes": lambda statement: {**statement, "subject": [{**statement["subject"][0], "digest": {}}]},
    "an odd subject": lambda statement: {**statement, "subject": {"name": 7}},
    "a list": lambda statement: [[statement, 1]],
}


@pytest.mark.parametrize("how", [None, *WRONG])
def test_a_signature_counts_for_what_it_says_alone(store: Store, key: Ed25519PrivateKey, how: str | None) -> None:
    version = published(store)
    where = store.key(signing.sign(store, "icd", version, key, alias="production"))
    statement = json.loads(base64.b64decode(store.get_json(where)["payload"]))
    wrong = WRONG[how](statement) if how else statement
    store.put(where, signed_by_hand(key, *(wrong if isinstance(wrong, tuple) else [wrong])))
    message = f"icd {version} is signed by none of registry.trusted_keys for production"
    with pytest.raises(IntegrityError, match=message) if how else contextlib.nullcontext():
        promote(trusting(store, key), "icd", version)


def test_a_signature_for_staging_is_none_for_production_even_where_that_alias_points_at_it(
    store: Store, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    version, strict = published(store), trusting(store, key)
    signing.sign(store, "icd", version, key, alias="staging")
    promote(strict, "icd", version, "staging")
    promote(store, "icd", version)  # as somebody who may write aliases can
    with pytest.raises(IntegrityError, match=f"for production: .* `fineloop adapters sign icd@{version} --alias prod"):
        pull_version(strict, resolve(strict, "icd@production"), tmp_path / "production")
    for reference in ("icd@staging", f"icd@{version}"):
        pull_version(strict, resolve(strict, reference), tmp_path / reference)


def test_a_revocation_wins_over_every_signature(store: Store, key: Ed25519PrivateKey, tmp_path: Path) -> None:
    one, two, other = published(store), published(store, b"two"), Ed25519PrivateKey.generate()
    strict = trusting(store, key, other)
    for version in (one, two):
        signing.sign(store, "icd", version, key, alias="production")
        promote(strict, "icd", version)
    signing.revoke(store, "icd", one, Ed25519PrivateKey.generate(), reason="by nobody whom this registry trusts")
    assert rollback(strict, "icd").body["to"] == one
    promote(strict, "icd", two)
    uri = signing.revoke(store, "icd", one, other, reason="it tells what it was trained on")
    for use in (
        lambda: pull_version(strict, resolve(strict, f"icd@{one}"), tmp_path / "adapter"),
        lambda: promote(strict, "icd", one),
        lambda: rollback(strict, "icd"),
        lambda: signing.sign(strict, "icd", one, key, alias="staging"),
    ):
        with pytest.raises(IntegrityError, match=rf"icd {one} is revoked \(it tells .*; {uri}\): take another"):
            use()
    assert [f.what for f in audit(strict, "icd").findings] == []  # it is no longer needed
    pull_version(strict, resolve(strict, "icd@production"), tmp_path / "production")


def test_a_withdrawn_key_leaves_nothing_behind_once_signed_anew(store: Store, key: Ed25519PrivateKey) -> None:
    new = Ed25519PrivateKey.generate()
    both, strict = trusting(store, key, new), trusting(store, new)
    made = [published(store, weights) for weights in (b"one", b"two", b"three", b"four")]
    for version in made[:3]:
        signing.sign(store, "icd", version, key, alias="production")
        promote(both, "icd", version)
    signing.sign(store, "icd", made[0], key, alias="staging")
    promote(both, "icd", made[0], "staging")
    signing.revoke(store, "icd", made[1], key, reason="it was trained on the wrong data")
    messages = [finding.what for finding in audit(strict, "icd").findings]
    assert len([each for each in messages if each.startswith("is in use as")]) == 2
    assert len([each for each in messages if each.startswith("is what a rollback of production may need")]) == 2
    assert all("`fineloop adapters sign --held icd`" in each for each in messages)
    done = sign_held(both, "icd", new)
    held = {(made[2], "production"), (made[0], "production"), (made[0], "staging")}
    assert {(each.version, each.alias) for each in done} == held | {(made[1], "")}
    assert sign_held(both, "icd", new) == done
    assert audit(strict, "icd").findings == ()
    with pytest.raises(IntegrityError, match="is revoked"):
        rollback(strict, "icd")
    assert rollback(strict, "icd", to=made[0]).body["to"] == made[0]
    with pytest.raises(IntegrityError, match="signed by none"):
        promote(strict, "icd", made[3])


@pytest.mark.parametrize("text", ["s3cret", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"])
def test_a_key_that_is_none_is_said_without_telling_it(text: str) -> None:
    with pytest.raises(UserError, match=r"FINELOOP_SIGNING_KEY gives no key .*openssl genpkey") as refused:
        signing.signer_from({signing.KEY_VARIABLE: text})
    assert text not in str(refused.value)


def test_a_key_that_something_else_keeps_signs_and_has_to_be_the_one_that_it_names(
    store: Store, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(named: Ed25519PrivateKey) -> Callable[[], SimpleNamespace]:
        return lambda: SimpleNamespace(sign=key.sign, public_key=named.public_key)

    signers = {"Kept": kept(key), "Mistaken": kept(Ed25519PrivateKey.generate())}
    monkeypatch.setitem(sys.modules, "kept", SimpleNamespace(**signers))
    version = published(store)
    signer = signing.signer_from({signing.SIGNER_VARIABLE: "kept:Kept"})
    assert signer is not None
    signing.sign(store, "icd", version, signer, alias="production")
    promote(trusting(store, key), "icd", version)
    mistaken = signing.signer_from({signing.SIGNER_VARIABLE: "kept:Mistaken"})
    assert mistaken is not None
    with pytest.raises(IntegrityError, match="does not sign with the key that it names"):
        signing.sign(store, "icd", published(store, b"two"), mistaken, alias="production")
    for named in ("nowhere:Kept", "kept:Lost", "kept", ":Kept", "os:stat", "os:getcwd", "builtins:print"):
        with pytest.raises(UserError, match=r"FINELOOP_SIGNER is .* has to be PACKAGE\.MODULE:FUNCTION, of a function"):
            signing.signer_from({signing.SIGNER_VARIABLE: named})


def test_a_public_key_for_which_anybody_can_sign_is_refused() -> None:
    prime = 2**255 - 19
    # RFC 8032: x y of -x^2 + y^2 = 1 + d x^2 y^2. Twice a point of order 8 has y = 0, so that 2 y^2 = 1 - d y^4 for it.
    d = -121665 * pow(121666, -1, prime) % prime
    squares = [(sign * root(4 + 4 * d, prime) - 2) * pow(2 * d, -1, prime) % prime for sign in (1, -1)]
    (of_order_8,) = [y for square in squares if (y := root(square, prime)) is not None]
    forgeable = 0
    for y in (0, 1, prime - 1, prime, prime + 1, of_order_8, prime - of_order_8):
        for sign in (0, 1 << 255):
            raw = (y + sign).to_bytes(32, "little")
            with pytest.raises(ValidationError, match="a point of small order, for which anybody can sign"):
                RegistryConfig(trusted_keys=[f"ed25519:{base64.b64encode(raw).decode()}"])
            forgeable += is_forgeable(raw)
    assert forgeable >= 8  # so many points there are
    assert RegistryConfig(trusted_keys=[signing.public_text(Ed25519PrivateKey.generate())])


def root(square: int, prime: int) -> int | None:
    found = pow(square, (prime + 3) // 8, prime)
    both = (found, found * pow(2, (prime - 1) // 4, prime) % prime)
    return next((each for each in both if (each * each - square) % prime == 0), None)


def is_forgeable(public: bytes) -> bool:
    """Whether S = 0 and R the neutral point pass for a signature of some message."""
    neutral = (1).to_bytes(32, "little") + bytes(32)
    for number in range(100):
        with contextlib.suppress(InvalidSignature, ValueError):
            Ed25519PublicKey.from_public_bytes(public).verify(neutral, b"%d" % number)
            return True
    return False
