"""What may go of a registry: nothing that an alias, a decision, a parent or a run on its way needs."""

from datetime import UTC, datetime, timedelta

import pytest

from components.registry import collect, runs
from components.registry.aliases import promote, rollback
from components.registry.audit import audit
from components.registry.collect import Rules
from components.registry.event_log import events
from components.registry.records import Decision
from components.registry.store import Store
from components.registry.versions import Version, list_versions, publish_version

LATER = datetime.now(UTC) + timedelta(days=60)


@pytest.fixture
def published(store: Store) -> list[Version]:
    """Six versions, oldest first: 0 and 1 held the alias, 4 grew from 2."""
    made: list[Version] = []
    for number in range(6):
        files = {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
        parents = [made[2].uri] if number == 4 else []
        made.append(publish_version(store, "icd", files, lineage={"run_id": f"r{number}", "parents": parents}))
    for version in made[:2]:
        promote(store, "icd", version.version)
    rollback(store, "icd")
    return made


def removed(store: Store, rules: Rules, now: datetime = LATER) -> list[str]:
    return [each.name for each in collect.removals(store, ["icd"], rules, now=now)]


def test_what_nothing_needs_goes_and_an_audit_finds_nothing_amiss(store: Store, published: list[Version]) -> None:
    rules = Rules(keep_last=2, older_than=timedelta(days=30))
    found = collect.removals(store, ["icd"], rules, now=LATER)
    assert [each.name for each in found] == [f"icd@{published[3].version}"]
    assert list_versions(store, "icd")[2].version == published[3].version  # to look is to remove nothing
    assert all(collect.remove(store, each) for each in found)
    assert [each.version for each in list_versions(store, "icd")] == [published[n].version for n in (5, 4, 2, 1, 0)]
    assert list(store.list(f"adapters/icd/versions/{published[3].version}/")) == []
    assert events(store, "icd")[-1].kind == "collected"
    assert audit(store, "icd").findings == ()
    assert removed(store, rules) == []


def test_what_is_young_stays_and_without_a_newest_to_keep_only_what_is_needed_does(
    store: Store, published: list[Version]
) -> None:
    assert removed(store, Rules(keep_last=0), now=datetime.now(UTC)) == []
    gone = [f"icd@{published[number].version}" for number in (5, 4, 3, 2)]
    assert removed(store, Rules(keep_last=0)) == gone
    assert removed(store, Rules(keep_last=2)) == gone[2:3]


def test_a_version_that_took_an_alias_after_the_look_stays_whole(store: Store, published: list[Version]) -> None:
    (found,) = collect.removals(store, ["icd"], Rules(keep_last=2), now=LATER)
    promote(store, "icd", published[3].version)
    assert not collect.remove(store, found)
    assert audit(store, "icd").findings == ()


def test_checkpoints_go_when_their_run_has_decided(store: Store) -> None:
    for run_id in ("decided", "training", "of-another"):
        store.put(runs.run_key(run_id, f"{runs.CHECKPOINTS}step-1/shared/state.json"), b"123")
    about = {"decision": "hold", "alias": "production", "reasons": ("worse",)}
    runs.write(store, "decided", Decision(adapter="icd", run_id="decided", **about))
    runs.write(store, "of-another", Decision(adapter="other", run_id="of-another", **about))
    (found,) = collect.removals(store, ["icd"], Rules(), now=LATER)
    assert (found.kind, found.name, found.size_bytes) == ("checkpoints", "decided", 3)
    assert collect.remove(store, found)
    assert removed(store, Rules()) == []
    assert store.exists(runs.run_key("training", f"{runs.CHECKPOINTS}step-1/shared/state.json"))
    assert store.exists(runs.run_key("decided", runs.DECISION))
