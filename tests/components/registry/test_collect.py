"""What may go of a registry: nothing that an alias, a decision, a parent or a run on its way needs."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.records import runs
from components.records.steps import Decision, Evaluation, StepRecord, TrainResult
from components.registry import collect, signing
from components.registry.aliases import promote, rollback, sign_held
from components.registry.audit import audit
from components.registry.collect import Rules
from components.registry.event_log import append_event, events
from components.registry.identity import version_key
from components.registry.versions import Version, list_versions
from components.shared.errors import IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import ObjectInfo, Store
from tests.components.registry import adapters

LATER = datetime.now(UTC) + timedelta(days=60)


@pytest.fixture
def published(store: Store) -> list[Version]:
    """Six versions, oldest first: 0 and 1 held the alias, 4 grew from 2."""
    made: list[Version] = []
    for number in range(6):
        parents = [made[2].uri] if number == 4 else []
        made.append(adapters.published(store, b"%d" % number, run_id=f"r{number}", parents=parents))
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


def test_what_is_young_stays_and_so_do_the_newest(store: Store, published: list[Version]) -> None:
    assert removed(store, Rules(keep_last=0), now=datetime.now(UTC)) == []
    gone = [f"icd@{published[number].version}" for number in (5, 4, 3, 2)]
    assert removed(store, Rules(keep_last=0)) == gone
    assert removed(store, Rules(keep_last=2)) == gone[2:3]


def test_a_second_look_reads_and_sees_what_is_new(store: Store, published: list[Version]) -> None:
    for number in range(6, 12):
        published.append(adapters.published(store, b"%d" % number, run_id=f"r{number}"))
    rules, sent = Rules(keep_last=2), adapters.requests_of(store)
    gone = removed(store, rules)
    sent.clear()
    assert removed(store, rules) == gone
    assert len(sent) < len(published)
    promote(store, "icd", published[7].version)
    adapters.published(store, b"child", run_id="r", parents=[published[8].uri])
    assert set(gone) - set(removed(store, rules)) == {f"icd@{published[number].version}" for number in (7, 8)}


def test_no_forged_index_makes_anything_go(store: Store, published: list[Version]) -> None:
    """Packed here with plain gzip and json; the judge is what is read where there is no index."""
    gone, key = removed(store, Rules(keep_last=2)), "adapters/icd/index/documents.json.gz"
    champion, child, other = published[0].version, published[2].version, published[3].version
    changes: dict[str, Callable[[str], Any]] = {
        "in another's place": lambda text: text.replace(champion, other).replace(child, other),
        "longer": lambda text: text + " ",
        "shorter": lambda text: text.replace(published[2].uri, ""),
        "no text": lambda _text: {"parents": []},
        "beyond bytes": lambda text: "\u20ac" + text[1:],
        "junk": lambda text: "x" * len(text),
    }
    sound = json.loads(gzip.decompress(store.get(key)))
    documents = sound["documents"]
    assert any(champion in text for text in documents.values())
    for forged, change in changes.items():
        packed = {"documents": {file: change(text) for file, text in documents.items()}}
        store.put(key, gzip.compress(json.dumps(packed).encode()))
        assert removed(store, Rules(keep_last=2)) == gone, forged
        assert json.loads(gzip.decompress(store.get(key))) == sound, forged  # and is made anew


def test_what_was_revoked_goes_once_no_alias_points_at_it_and_keys_can_still_be_rotated(store: Store) -> None:
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    strict = Store(store._client, store.bucket, store.prefix, trusted_keys=[*map(signing.public_text, (old, new))])
    made = []
    for weights in (b"one", b"two", b"three"):
        made.append(adapters.published(store, weights).version)
        signing.sign(store, "icd", made[-1], old, alias="production")
        promote(strict, "icd", made[-1])
    for version in made[1:]:
        signing.revoke(store, "icd", version, old, reason="trained on an erased record")
    rules = Rules(keep_last=10)
    assert collect.removals(store, ["icd"], rules, now=LATER) == []  # to whom nobody is to be trusted, nobody revoked
    assert collect.removals(strict, ["icd"], rules, now=datetime.now(UTC)) == []
    (found,) = collect.removals(strict, ["icd"], rules, now=LATER)
    assert (found.name, found.why[-9:]) == (f"icd@{made[1]}", ", revoked")  # production is still at the third
    assert collect.remove(strict, found)
    assert {finding.what[:15] for finding in audit(strict, "icd").findings} == {"is in use as pr"}
    assert {each.version for each in sign_held(strict, "icd", new)} == {made[0], made[2]}
    with pytest.raises(ObjectMissing, match=made[1]):
        rollback(strict, "icd")
    rollback(strict, "icd", to=made[0])
    assert audit(strict, "icd").findings == ()
    assert {each.version for each in sign_held(strict, "icd", new)} == {made[0], made[2]}
    (last,) = collect.removals(strict, ["icd"], rules, now=LATER)
    assert collect.remove(strict, last)
    assert audit(strict, "icd").findings == ()
    assert [each.version for each in list_versions(strict, "icd")] == made[:1]
    assert [each.version for each in sign_held(strict, "icd", new)] == made[:1]


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


class Aged(Store):
    """The registry two months on, with what has been written since as new as it is."""

    new: tuple[str, ...] = ()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            is_new = info.key.startswith(self.new)
            yield info if is_new else replace(info, last_modified=info.last_modified - timedelta(days=60))


MADE_FROM: dict[str, Any] = {"run_id": "r", "dataset": {"dataset_id": "used"}, "base": {"reference": "org/base"}}


@pytest.fixture
def aged(store: Store) -> Aged:
    """A version that holds the alias; what it was made from, and as much that nothing was made from."""
    aged = Aged(store._client, store.bucket, store.prefix)
    lineage = {**MADE_FROM, "recipe": {"stands_on": store.uri("bases/used/content")}}
    promote(store, "icd", adapters.published(store, b"1", **lineage).version)
    for dataset in ("used", "left"):
        folders.publish(store, f"datasets/{dataset}", {"train/0.parquet": b"rows"})
        folders.publish(store, f"datasets/{dataset}/tokens/0123", {"tokens.npy": b"tokens"})
    for base in ("used", "left"):
        folders.publish(store, f"bases/{base}/content", {"model.safetensors": b"weights"})
        store.put_json(f"bases/{base}/chosen.json", {"folder": "content"})
    return aged


def shared(store: Store) -> list[tuple[str, str]]:
    found = collect.removals(store, ["icd"], Rules(), now=datetime.now(UTC))
    return [(each.kind, each.name) for each in found]


LEFT = [("dataset", "left"), ("base", "left")]


def test_datasets_and_bases_that_no_version_was_made_from_go_whole(aged: Aged) -> None:
    assert shared(aged) == LEFT
    found = collect.removals(aged, ["icd"], Rules(), now=datetime.now(UTC))
    assert all(collect.remove(aged, each) for each in found)
    left = {info.key.rpartition("/")[0] for folder in ("datasets/", "bases/") for info in aged.list(folder)}
    assert left == {
        "datasets/used", "datasets/used/train", "datasets/used/tokens/0123", "bases/used", "bases/used/content",
    }  # fmt: skip
    folders.verify(aged, "datasets/used", apart=["tokens"])
    folders.verify(aged, "datasets/used/tokens/0123")
    assert shared(aged) == []


def test_those_of_another_adapter_stay_and_so_does_what_is_new(aged: Aged) -> None:
    adapters.published(aged, b"2", name="other", **{**MADE_FROM, "dataset": {"dataset_id": "left"}})
    assert shared(aged) == []  # asked about one adapter alone
    found = collect.removals(aged, ["icd", "other"], Rules(), now=datetime.now(UTC))
    assert [(each.kind, each.name) for each in found] == LEFT[1:]
    aged.new = ("bases/left/",)
    assert collect.removals(aged, ["icd", "other"], Rules(), now=datetime.now(UTC)) == []


QLORA, LOFTQ = '[method]\nname = "qlora"', '[method]\nname = "loftq"'
PREPARED = StepRecord(step="prepare", status="succeeded", started_at="2026", seconds=1, result={"dataset_id": "left"})


@pytest.mark.parametrize(
    ("config", "record", "goes"),
    [
        (QLORA, None, LEFT[1:]),  # nobody knows which dataset it is on its way with
        (QLORA, PREPARED, LEFT[1:]),
        (LOFTQ, PREPARED, []),
        ('[method]\ninit = "loftq"', PREPARED, []),
        ('[tune]\nmethods = ["lora", "loftq"]', PREPARED, []),  # a sweep makes what it compares
        (LOFTQ, PREPARED.model_copy(update={"result": {"dataset_id": "another"}}), LEFT[:1]),
        (LOFTQ, Evaluation(run_id="r1", records=1, models={}), LEFT),  # it has ended
    ],
)
def test_a_run_that_is_under_way_keeps_what_it_may_need(
    aged: Aged, config: str, record: StepRecord | Evaluation | None, goes: list[tuple[str, str]]
) -> None:
    aged.new = ("runs/r1/",)
    aged.put(runs.run_key("r1", runs.CONFIG), config.encode())
    if record:
        runs.write(aged, "r1", record)
    assert shared(aged) == goes


def test_what_a_run_that_began_after_the_look_may_need_stays(aged: Aged) -> None:
    found = collect.removals(aged, ["icd"], Rules(), now=datetime.now(UTC))
    aged.put(runs.run_key("r9", runs.CONFIG), b"")
    assert [collect.remove(aged, each) for each in found] == [False, False]
    folders.verify(aged, "datasets/left", apart=["tokens"])


@pytest.mark.parametrize("when", ["before the look", "after the look", "while it goes", "once it is gone"])
def test_an_old_version_that_a_run_trains_again_stays(store: Store, published: list[Version], when: str) -> None:
    """The run has begun, and has not told yet what it made."""
    old, again = published[3], partial(adapters.published, store, b"3")

    class Meanwhile(Store):
        """The run publishes right before, or right after, the manifest is deleted."""

        def delete(self, keys: Iterable[str]) -> None:
            wanted = [*keys]
            is_manifest = wanted == [f"adapters/icd/versions/{old.version}/manifest.json"]
            if is_manifest and when == "while it goes":
                again(run_id="r9")
            super().delete(wanted)
            if is_manifest and when == "once it is gone":
                again(run_id="r9")

    store.put(runs.run_key("r9", runs.CONFIG), b"[train]")
    rules, now = Rules(keep_last=2, older_than=timedelta(0)), datetime.now(UTC)
    if when == "before the look":
        again(run_id="r9")
    found = collect.removals(store, ["icd"], rules, now=now)
    assert [each.name for each in found] == ([] if when == "before the look" else [f"icd@{old.version}"])
    if when == "after the look":
        again(run_id="r9")
    meanwhile = Meanwhile(store._client, store.bucket, store.prefix)
    assert not any(collect.remove(meanwhile, each) for each in found)
    assert old.version in {each.version for each in list_versions(store, "icd")}
    assert audit(store, "icd").findings == ()
    assert again(run_id="r9") == again(run_id="r3")
    assert len([event for event in events(store, "icd") if event.body.get("version") == old.version]) <= 4


def test_what_a_killed_publication_or_removal_left_goes_once_it_is_old(aged: Aged) -> None:
    (held,) = list_versions(aged, "icd")
    left = version_key("icd", "v" + "0" * 15)
    aged.put(f"{left}/adapter_model.safetensors", b"half")
    aged.put(f"{left}/lineage.json", b"{}")

    def unfinished(store: Store = aged) -> list[collect.Removal]:
        found = collect.removals(store, ["icd"], Rules(), now=datetime.now(UTC))
        return [each for each in found if each.kind == "unfinished"]

    aged.new = (left,)
    assert unfinished() == []
    aged.new = ()
    (found,) = unfinished()
    assert (found.name, found.size_bytes) == (f"icd@v{'0' * 15}", 6)
    aged.put(runs.run_key("r9", runs.CONFIG), b"")
    aged.new = ("runs/",)
    assert unfinished() == []  # it may be what that run is about to publish
    assert not collect.remove(aged, found)
    runs.write(aged, "r9", Decision(decision="hold", adapter="icd", alias="production", run_id="r9", reasons=()))
    (found,) = unfinished()
    aged.put(f"{left}/manifest.json", b"{}")
    assert not collect.remove(aged, found)  # it was completed meanwhile
    aged.delete([f"{left}/manifest.json"])
    assert collect.remove(aged, found)
    assert {info.key.split("/")[3] for info in aged.list("adapters/icd/versions/")} == {held.version}


@pytest.mark.parametrize("what", ["lineage.json", "manifest.json", "event"])
def test_nothing_goes_where_damage_hides_what_is_needed(aged: Aged, what: str) -> None:
    (version,) = list_versions(aged, "icd")
    moved = next(event for event in events(aged, "icd") if event.kind == "promoted")
    aged.put(aged.key(moved.uri) if what == "event" else f"adapters/icd/versions/{version.version}/{what}", b"{}")
    with pytest.raises(IntegrityError):
        shared(aged)


AT_ONCE = Rules(keep_last=0, older_than=timedelta(0))


def test_what_a_run_under_way_starts_from_made_and_trains_on_stays_whatever_the_age_asked_for(store: Store) -> None:
    versions = (adapters.published(store, b"%d" % number, run_id=f"r{number}") for number in range(5))
    start, by_its_digits, made, again, unneeded = versions
    for dataset in ("trained-on", "left"):
        folders.publish(store, f"datasets/{dataset}", {"train/0.parquet": b"rows"})
    prepared = PREPARED.model_copy(update={"result": {"dataset_id": "trained-on"}})
    config = f'{QLORA}\n[train]\nstart_from = "icd@{by_its_digits.version[:9]}"'
    for run_id in ("r2", "another"):
        store.put(runs.run_key(run_id, runs.CONFIG), config.encode())
        runs.write(store, run_id, prepared)
    store.put_json(runs.run_key("another", runs.START), {"version": f"icd@{start.version}"})
    runs.write(store, "another", TrainResult(version=again.version, version_uri=again.uri))

    def found() -> set[tuple[str, str]]:
        return {(each.kind, each.name) for each in collect.removals(store, ["icd"], AT_ONCE, now=datetime.now(UTC))}

    left = {("version", f"icd@{unneeded.version}"), ("dataset", "left")}
    assert found() == left
    for run_id in ("r2", "another"):
        runs.write(store, run_id, Evaluation(run_id=run_id, records=1, models={}))
    trained = {f"icd@{each.version}" for each in (start, by_its_digits)}
    assert found() == left | {("dataset", "trained-on"), *(("version", name) for name in trained)}
    for run_id in ("r2", "another"):
        about = {"decision": "hold", "alias": "production", "reasons": ("worse",)}
        runs.write(store, run_id, Decision(adapter="icd", run_id=run_id, **about))
    ended = {f"icd@{each.version}" for each in (made, again, unneeded)}
    assert {name for kind, name in found() if kind == "version"} == trained | ended


def test_a_proposal_stays_while_it_can_be_approved(store: Store, published: list[Version]) -> None:
    champion, other, waits = published[0].version, published[1].version, published[3].version
    proposal = {"version": waits, "alias": "production", "champion": champion, "run_id": "r3"}
    append_event(store, "icd", "proposed", proposal)
    assert f"icd@{waits}" not in removed(store, Rules(keep_last=0))
    promote(store, "icd", other)
    assert f"icd@{waits}" in removed(store, Rules(keep_last=0))


@pytest.mark.parametrize(
    ("file", "body"),
    [
        *[(runs.CONFIG, body) for body in (b"[model", b"\xff", b"[" * 100_000, b"train = 5", b"[method]\nname = []")],
        *[(runs.START, body) for body in (b"[]", b"{}", b"[" * 100_000)],
        *[(file, b"{") for file in (runs.DECISION, TrainResult.FILE, runs.EVALUATION, f"{runs.STEPS}gate.json")],
    ],
)
def test_nothing_goes_where_nobody_knows_what_a_run_needs(store: Store, file: str, body: bytes) -> None:
    store.put(runs.run_key("r1", file), body)
    with pytest.raises(
        IntegrityError, match=r"runs/r1/ is damaged .*: remove that folder, unless the run still goes on$"
    ):
        removed(store, Rules(), now=datetime.now(UTC))
    assert removed(store, Rules()) == []  # of a run that has rested, nothing is asked
