import json
from pathlib import Path

import pytest

from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry import versions
from components.registry.aliases import promote
from components.registry.event_log import events
from components.registry.identity import version_key
from components.registry.versions import Version, list_versions, publish_version, pull_version, resolve, verify_version
from components.shared.errors import Conflict, ObjectMissing, UserError
from components.store.folders import MANIFEST
from components.store.store import Store

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def published(store: Store, weights: bytes = b"weights", run_id: str = "r1", name: str = "icd") -> Version:
    weighs: dict[str, bytes | Path] = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    files = {**weighs, "README.md": f"By {run_id}.\n".encode()}
    return publish_version(store, name, files, lineage={"run_id": run_id})


def test_a_version_is_named_by_its_content(store: Store) -> None:
    version = published(store)
    # sha256 of the two lines "<file> <sha256 of the file>", by coreutils
    assert version.version == "v6e38a1d16008a39"
    assert version.uri == f"s3://{store.bucket}/{store.prefix}/adapters/icd/versions/{version.version}"
    assert published(store, b"other").version != version.version
    assert published(store, name="another").version == version.version


def test_a_version_holds_its_files_lineage_and_event(store: Store, tmp_path: Path) -> None:
    version = published(store)
    assert version.metrics == {}
    assert version.run_id == "r1"
    assert verify_version(store, version).sha256 == version.manifest_sha256
    pull_version(store, version, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {*FILES, "lineage.json", MANIFEST}
    assert json.loads((tmp_path / "adapter" / "lineage.json").read_bytes()) == {"run_id": "r1", "files": FILES}
    assert versions.read_lineage(store, version) == {"run_id": "r1", "files": FILES}
    logged = [(event.kind, event.body["version"], event.body["run_id"]) for event in events(store, "icd")]
    assert logged == [("published", version.version, "r1")]


def test_the_same_content_again_is_the_same_version_and_changes_nothing(store: Store) -> None:
    first = published(store)
    before = {info.key: info.last_modified for info in store.list("adapters/")}
    assert published(store) == first
    assert {info.key: info.last_modified for info in store.list("adapters/")} == before
    for _ in range(2):
        assert published(store, run_id="r2") == first
    after = {info.key: info.last_modified for info in store.list("adapters/")}
    assert before.items() <= after.items()
    logged = [(event.kind, event.body["run_id"]) for event in events(store, "icd")]
    assert logged == [("published", "r1"), ("published", "r2")]
    assert len(after) == len(before) + 1  # that the other run made it too


def test_a_publication_interrupted_before_its_event_is_completed(store: Store) -> None:
    version = published(store)
    logged = events(store, "icd")
    store.delete(store.key(event.uri) for event in logged)
    assert published(store) == version
    assert events(store, "icd") == logged


def test_a_publication_interrupted_before_its_manifest_is_no_version(store: Store) -> None:
    version = published(store)
    store.delete([f"{version_key('icd', version.version)}/{MANIFEST}"])
    assert list_versions(store, "icd") == []
    with pytest.raises(ObjectMissing):
        resolve(store, f"icd@{version.version}")
    with pytest.raises(ObjectMissing):
        promote(store, "icd", version.version)
    assert published(store).version == version.version
    assert [found.version for found in list_versions(store, "icd")] == [version.version]


def test_a_version_that_another_run_left_unfinished_stays_that_runs(store: Store) -> None:
    version = published(store, run_id="r1")
    key = version_key("icd", version.version)
    store.delete([f"{key}/{MANIFEST}", f"{key}/README.md"])
    completed = published(store, run_id="r2")
    assert completed.run_id == "r1"
    assert versions.read_lineage(store, completed) == {"run_id": "r1", "files": FILES}
    assert store.get(f"{key}/README.md") == b"By r2.\n"
    verify_version(store, completed)


def test_a_left_file_that_is_not_what_the_id_says_is_not_adopted(store: Store) -> None:
    version = published(store)
    key = version_key("icd", version.version)
    store.delete([f"{key}/{MANIFEST}"])
    store.put(f"{key}/adapter_config.json", b"{ }")
    with pytest.raises(Conflict, match=r"another writer's adapter_config\.json: remove the folder"):
        published(store)
    assert list_versions(store, "icd") == []


def test_versions_are_listed_newest_first_with_their_aliases(store: Store) -> None:
    old, new = published(store, b"old"), published(store, b"new")
    promote(store, "icd", old.version)
    promote(store, "icd", old.version, "stable")
    listed = list_versions(store, "icd")
    assert [version.version for version in listed] == [new.version, old.version]
    assert [version.aliases for version in listed] == [(), ("production", "stable")]
    published(store, name="another")
    assert versions.list_adapters(store) == ["another", "icd"]
    assert list_versions(store, "unknown") == []


def test_a_reference_is_resolved_by_alias_version_or_first_digits(store: Store) -> None:
    old, new = published(store, b"old"), published(store, b"new")
    assert resolve(store, "icd") == new  # no alias yet: the newest
    promote(store, "icd", old.version)
    assert resolve(store, "icd").version == old.version
    assert resolve(store, "icd@production").aliases == ("production",)
    assert resolve(store, f"icd@{new.version}") == new
    assert resolve(store, f"icd@{new.version[:6]}") == new
    third, number = new, 0
    while third.version[:2] != old.version[:2] or third == old:
        third, number = published(store, f"new {number}".encode()), number + 1
    with pytest.raises(UserError, match="give more digits") as raised:
        resolve(store, f"icd@{old.version[:2]}")
    assert old.version in str(raised.value)
    for alias in (new.version[:4], new.version):
        promote(store, "icd", old.version, alias)
    assert resolve(store, f"icd@{new.version[:4]}").version == old.version  # an alias comes before first digits,
    assert resolve(store, f"icd@{new.version}").version == new.version  # and a whole version before an alias


@pytest.mark.parametrize(
    "reference", ["", "@production", "ICD", "icd@", "icd@Production", "icd@a/b", "../icd", "a@b@c"]
)
def test_a_malformed_reference_is_the_users_error(store: Store, reference: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        resolve(store, reference)


def test_what_is_not_there_is_said_with_what_is(store: Store) -> None:
    with pytest.raises(ObjectMissing, match=r"no adapter 'icd' in .*: it has none"):
        resolve(store, "icd")
    version = published(store)
    with pytest.raises(ObjectMissing, match=r"no adapter 'idc' in .*: it has icd"):
        resolve(store, "idc")
    with pytest.raises(
        ObjectMissing, match=f"icd@staging is neither .* aliases are none; its versions {version.version}"
    ):
        resolve(store, "icd@staging")


def test_a_version_without_its_two_files_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match=r"without adapter_model\.safetensors"):
        publish_version(store, "icd", {"adapter_config.json": b"{}"}, lineage={})
    identity: dict[str, bytes | Path] = {"adapter_model.safetensors": b"", "adapter_config.json": b"{}"}
    with pytest.raises(UserError, match=r"lineage\.json is written from the lineage"):
        publish_version(store, "icd", {**identity, "lineage.json": b"{}"}, lineage={})
    with pytest.raises(UserError, match="adapter name 'Not good' is not allowed"):
        publish_version(store, "Not good", identity, lineage={})
    assert list(store.list("")) == []
    assert publish_version(store, "icd", identity, lineage={}).metrics == {}


def test_content_that_was_exchanged_together_with_its_manifest_is_not_published_over(store: Store) -> None:
    honest, other = published(store, b"honest"), published(store, b"other")
    for info in store.list(f"{version_key('icd', other.version)}/"):
        store.put(info.key.replace(other.version, honest.version), store.get(info.key))
    with pytest.raises(Conflict, match="another content of the same id"):
        published(store, b"honest")


def test_metrics_are_those_of_the_runs_evaluation_once_there_is_one(store: Store) -> None:
    version = published(store, run_id="run1")
    assert versions.evaluated(store, version).metrics == {}
    candidate = Measured(version=version.version, metrics={"exact_match": 0.72})
    evaluation = Evaluation(run_id="run1", records=1, models={"candidate": candidate})
    runs.write(store, "run1", evaluation)
    assert versions.evaluated(store, version).metrics == {"exact_match": 0.72}
    assert list_versions(store, "icd") == [versions.evaluated(store, version)]
    of_another = candidate.model_copy(update={"version": "v000"})
    runs.write(store, "run1", evaluation.model_copy(update={"models": {"candidate": of_another}}))
    assert versions.evaluated(store, version).metrics == {}
