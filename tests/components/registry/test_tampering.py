"""Everything that somebody can do to a version's folder, and everything that vouches for it: each finds each."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from components.registry.aliases import promote, rollback
from components.registry.audit import audit
from components.registry.identity import version_key
from components.registry.versions import Version, publish_version, pull_version, resolve, verify_version
from components.shared.errors import FineloopError, IntegrityError, ObjectMissing
from components.store.store import Store
from tests.components.registry.adapters import holder

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


def published(store: Store, weights: str) -> Version:
    files = {
        "adapter_model.safetensors": f"weights {weights}".encode(),
        "adapter_config.json": f'{{"r": "{weights}"}}'.encode(),
        "README.md": f"# {weights}".encode(),
    }
    return publish_version(store, "icd", files, lineage={"run_id": f"of {weights}"})


@pytest.mark.parametrize("what", TABLE)
def test_whoever_vouches_for_a_version_finds_what_was_changed_of_it(store: Store, tmp_path: Path, what: str) -> None:
    one, two, three = (published(store, each) for each in ("one", "two", "three"))
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
