"""An audit finds each thing that somebody changed behind the registry's back, and nothing where nobody did."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Barrier

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.records import runs
from components.records.steps import Decision
from components.registry import signing
from components.registry.aliases import promote, rollback
from components.registry.audit import Finding, audit
from components.registry.event_log import append_event, events, publication
from components.registry.identity import version_key
from components.registry.versions import Version, publish_version, pull_version, resolve, verify_version
from components.shared.errors import FineloopError, IntegrityError, ObjectMissing
from components.store.folders import find_manifest, publish, read_manifest
from components.store.store import Store, encode_json
from tests.components.registry.adapters import holder, published
from tests.waiting import PATIENCE_S

ALIAS = "adapters/icd/aliases/production.json"


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def ids(store: Store, key: Ed25519PrivateKey) -> list[str]:
    """Three versions; the first two were promoted and signed, the alias was rolled back, the third was refused."""
    store.trusted_keys = (signing.public_text(key),)
    made = [published(store, bytes([number]), run_id=f"r{number}").version for number in range(3)]
    for version in made[:2]:
        signing.sign(store, "icd", version, key, alias="production")
        promote(store, "icd", version)
    rollback(store, "icd")
    about = {"version": made[2], "champion": made[0], "alias": "production", "run_id": "r2"}
    runs.write(store, "r2", Decision(decision="hold", adapter="icd", reasons=("worse",), **about))
    append_event(store, "icd", "refused", {**about, "reasons": ["worse"]})
    return made


def event_key(store: Store, kind: str, number: int = 0) -> str:
    return store.key([event for event in events(store, "icd") if event.kind == kind][number].uri)


def rewrite(store: Store, key: str, old: str, new: str) -> None:
    body = store.get(key)
    assert old.encode() in body
    store.put(key, body.replace(old.encode(), new.encode()))


def forge(store: Store, ids: list[str]) -> None:
    body = {"alias": "production", "from": ids[0], "to": ids[2], "manifest_sha256": "", "run_id": "", "since": "2999"}
    append_event(store, "icd", "promoted", body, at="2999-01-01T00:00:00.000000Z")


def refile_last_move(store: Store, ids: list[str]) -> None:
    """As somebody would who knows how an event is named: the name fits what it says now."""
    key = event_key(store, "rolled_back")
    record = store.get_json(key)
    store.delete([key])
    append_event(store, "icd", record["kind"], {**record["body"], "reason": "nothing"}, at=record["time"])


def remove_round_trip(store: Store, ids: list[str]) -> None:
    """To the second version and back, before it came to stay: of what is left each begins where the last one ended."""
    promote(store, "icd", ids[1])
    store.delete([event_key(store, "promoted", 1), event_key(store, "rolled_back")])


def republish(store: Store, ids: list[str]) -> None:
    """Another manifest, and an event that says it was published so."""
    key = f"adapters/icd/versions/{ids[2]}/manifest.json"
    rewrite(store, key, '"run_id":"r2"', '"run_id":"r9"')
    manifest = find_manifest(store, key.rpartition("/")[0])
    assert manifest is not None
    append_event(store, "icd", "published", publication(ids[2], manifest))


def move_pointer(store: Store, ids: list[str]) -> None:
    pointer = store.get_json(ALIAS)
    other = store.get_json(event_key(store, "published", 1))["body"]
    store.put_json(ALIAS, {**pointer, "version": ids[1], "manifest_sha256": other["manifest_sha256"]})


TAMPERING: dict[str, tuple[Callable[[Store, list[str]], object], str]] = {
    "weights": (
        lambda store, ids: store.put(f"adapters/icd/versions/{ids[1]}/adapter_model.safetensors", b"x"),
        "is damaged: adapter_model",
    ),
    "manifest": (
        lambda store, ids: rewrite(
            store, f"adapters/icd/versions/{ids[1]}/manifest.json", '"run_id":"r1"', '"run_id":"r9"'
        ),
        "another manifest than was published",
    ),
    "version removed": (
        lambda store, ids: store.delete([info.key for info in store.list(f"adapters/icd/versions/{ids[2]}/")]),
        "was published .* and is gone",
    ),
    "promotion rewritten": (
        lambda store, ids: rewrite(store, event_key(store, "promoted", 1), ids[1], ids[2]),
        "is not an event: its id is not that of its content",
    ),
    "promotion forged": (forge, "do not lead from one to the next"),
    "last move recorded otherwise": (refile_last_move, "points elsewhere than its last event says"),
    "moves removed that lead back to where they began": (remove_round_trip, "do not lead from one to the next"),
    "published again as another": (republish, "another manifest than s3://.* does"),
    "publication removed": (
        lambda store, _: store.delete([event_key(store, "published", 2)]),
        "no event that says it was",
    ),
    "refusal removed": (
        lambda store, _: store.delete([event_key(store, "refused")]),
        "was held by run r2, and no event",
    ),
    "refusal of what never was": (
        lambda store, _: append_event(store, "icd", "refused", {"version": "v0", "alias": "production"}),
        "is about v0, which was never published",
    ),
    "refusal by a run that decided nothing": (
        lambda store, ids: append_event(store, "icd", "refused", {"version": ids[0], "run_id": "r9"}),
        "is about a decision of run r9, which made none",
    ),
    "pointer moved": (move_pointer, "is not an alias: it points at"),
    "alias removed": (lambda store, _: store.delete([ALIAS]), "moved icd@production, which there is no more"),
    "signature removed": (
        lambda store, ids: store.delete([info.key for info in store.list(f"adapters/icd/signatures/{ids[0]}/")]),
        "is in use as production, and signed by none",
    ),
}


def test_a_registry_that_nobody_touched_has_no_findings(store: Store, ids: list[str]) -> None:
    found = audit(store, "icd")
    assert (found.versions, found.events, found.findings) == (3, 7, ())


@pytest.mark.parametrize("what", TAMPERING)
def test_an_audit_finds(store: Store, ids: list[str], what: str) -> None:
    tamper, message = TAMPERING[what]
    tamper(store, ids)
    findings = audit(store, "icd").findings
    assert any(re.search(message, finding.what) for finding in findings), findings


def test_the_tokens_of_a_dataset_are_no_part_of_it_and_are_read_too(store: Store) -> None:
    publish(store, "datasets/d1", {"train/part-00000.parquet": b"rows"})
    publish(store, "datasets/d1/tokens/whole", {"tokens.npy": b"1234"})
    store.put("datasets/d1/tokens/half/tokens.npy", b"12")  # a publication that has not ended
    published(store, b"9", run_id="r9", dataset={"dataset_id": "d1"})
    assert audit(store, "icd").findings == ()
    store.put("datasets/d1/tokens/whole/tokens.npy", b"1235")
    store.put("datasets/d1/train/part-00001.parquet", b"rows")
    found = {finding.where: finding.what for finding in audit(store, "icd").findings}
    assert found.keys() == {store.uri("datasets/d1"), store.uri("datasets/d1/tokens/whole")}
    assert "train/part-00001.parquet is not in the manifest" in found[store.uri("datasets/d1")]
    assert "tokens.npy has sha256" in found[store.uri("datasets/d1/tokens/whole")]


def test_tokens_that_are_not_those_that_a_version_was_trained_on_are_named(store: Store) -> None:
    publish(store, "datasets/d1", {"train/part-00000.parquet": b"rows"})
    key = "datasets/d1/tokens/a1"

    def trained(weights: bytes) -> str:
        tokens = {"a1": read_manifest(store, key).content_sha256, "gone": "0" * 64}
        return published(store, weights, run_id="r9", dataset={"dataset_id": "d1", "tokens": tokens}).version

    def write(tokens: bytes) -> str:
        store.delete([info.key for info in store.list(f"{key}/")])
        return publish(store, key, {"tokens.npy": tokens}).content_sha256

    honest = write(b"red")
    before = trained(b"1")
    assert write(b"red") == honest
    assert audit(store, "icd").findings == ()  # whoever makes them again makes the same
    planted = write(b"sad")
    says = "has sha256 {}, and {} was trained on {}"
    expected = (Finding(store.uri(key), says.format(planted, before, honest)),)
    assert audit(store, "icd").findings == expected
    after = trained(b"2")
    assert audit(store, "icd").findings == expected
    write(b"red")
    assert audit(store, "icd").findings == (Finding(store.uri(key), says.format(honest, after, planted)),)


def make_base(store: Store, weights: bytes) -> tuple[str, str]:
    """A base as the workers make it; returns its key and its manifest's sha256."""
    content = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    name = hashlib.sha256(encode_json(content)).hexdigest()[:16]
    manifest = publish(store, f"bases/b1/{name}", {"model.safetensors": weights})
    store.put_json("bases/b1/chosen.json", {"format": 1, "folder": name, "manifest_sha256": manifest.sha256})
    return f"bases/b1/{name}", manifest.sha256


def test_a_base_that_fineloop_made_is_read_too_and_is_the_one_that_the_version_names(store: Store) -> None:
    key, sha256 = make_base(store, b"weights")
    published(store, b"1", recipe={"stands_on": store.uri(key), "stands_on_sha256": sha256})
    assert audit(store, "icd").findings == ()
    manifest = store.get(f"{key}/manifest.json")
    store.put(f"{key}/manifest.json", manifest.replace(b'"about":{}', b'"about":{"by":"another"}'))
    (found,) = audit(store, "icd").findings
    assert (found.where, f"but {sha256} was vouched for" in found.what) == (store.uri(key), True)
    store.put(f"{key}/manifest.json", manifest)
    store.put(f"{key}/model.safetensors", b"WEIGHTS")
    (found,) = audit(store, "icd").findings
    assert "model.safetensors has sha256" in found.what


def test_versions_are_read_side_by_side(store: Store, versions: list[str]) -> None:
    together = Barrier(len(versions))

    class Together(Store):
        def read(self, key: str) -> tuple[bytes, str] | None:
            if key.endswith("/manifest.json"):
                together.wait(PATIENCE_S)  # for all the others, or it breaks
            return super().read(key)

    found = audit(Together(store._client, store.bucket, store.prefix), "icd")
    assert (found.versions, found.findings) == (len(versions), ())


# Everything that somebody can do to a version's folder, and everything that vouches for it: each finds each.


KINDS: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "bit flipped": lambda body, other: bytes([body[0] ^ 1]) + body[1:],
    "cut": lambda body, other: body[: len(body) // 2],
    "grown": lambda body, other: body + b" ",
    "emptied": lambda body, other: b"",
    "exchanged": lambda body, other: other,
    "removed": lambda body, other: None,
}
"""What becomes of a file, from its content and that of another version's file of the same name."""


def file_changed(file: str, kind: str) -> Callable[[Store, str, str], None]:
    def tamper(store: Store, key: str, other: str) -> None:
        body = KINDS[kind](store.get(f"{key}/{file}"), store.get(f"{other}/{file}"))
        if body is None:
            store.delete([f"{key}/{file}"])
        else:
            store.put(f"{key}/{file}", body)

    return tamper


def folder_exchanged(store: Store, key: str, other: str) -> None:
    for info in store.list(f"{other}/"):
        store.put(info.key.replace(other, key), store.get(info.key))


def run_id_as(value: bytes) -> Callable[[Store, str, str], None]:
    def tamper(store: Store, key: str, other: str) -> None:
        body = store.get(f"{key}/manifest.json")
        assert b'"run_id":"of one"' in body
        store.put(f"{key}/manifest.json", body.replace(b'"run_id":"of one"', b'"run_id":' + value))

    return tamper


def lineage_forged_with_its_manifest(store: Store, key: str, other: str) -> None:
    """What the folder says of itself is sound; its events alone say that it was another."""
    lineage = store.get(f"{key}/lineage.json").replace(b"of one", b"of eve")
    manifest = json.loads(store.get(f"{key}/manifest.json"))
    manifest["files"]["lineage.json"]["sha256"] = hashlib.sha256(lineage).hexdigest()
    store.put(f"{key}/lineage.json", lineage)
    store.put(f"{key}/manifest.json", json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


TABLE: dict[str, Callable[[Store, str, str], None]] = {
    **{f"manifest.json {kind}": file_changed("manifest.json", kind) for kind in KINDS},
    "lineage.json bit flipped": file_changed("lineage.json", "bit flipped"),
    "lineage.json exchanged": file_changed("lineage.json", "exchanged"),
    "adapter_model.safetensors bit flipped": file_changed("adapter_model.safetensors", "bit flipped"),
    "adapter_config.json removed": file_changed("adapter_config.json", "removed"),
    "README.md grown": file_changed("README.md", "grown"),
    "a file added": lambda store, key, other: store.put(f"{key}/modeling.py", b"import os"),
    "all exchanged with another version's": folder_exchanged,
    "manifest.json reworded": run_id_as(b'"of eve"'),
    "no number in manifest.json": run_id_as(b"NaN"),
    "a number in manifest.json that is too large": run_id_as(b"1e999"),
    "lineage.json and manifest.json forged": lineage_forged_with_its_manifest,
}


def published_whole(store: Store, weights: str) -> Version:
    files = {
        "adapter_model.safetensors": f"weights {weights}".encode(),
        "adapter_config.json": f'{{"r": "{weights}"}}'.encode(),
        "README.md": f"# {weights}".encode(),
    }
    return publish_version(store, "icd", files, lineage={"run_id": f"of {weights}"})


@pytest.mark.parametrize("what", TABLE)
def test_whoever_vouches_for_a_version_finds_what_was_changed_of_it(store: Store, tmp_path: Path, what: str) -> None:
    one, two, three = (published_whole(store, each) for each in ("one", "two", "three"))
    promote(store, "icd", one.version)
    promote(store, "icd", two.version)
    promote(store, "icd", one.version, "stable")
    TABLE[what](store, version_key("icd", one.version), version_key("icd", three.version))
    uses: dict[str, Callable[[], object]] = {
        "verify": lambda: verify_version(store, one),
        "verify by alias": lambda: verify_version(store, resolve(store, "icd@stable")),
        "verify by version": lambda: verify_version(store, resolve(store, f"icd@{one.version}")),
        "pull": lambda: pull_version(store, one, tmp_path / "pulled"),
        "pull by version": lambda: pull_version(store, resolve(store, f"icd@{one.version}"), tmp_path / "pulled"),
        "promote": lambda: promote(store, "icd", one.version),
        "rollback": lambda: rollback(store, "icd"),
        "rollback to it": lambda: rollback(store, "icd", to=one.version),
    }
    found = {use: refused_by(call) for use, call in uses.items()}
    gone = ObjectMissing if what == "manifest.json removed" else IntegrityError  # without a manifest it is no version
    assert found == dict.fromkeys(uses, gone)
    assert [path.name for path in tmp_path.iterdir()] == []
    assert holder(store) == two.version
    assert any(one.version in finding.where + finding.what for finding in audit(store, "icd").findings)


def refused_by(call: Callable[[], object]) -> type[FineloopError] | None:
    try:
        call()
    except FineloopError as exc:
        return ObjectMissing if isinstance(exc, ObjectMissing) else type(exc)
    return None
