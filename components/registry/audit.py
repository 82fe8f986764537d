"""Reads a whole registry and checks that it agrees with itself: files, ids, signatures, the log and the aliases.

No index is trusted, and one bad object does not hide another.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from components.records import runs
from components.records.steps import Decision, Evaluation
from components.registry import aliases, between_runs, signing, versions
from components.registry.aliases import Pointer, read_alias
from components.registry.cache import READS_AT_ONCE
from components.registry.event_log import MOVE_KINDS, Event, decisions, events_key, is_chain, moves, read_log
from components.registry.identity import TOKENS, adapter_key, verify_whole, version_key
from components.shared.errors import IntegrityError, ObjectMissing, UserError
from components.store.folders import Manifest, verify
from components.store.store import Store, decode_json

DATASETS = "datasets/"


@dataclass(frozen=True)
class Finding:
    """Something in the store that is not as the registry writes it."""

    where: str
    """The address of the object or folder."""
    what: str


@dataclass(frozen=True)
class Audit:
    """The result for one adapter: how much was read, and what is wrong with it."""

    name: str
    versions: int
    events: int
    findings: tuple[Finding, ...]


def audit(store: Store, name: str, require_records: Callable[[Store, str], None] | None = None) -> Audit:
    """Read and check everything of the adapter, including every byte of its versions, several side by side.

    `require_records` raises IntegrityError where the dataset at a URI has other records than its id was made of.
    """
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        log, junk = read_log(store, name)
        findings = [Finding(store.uri(key), f"is not an event: {why}") for key, why in junk.items()]
        ids = versions.version_ids(store, name)
        read = dict(zip(ids, pool.map(lambda version: _whole(store, version_key(name, version)), ids), strict=True))
        whole = {version: manifest for version, manifest in read.items() if isinstance(manifest, Manifest)}
        findings += [damage for damage in read.values() if isinstance(damage, Finding)]
        damaged = {finding.where for finding in findings}
        findings += _publications(store, name, log, whole, damaged)
        findings += _refusals(store, name, log, whole, pool)
        named = [(run_id, *evidence) for run_id, evidence in decisions(log).items()]
        looks = [event for event in log if event.kind == "checked"]
        named += [(str(look.body.get("run_id")), str(look.body.get("evaluation_sha256")), look) for look in looks]
        findings += chain.from_iterable(pool.map(lambda evidence: [*_evidence(store, *evidence)], named))
        findings += _unsigned(store, name, log, pool)
        findings += _inputs(store, name, whole, pool, require_records)
        pointers: dict[str, Pointer] = {}
        for info in store.list(adapter_key(name, "aliases/")):
            alias = info.key.rpartition("/")[2].removesuffix(".json")
            try:
                if (pointer := read_alias(store, name, alias)) is None:
                    raise IntegrityError("is not an alias")
                pointers[alias] = pointer
                findings += _alias(store, name, pointer, log, whole)
            except (IntegrityError, UserError) as exc:
                findings.append(Finding(store.uri(info.key), str(exc)))
        findings += [
            Finding(event.uri, f"moved {name}@{event.body['alias']}, which there is no more")
            for event in log
            if event.kind in MOVE_KINDS
            and not store.exists(adapter_key(name, "aliases", f"{event.body['alias']}.json"))
        ]
        findings += _signatures(store, name, whole, [*pointers.values()], pool)
        try:  # it may be gone: then everything counts as new
            if consumed := between_runs.read_watermark(store, name):
                between_runs.consumed_contents(store, consumed)
        except IntegrityError as exc:
            where = store.uri(adapter_key(name, "watermark.json"))
            findings.append(Finding(where, f"leads to what cannot be read: {exc}"))
        return Audit(name, len(whole), len(log), tuple(findings))


def _whole(store: Store, key: str) -> Manifest | Finding | None:
    """The manifest of a version that is whole, or else what is wrong; None if its publication is not complete."""
    try:
        return verify_whole(store, key)
    except ObjectMissing:
        return None
    except IntegrityError as exc:
        return Finding(store.uri(key), str(exc))


def _publications(
    store: Store, name: str, log: list[Event], whole: dict[str, Manifest], damaged: set[str]
) -> Iterator[Finding]:
    published: dict[str, Event] = {}
    collected: set[str] = set()
    for event in log:
        version = str(event.body.get("version"))
        if event.kind == "collected":
            collected.add(version)
        elif event.kind == "published":
            first = published.get(version, event)
            if version not in collected and first.body.get("manifest_sha256") != event.body.get("manifest_sha256"):
                yield Finding(event.uri, f"says of {version} another manifest than {first.uri} does")
            published[version] = event
            collected.discard(version)  # repeating the same training publishes it again
    for version, manifest in whole.items():
        uri = store.uri(version_key(name, version))
        if version not in published:
            yield Finding(uri, "has no event that says it was published")
        elif published[version].body.get("manifest_sha256") != manifest.sha256:
            yield Finding(uri, f"has another manifest than was published ({published[version].uri})")
    for version, event in published.items():
        uri = store.uri(version_key(name, version))
        if version not in whole and uri not in damaged and version not in collected:
            yield Finding(uri, f"was published ({event.uri}), and is gone")


def _refusals(
    store: Store, name: str, log: list[Event], whole: dict[str, Manifest], pool: Executor
) -> Iterator[Finding]:
    refusals = [event for event in log if event.kind in ("refused", "proposed")]
    refused = {(event.body.get("version"), event.body.get("run_id")) for event in refusals}
    published = {event.body.get("version") for event in log if event.kind == "published"}
    decided = pool.map(lambda event: runs.has_decided(store, str(event.body.get("run_id", ""))), refusals)
    for event, has_decided in zip(refusals, decided, strict=True):
        version, run_id = event.body.get("version"), str(event.body.get("run_id", ""))
        if version not in published:
            yield Finding(event.uri, f"is about {version}, which was never published")
        elif not has_decided:
            yield Finding(event.uri, f"is about a decision of run {run_id}, which made none")

    def unlogged(version: str) -> Finding | None:
        run_id = str(whole[version].about.get("run_id", ""))
        try:
            decision = runs.find(store, run_id, Decision, to_show=True) if run_id else None
        except IntegrityError as exc:
            return Finding(store.uri(runs.run_key(run_id, Decision.FILE)), str(exc))
        is_held = decision and decision.version == version and decision.decision == "hold"
        if decision and is_held and not decision.changes_nothing and (version, run_id) not in refused:
            return Finding(store.uri(version_key(name, version)), f"was held by run {run_id}, and no event says so")
        return None

    yield from filter(None, pool.map(unlogged, whole))


EVIDENCE = {runs.DECISION: Decision, runs.EVALUATION: Evaluation, runs.EVALUATION_RECORDS: None}
"""A run's files of which each names the next by its sha256: an event names a decision, or, of a look, an evaluation."""


def _evidence(store: Store, run_id: str, wanted: str, event: Event) -> Iterator[Finding]:
    """Check the files of a run that the event names by the sha256 of the first of them."""
    named_by = event.uri
    for file, kind in EVIDENCE.items():
        if event.kind == "checked" and kind is Decision:
            continue
        body, key = runs.lying(store, run_id, file) or (None, runs.key_of(store, run_id, file))
        uri = store.uri(key)
        try:
            if body is None:
                raise IntegrityError(f"is gone, and {named_by} names it")
            if hashlib.sha256(body).hexdigest() != wanted:
                raise IntegrityError(f"is another than {named_by} names")
            record = kind.from_json(body, uri) if kind else None
        except IntegrityError as exc:
            yield Finding(uri, str(exc))
            break
        wanted = record.evaluation_sha256 if isinstance(record, Decision) else ""
        wanted = record.records_sha256 if isinstance(record, Evaluation) else wanted
        named_by = uri


def _unsigned(store: Store, name: str, log: list[Event], pool: Executor) -> Iterator[Finding]:
    """Name decisions that rest on nothing signed, if they were written after one that does: by the store's clock."""
    of_gates = [
        event
        for event in log
        if event.kind in ("refused", "proposed")
        or (event.kind == "promoted" and "sha256" in event.body.get("evidence", {}))
    ]
    if not store.evaluation_keys or not of_gates:
        return
    behind = [*pool.map(lambda event: signing.decision_behind(store, name, event), of_gates)]
    written = {store.uri(info.key): info.last_modified for info in store.list(events_key(name))}
    since = [written[event.uri] for event, decision in zip(of_gates, behind, strict=True) if decision]
    for event, decision in zip(of_gates, behind, strict=True):
        if since and decision is None and written[event.uri] >= min(since):
            why = "which no evaluation signed by one of registry.evaluation_keys is behind: it counts for nothing"
            yield Finding(event.uri, f"is about a decision of run {event.body.get('run_id')}, {why}")


def _inputs(
    store: Store,
    name: str,
    whole: dict[str, Manifest],
    pool: Executor,
    require_records: Callable[[Store, str], None] | None,
) -> Iterator[Finding]:
    """Check the datasets that the versions name, and the bases that Fineloop made."""
    named: dict[str, tuple[str, str | None]] = {}
    trained_on: dict[tuple[str, str], str] = {}
    bodies = pool.map(lambda version: store.read(f"{version_key(name, version)}/{versions.LINEAGE}"), whole)
    for version, body in zip(whole, bodies, strict=True):
        uri = store.uri(version_key(name, version))
        try:
            lineage = decode_json(body[0] if body else b"", f"{uri}/{versions.LINEAGE}")
            dataset, recipe = lineage.get("dataset") or {}, lineage.get("recipe", {})
            if "dataset_id" in dataset:
                key = f"{DATASETS}{dataset['dataset_id']}"
                named.setdefault(key, (version, dataset.get("manifest_sha256")))
                for folder, sha256 in (dataset.get("tokens") or {}).items():
                    trained_on[f"{key}/{TOKENS}/{folder}", str(sha256)] = version
            if (base := str(recipe.get("stands_on", ""))).startswith(store.uri("bases/")):
                named.setdefault(store.key(base), (version, recipe.get("stands_on_sha256")))
        except (IntegrityError, ObjectMissing, AttributeError, TypeError) as exc:
            yield Finding(uri, f"has no sound {versions.LINEAGE}: {exc}")
    for key, (version, sha256) in named.items():
        try:
            manifest = verify(store, key, manifest_sha256=sha256, apart=[TOKENS] if key.startswith(DATASETS) else ())
            if require_records and key.startswith(DATASETS):
                require_records(store, store.uri(key))
            folder, _, content = key.rpartition("/")
            if folder.startswith("bases/"):
                if not manifest.content_sha256.startswith(content):
                    raise IntegrityError(f"{store.uri(key)} holds another base than its name says")
                chosen = store.get_json(f"{folder}/chosen.json")
                wanted = {"folder": content, "manifest_sha256": manifest.sha256}
                if not isinstance(chosen, dict) or not wanted.items() <= chosen.items():
                    raise IntegrityError(f"{store.uri(f'{folder}/chosen.json')} names another base or manifest")
        except (IntegrityError, ObjectMissing) as exc:
            yield Finding(store.uri(key), f"is what {version} was made of, and {exc}")
        yield from _tokens(store, f"{key}/{TOKENS}/", trained_on)


def _tokens(store: Store, prefix: str, trained_on: Mapping[tuple[str, str], str]) -> Iterator[Finding]:
    """Check the tokens of a dataset, which trainings read; `trained_on` has the version by their folder and sha256."""
    for name in store.folders(prefix):
        try:
            stored = verify(store, f"{prefix}{name}").content_sha256
            for (key, sha256), version in trained_on.items():
                if key == f"{prefix}{name}" and sha256 != stored:
                    yield Finding(store.uri(key), f"has sha256 {stored}, and {version} was trained on {sha256}")
        except ObjectMissing:  # a publication that is not complete
            continue
        except IntegrityError as exc:
            yield Finding(store.uri(f"{prefix}{name}"), str(exc))


def _alias(
    store: Store, name: str, pointer: Pointer, log: list[Event], whole: dict[str, Manifest]
) -> Iterator[Finding]:
    uri = store.uri(adapter_key(name, "aliases", f"{pointer.alias}.json"))
    manifest = whole.get(pointer.version)
    if manifest is None:
        yield Finding(uri, f"points at {pointer.version}, which is damaged or gone")
    elif manifest.sha256 != pointer.manifest_sha256:
        yield Finding(uri, f"vouches for another manifest of {pointer.version} than is stored")
    moved = moves(log, pointer.alias)
    if not moved or moved[-1].time != pointer.since or moved[-1].body != {**pointer.event, "since": pointer.since}:
        yield Finding(uri, "points elsewhere than its last event says")
    if moved and not is_chain(moved):
        yield Finding(uri, "has events that do not lead from one to the next: one is missing, changed or was added")


def _signatures(
    store: Store, name: str, whole: dict[str, Manifest], pointers: list[Pointer], pool: Executor
) -> Iterator[Finding]:
    ids = sorted(whole)
    signed = pool.map(lambda key: signing.statements(store, name, key, whole[key].sha256, store.trusted_keys), ids)
    statements = dict(zip(ids, signed, strict=True))
    for of_version in statements.values():
        yield from (Finding(uri, f"is no signature: {why}") for uri, why in of_version.junk.items())
    for pointer in pointers if store.trusted_keys else []:
        try:
            needed = aliases.rollback_versions(store, name, pointer)
        except IntegrityError as exc:
            yield Finding(store.uri(adapter_key(name, "aliases", f"{pointer.alias}.json")), str(exc))
            needed = {pointer.version: pointer.manifest_sha256}
        for version in needed.keys() & statements.keys():
            uri, stated = store.uri(version_key(name, version)), statements[version]
            is_held = version == pointer.version
            why = f"is in use as {pointer.alias}" if is_held else f"is what a rollback of {pointer.alias} may need"
            if stated.revoked_by and is_held:
                yield Finding(uri, f"{why}, and revoked: {stated.reason} ({stated.revoked_by})")
            elif not stated.revoked_by and pointer.alias not in stated.passed:
                how = f"`fineloop adapters sign --held {name}`"
                yield Finding(uri, f"{why}, and signed by none of registry.trusted_keys for that: {how} does")
