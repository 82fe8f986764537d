"""`fineloop adapters` and `fineloop push`: what is in the registry, what its aliases point at, and how it leaves it."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared.machine import account
from components.shared.protocol import counted
from pipelines.commands.arguments import (
    Answer,
    Command,
    add_command,
    add_group,
    load_config,
    opened_registry,
    print_err,
    table,
)

if TYPE_CHECKING:
    from components.promote.promote import Person
    from components.registry.event_log import Event
    from components.registry.signing import Signer
    from components.registry.versions import Version
    from components.store.store import Store

SERVERS = ("ray-serve", "kserve", "vllm", "vllm-resolver")
REFERENCE = "NAME, NAME@ALIAS or NAME@VERSION; first digits of a version suffice"
FORMS_OF = {"base": ("merged", "gguf"), "dtype": ("merged", "gguf"), "approximate": ("lora",), "converter": ("gguf",)}
"""The options of `export` that not every form has."""
LONGEST_EVENT = 100


def add_adapters(commands: Any) -> None:
    verbs = add_group(
        commands,
        "adapters",
        does="list, show, promote, roll back, verify, fetch and export adapters",
        more="What is in the registry, and what its aliases point at.",
        example="fineloop adapters show icd10-chapters",
    )
    listing = _add(verbs, "list", _list, "List the adapters, or the versions of one.", "fineloop adapters list")
    listing.add_argument("name", nargs="?", default="", metavar="NAME", help="adapter whose versions to list")

    _reference(_add(verbs, "show", _show, "Show one version.", "fineloop adapters show icd10-chapters@production"))

    promote = _add(
        verbs,
        "promote",
        _promote,
        "Point an alias at a version, whatever the gate said.",
        "fineloop adapters promote icd10-chapters@v3f2 --reason 'checked by hand'",
    )
    _reference(promote)
    approve = _add(
        verbs,
        "approve",
        _approve,
        "Point an alias at a version that the gate left to a person.",
        "fineloop adapters approve icd10-chapters@v3f2 --by ada --reason 'read fifty answers'",
    )
    _reference(approve)
    rollback = _add(
        verbs,
        "rollback",
        _rollback,
        "Point an alias back at the version that held it before.",
        "fineloop adapters rollback icd10-chapters",
    )
    rollback.add_argument("name", metavar="NAME", help="adapter")
    rollback.add_argument(
        "--to", default=None, metavar="VERSION", help="go back to this one instead; first digits suffice"
    )
    for parser in (promote, rollback):
        parser.add_argument(
            "--expect", default=None, metavar="VERSION", help="only when this version holds the alias now"
        )
        parser.add_argument("--by", default="", metavar="NAME", help="who answers for it, needed to override the gate")
        parser.add_argument("--reason", default="", metavar="TEXT", help="kept in the event log, needed likewise")
    approve.add_argument("--by", required=True, metavar="NAME", help="who answers for it")
    approve.add_argument("--reason", required=True, metavar="TEXT", help="kept in the event log")
    for parser in (promote, approve, rollback):
        parser.add_argument("--alias", default="production", metavar="ALIAS", help="default: production")

    does = "Notify Model Registry, MLflow and webhook, as far as the config names them, of where an alias points."
    announced = _add(verbs, "announce", _announce, does, "fineloop adapters announce icd10-chapters@production", False)
    announced.add_argument("alias", metavar="NAME[@ALIAS]", help="adapter, and alias if it is not production")

    history = _add(verbs, "history", _history, "Print what happened to an adapter.", "fineloop adapters history NAME")
    history.add_argument("name", metavar="NAME", help="adapter")

    does = "Print what a version was made of: config, data, base, code; or which versions were made of something."
    lineage = _add(verbs, "lineage", _lineage, does, "fineloop adapters lineage icd10-chapters --of dataset=4f1c")
    _reference(lineage)
    lineage.add_argument("--tree", action="store_true", help="draw it, with the versions that it grew from")
    lineage.add_argument(
        "--of",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="instead, list the adapter's versions made of it: dataset, source, base, commit, config or parent",
    )

    verify = "Read every byte of a version and check it against its manifest."
    _reference(_add(verbs, "verify", _verify, verify, "fineloop adapters verify icd10-chapters@v3f2"))

    _add_signatures(verbs)

    audit = "Read everything, and compare files, ids, signatures, the event log and the aliases with each other."
    audited = _add(verbs, "audit", _audit, audit, "fineloop adapters audit")
    audited.add_argument("name", nargs="?", default="", metavar="NAME", help="default: every adapter")

    does = "Print what nothing needs: versions, checkpoints, datasets and bases; --delete removes it."
    collect = _add(verbs, "gc", _gc, does, "fineloop adapters gc icd10-chapters --keep-last 5")
    collect.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="default: every adapter, and what they share"
    )
    collect.add_argument(
        "--keep-last", type=int, default=10, metavar="N", help="newest versions of an adapter to keep (10)"
    )
    collect.add_argument("--older-than-days", type=float, default=30, metavar="DAYS", help="keep what is younger (30)")
    act = collect.add_mutually_exclusive_group()
    act.add_argument("--dry-run", action="store_true", help="only print what would be removed; the default")
    act.add_argument("--delete", action="store_true", help="remove it")

    pull = _add(verbs, "pull", _pull, "Fetch a version, verified, for peft or a server.", "fineloop adapters pull NAME")
    _reference(pull)
    pull.add_argument("--to", type=Path, default=None, metavar="DIR", help="default: ./NAME-VERSION")
    pull.add_argument(
        "--with-base", action="store_true", help="also fetch the base that LoftQ made for it, to DIR-base"
    )

    does = "Write what a server needs to serve a version: Ray Serve LLM, KServe or vLLM."
    served = _add(verbs, "serve-manifest", _serve_manifest, does, "fineloop adapters serve-manifest NAME --for kserve")
    _reference(served)
    served.add_argument("--for", dest="server", required=True, choices=SERVERS)

    does = "Write the registry as web pages: what is in production, since when and why, versions, scores, events."
    page = _add(verbs, "page", _page, does, "fineloop adapters page --to ./registry", False)
    page.add_argument("name", nargs="?", default="", metavar="NAME", help="default: every adapter")
    page.add_argument("--to", type=Path, default=Path("registry-page"), metavar="DIR", help="default: ./registry-page")

    _add_export(verbs)


def _add(
    verbs: Any, name: str, command: Command, does: str, example: str, is_listed: bool = True
) -> argparse.ArgumentParser:
    parser = add_command(verbs, name, command, does=does, example=example, is_listed=is_listed, opens_registry=True)
    return parser


def _reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)


def _list(options: argparse.Namespace) -> Answer:
    from components.registry import versions
    from components.registry.collect import all_adapters

    with opened_registry(options) as store:
        if options.name:
            versions.require_adapter(store, options.name)
            found = versions.list_versions(store, options.name)
            described = [_described(version) for version in found]
            return Answer({"name": options.name, "versions": described}, _version_table(found))
        adapters: list[dict[str, Any]] = [
            {"name": name, "newest": each.newest, "versions": each.versions, "aliases": each.aliases}
            for name, each in all_adapters(store).items()
        ]
        rows = [("adapter", "versions", "newest", "aliases")]
        for each in adapters:
            aliases = " ".join(f"{alias}={version}" for alias, version in each["aliases"].items())
            rows.append((each["name"], str(each["versions"]), each["newest"] or "-", aliases or "-"))
        none = f"no adapters in {store.uri('')} yet: `fineloop run` makes one"
        return Answer({"adapters": adapters}, table(rows) if adapters else none)


def _version_table(found: "list[Version]") -> str:
    rows = [("version", "published", "run", "aliases")]
    return table(
        [*rows, *((v.version, v.created_at[:19], v.run_id or "-", ", ".join(v.aliases) or "-") for v in found)]
    )


def _described(version: "Version") -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "version_uri": version.uri,
        "created_at": version.created_at,
        "run_id": version.run_id,
        "aliases": list(version.aliases),
        "manifest_sha256": version.manifest_sha256,
        "metrics": dict(version.metrics),
    }


def _show(options: argparse.Namespace) -> Answer:
    from components.handover.serve_manifest import recorded
    from components.records.steps import finite
    from components.registry import versions
    from components.shared.metrics import metrics_of

    with opened_registry(options) as store:
        version = versions.evaluated(store, versions.resolve(store, options.reference))
        served = recorded(versions.read_lineage(store, version))
    metrics = ", ".join(
        f"{metric.label} {metric.text(value)}"
        for metric in metrics_of(version.metrics)
        if (value := finite(version.metrics.get(metric.key))) is not None
    )
    rows = [
        ("adapter", version.name),
        ("version", version.version),
        ("uri", version.uri),
        ("aliases", ", ".join(version.aliases) or "-"),
        ("published", version.created_at),
        ("run", version.run_id or "-"),
        ("metrics", metrics or "-"),
        ("manifest", f"sha256 {version.manifest_sha256}"),
        ("serve as", served.servable_as),
        *(("", note) for note in served.notes),
    ]
    return Answer({**_described(version), "servable_as": served.servable_as, "serving": served.notes}, table(rows))


def _promote(options: argparse.Namespace) -> Answer:
    from components.promote.promote import promote_by_hand

    wanted, name = {"alias": options.alias, "expected": _expected(options)}, options.reference.partition("@")[0]
    return _moved(options, name, lambda store: promote_by_hand(store, options.reference, _person(options), **wanted))


def _approve(options: argparse.Namespace) -> Answer:
    from components.promote.promote import approve

    name, alias = options.reference.partition("@")[0], options.alias
    return _moved(options, name, lambda store: approve(store, options.reference, _person(options), alias=alias))


def _rollback(options: argparse.Namespace) -> Answer:
    from components.promote.promote import roll_back_by_hand

    wanted = {"alias": options.alias, "to": options.to, "expected": _expected(options)}
    return _moved(
        options, options.name, lambda store: roll_back_by_hand(store, options.name, _person(options), **wanted)
    )


def _moved(options: argparse.Namespace, name: str, move: "Callable[[Store], Event]") -> Answer:
    """Move an alias and print it, and notify the servers that the config names; not where it was there before."""
    from components.promote.announce import announce
    from components.registry.aliases import read_alias
    from components.registry.cache import forget

    with opened_registry(options) as store:
        store.check()
        before = read_alias(store, name, options.alias)
        event = move(store)
        forget(store, name)
        announced = announce(load_config(options).announce, store, name, event, os.environ)
    return move_shown(name, event, announced, moved=before is None or before.since != event.time)


def move_shown(name: str, event: "Event", announced: Mapping[str, str], *, moved: bool) -> Answer:
    """A promotion or a rollback, and the outcome of its notifications; `moved` is False where it changed nothing."""
    move = event.move()
    text = f"{move['from'] or 'none'} -> {move['to']}"
    if not moved:
        text = f"already {move['to']} since {event.time[:16].replace('T', ' ')} UTC"
    elif before := event.body.get("evidence", {}).get("anchor_before"):
        text += f"\nlater candidates are held to {move['to']} as the best version so far, in the place of {before}"
    body: dict[str, Any] = {**move, **({} if moved else {"moved": False})}
    return Answer({**body, **({"announced": dict(announced)} if announced else {})}, f"{name}@{move['alias']}: {text}")


def _expected(options: argparse.Namespace) -> str | None:
    from components.registry.aliases import ANYONE

    return ANYONE if options.expect is None else options.expect or None


def _person(options: argparse.Namespace) -> "Person":
    from components.promote.promote import Person

    return Person(options.by, options.reason, otherwise=account(os.environ))


def _announce(options: argparse.Namespace) -> Answer:
    from components.promote.announce import NOTIFIED, NOTIFIERS, announce
    from components.registry.aliases import last_move
    from components.shared.errors import UserError

    config = load_config(options).announce
    if not any(dict(config).values()):
        raise UserError(
            f"the config names nothing to notify: set one of {', '.join(f'announce.{key}' for key in NOTIFIERS)}"
        )
    name, _, alias = options.alias.partition("@")
    with opened_registry(options) as store:
        event = last_move(store, name, alias or "production")
        announced = announce(config, store, name, event, os.environ)
    alias, version = event.body["alias"], event.body["to"]
    rows = [(f"announce.{key}", outcome) for key, outcome in announced.items()]
    failed = any(outcome != NOTIFIED for outcome in announced.values())
    body = {"name": name, "alias": alias, "version": version, "announced": dict(announced)}
    return Answer(body, f"{name}@{alias} is {version}\n{table(rows)}", exit_code=1 if failed else 0)


def _history(options: argparse.Namespace) -> Answer:
    """Answer the event log, oldest first; the text shortens long reasons."""
    from components.registry import event_log, versions

    with opened_registry(options) as store:
        versions.require_adapter(store, options.name)
        log = event_log.events(store, options.name)
    rows = []
    for event in log:
        body = event.body
        if "to" in body:
            by = f" by {body['actor']}" if body.get("actor") else ""
            why = f": {body['reason']}" if body.get("reason") else ""
            text = f"{body['alias']}: {body['from'] or 'none'} -> {body['to']}{by}{why}"
        else:
            reasons = " ".join(body.get("reasons", []))
            text = f"{body.get('version', '')}{': ' + reasons if reasons else ''}"
        text = text if len(text) <= LONGEST_EVENT else text[: LONGEST_EVENT - 3] + "..."
        rows.append((event.time[:19], event.kind, text))
    return Answer({"name": options.name, "events": [vars(event) for event in log]}, table(rows))


def _lineage(options: argparse.Namespace) -> Answer:
    from components.registry.lineage import parse_terms
    from components.registry.versions import ancestors, descendants, read_lineage, require_adapter, resolve, tree

    terms = parse_terms(options.of)
    with opened_registry(options) as store:
        if terms:
            require_adapter(store, options.reference)
            found = descendants(store, options.reference, terms)
            body = {"name": options.reference, "versions": [_described(version) for version in found]}
            return Answer(body, _version_table(found))
        version = resolve(store, options.reference)
        if options.tree:
            grown = ancestors(store, version)
            described = [
                {"name": each.name, "version": each.version, "made_from": [asdict(ancestor) for ancestor in made_from]}
                for each, made_from in grown
            ]
            return Answer({"versions": described}, "\n".join(tree(grown)))
        record = read_lineage(store, version)
    return Answer(record, json.dumps(record, indent=2))


def _verify(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve, verify_version

    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        manifest = verify_version(store, version)
    body = {"name": version.name, "version": version.version, "verified": True, "files": len(manifest.files)}
    return Answer(body, f"{version.name} {version.version}: all {len(manifest.files)} files are what the manifest says")


def _audit(options: argparse.Namespace) -> Answer:
    """Answer what was read and found; exit code 1 where anything was."""
    from components.registry.audit import audit

    with opened_registry(options) as store:
        audits = [audit(store, name) for name in _names(options, store)]
    findings = [finding for each in audits for finding in each.findings]
    body = {
        "adapters": [{"name": each.name, "versions": each.versions, "events": each.events} for each in audits],
        "findings": [asdict(finding) for finding in findings],
    }
    counts = {"version": sum(each.versions for each in audits), "event": sum(each.events for each in audits)}
    read = ", ".join(counted(number, noun) for noun, number in {"adapter": len(audits), **counts}.items())
    found = counted(len(findings), "finding") if findings else "no findings"
    lines = [f"{read}: {found}", *(f"{finding.where}: {finding.what}" for finding in findings)]
    return Answer(body, "\n".join(lines), exit_code=1 if findings else 0)


def _names(options: argparse.Namespace, store: "Store") -> list[str]:
    """The adapter that is named, else all of them."""
    from components.registry.versions import list_adapters, require_adapter

    if options.name:
        require_adapter(store, options.name)
    return [options.name] if options.name else list_adapters(store)


def _gc(options: argparse.Namespace) -> Answer:
    from components.registry.collect import Rules, removals, remove
    from components.shared.errors import UserError

    if options.keep_last < 0 or options.older_than_days < 0:
        raise UserError("--keep-last and --older-than-days are 0 or more")
    rules = Rules(options.keep_last, timedelta(days=options.older_than_days))
    with opened_registry(options) as store:
        found = removals(store, _names(options, store), rules, now=datetime.now(UTC))
        if options.delete:
            found = [each for each in found if remove(store, each)]
    size = sum(each.size_bytes for each in found)
    gone = [
        {"kind": each.kind, "name": each.name, "why": each.why, "objects": len(each.keys), "bytes": each.size_bytes}
        for each in found
    ]
    did = "removed" if options.delete else "would go (--delete removes them)"
    rows = [(each.kind, each.name, f"{each.size_bytes / 1e6:.1f} MB", each.why) for each in found]
    lines = [*([table(rows)] if rows else []), f"{len(found)} {did}, {size / 1e6:.1f} MB"]
    return Answer({"deleted": options.delete, "bytes": size, "removals": gone}, "\n".join(lines))


def _serve_manifest(options: argparse.Namespace) -> Answer:
    import shlex

    import yaml

    from components.handover.serve_manifest import manifest, served
    from components.registry.versions import resolve

    with opened_registry(options) as store:
        facts = served(store, resolve(store, options.reference))
    found = manifest(facts, options.server)
    text = shlex.join(found) if options.server.startswith("vllm") else yaml.safe_dump(found, sort_keys=False).rstrip()
    return Answer({"server": options.server, "version": facts.version, "manifest": found}, text)


def _page(options: argparse.Namespace) -> Answer:
    from components.report.html import moment
    from components.report.registry_index import list_adapter
    from components.report.registry_page import build_pages, read_adapter
    from components.shared.errors import UserError
    from components.store.client import disk_errors

    with opened_registry(options) as store:
        names = _names(options, store)
        pages = [read_adapter(store, name) for name in names]
        listed = [list_adapter(store, name) for name in names]
        built = build_pages(pages, listed, generated_at=moment(datetime.now(UTC)), address=store.uri(""))
    with disk_errors(options.to):
        options.to.mkdir(parents=True, exist_ok=True)
        index = (options.to / "index.html").absolute()
        if index.exists() and "fineloop adapters" not in index.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{index} is no page of Fineloop's, and stays as it is: give --to another folder")
        for name, page in built.items():
            (options.to / name).write_text(page, encoding="utf-8")
    return Answer({"path": str(index), "adapters": names}, f"the registry is at {index}")


def _pull(options: argparse.Namespace) -> Answer:
    from components.registry.versions import pull_version, resolve

    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        target = (options.to or Path(f"{version.name}-{version.version}")).absolute()
        pull_version(store, version, target)
        base = target.with_name(f"{target.name}-base") if options.with_base else None
        if base is not None:
            _pull_base(store, version, base)
    body = {"path": str(target), "version": version.version, "verified": True}
    text = f"{version.name} {version.version} is at {target}, verified"
    return (
        Answer(body, text) if base is None else Answer({**body, "base_path": str(base)}, f"{text}; its base at {base}")
    )


def _pull_base(store: "Store", version: "Version", target: Path) -> None:
    from components.registry.versions import read_lineage
    from components.shared.errors import IntegrityError, UserError
    from components.store import folders

    recipe = read_lineage(store, version)["recipe"]
    stands_on, sha256 = recipe.get("stands_on", ""), recipe.get("stands_on_sha256")
    if not stands_on.startswith(store.uri("bases/")):
        raise UserError(
            f"{version.name} {version.version} has no base of its own in this registry, it stands on "
            f"{stands_on or 'the base of its config'}: leave out --with-base"
        )
    if not sha256:
        raise IntegrityError(f"{version.name} {version.version} does not say which bytes {stands_on} has to have")
    folders.pull(store, store.key(stands_on), target, manifest_sha256=sha256)


def _add_signatures(verbs: Any) -> None:
    """Add both to the group."""
    key = "with the Ed25519 key in FINELOOP_SIGNING_KEY or the file in FINELOOP_SIGNING_KEY_FILE"
    sign = add_command(
        verbs,
        "sign",
        _sign,
        does=f"Sign that a version may hold an alias, {key}.",
        more="With --held, sign everything that an alias of the adapter holds or a rollback may need; use it "
        "before you remove a key.",
        example="fineloop adapters sign icd10-chapters@v3f2",
        opens_registry=True,
    )
    which = sign.add_mutually_exclusive_group(required=True)
    which.add_argument("reference", nargs="?", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
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
        opens_registry=True,
    )
    revoke.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    revoke.add_argument("--reason", required=True, metavar="TEXT", help="signed with it")


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


def _add_export(verbs: Any) -> None:
    """Add the command to the group."""
    export = add_command(
        verbs,
        "export",
        _export,
        does="Write a version merged into its base, as a folder or a GGUF, or as plain LoRA.",
        more="Before it is rounded to --dtype, the merged model must predict the same in float32 as the adapter on "
        "its base; otherwise nothing is written. The cost of rounding is measured on the folder: its exact match "
        "and loss on held-out records beside the adapter's, with a warning if it is more than a tenth of the "
        "adapter's effect. --gguf writes one file for llama.cpp with llama.cpp's converter, compares its tensors "
        "with the merged model's, and writes a Modelfile for Ollama beside it.",
        example="fineloop adapters export icd10-chapters@production --merged",
        opens_registry=True,
    )
    export.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--merged", action="store_const", dest="form", const="merged", help="a model that needs no peft")
    form.add_argument("--lora", action="store_const", dest="form", const="lora", help="plain LoRA, where it is one")
    form.add_argument("--gguf", action="store_const", dest="form", const="gguf", help="for llama.cpp and Ollama")
    export.add_argument("--to", type=Path, metavar="DIR", help="default: ./NAME-VERSION-merged, -lora or -gguf")
    export.add_argument(
        "--base",
        choices=("dequantised", "original"),
        help="with --merged or --gguf: into the weights that it was trained on, exactly (default), or into those from "
        "before quantising, with the error measured",
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="with --merged or --gguf: how the weights are saved (default: bfloat16, in a GGUF float16); float16 "
        "rounds eight times finer",
    )
    export.add_argument(
        "--approximate",
        type=_rank,
        metavar="RANK",
        help="with --lora: if it is not a LoRA, the nearest one of this rank, with the error measured",
    )
    export.add_argument(
        "--converter",
        type=Path,
        metavar="FILE",
        help="with --gguf: llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)",
    )


def _export(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.job import Job, answer

    chosen = _chosen(options)
    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        target = (options.to or Path(f"{version.name}-{version.version}-{options.form}")).absolute()
        arguments = ["--version", f"{version.name}@{version.version}", "--form", options.form, "--to", str(target)]
        job = Job("ray_jobs.export", str(options.config.absolute()), [*arguments, *chosen], options.overrides)
        record = answer(job, on_line=print_err, verbose=options.verbose)
    keys = ("version", "form", "base", "dtype", "exact", "parity", "answers", "tensors", "warnings")
    return Answer({"path": str(target), **{key: record.get(key) for key in keys}})


def _chosen(options: argparse.Namespace) -> list[str]:
    """The options that were given, as the job takes them.

    Raises:
        UserError: one of them belongs to the other form.
    """
    from components.shared.errors import UserError

    given = {name: getattr(options, name) for name in FORMS_OF if getattr(options, name) is not None}
    for name in given:
        if options.form not in FORMS_OF[name]:
            forms = " or ".join(f"--{form}" for form in FORMS_OF[name])
            raise UserError(f"--{name} goes with {forms}, not with --{options.form}: remove one of the two")
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 1:
        raise argparse.ArgumentTypeError(f"a rank is at least 1, not {rank}")
    return rank


def add_push(commands: Any) -> None:
    push = add_command(
        commands,
        "push",
        _push,
        does="Push a version, or an exported folder of it, to a model hub.",
        more="A missing repository is created, private unless --public is given. The commit is tagged with the "
        "version. The token is read from HF_TOKEN only. A version is pushed with its lineage.json and "
        "manifest.json, which name the data, the store and the user who started the run.",
        example="fineloop push icd10-chapters@production acme/icd10-chapters",
        opens_registry=True,
    )
    push.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    push.add_argument("repository", metavar="ORG/NAME", help="repository of models on the hub")
    push.add_argument(
        "--from",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="push this folder, written by `adapters export`, instead",
    )
    push.add_argument("--public", action="store_true", help="make a repository that anyone may read")


def _push(options: argparse.Namespace) -> Answer:
    from components.handover import hub
    from components.registry.versions import pull_version, resolve

    with opened_registry(options) as store, tempfile.TemporaryDirectory(prefix="fineloop-push-") as scratch:
        version = resolve(store, options.reference)
        if options.folder:
            folder, tag = _exported(options.folder, version.version)
        else:
            folder, tag = Path(scratch) / "version", version.version
            pull_version(store, version, folder)
        url = hub.push(
            folder,
            options.repository,
            message=f"{version.name} {version.version}",
            tag=tag,
            is_public=options.public,
            environment=os.environ,
        )
    body = {"name": version.name, "version": version.version, "repository": options.repository, "tag": tag, "url": url}
    return Answer(body, f"{version.name} {version.version} is at {url}")


def _exported(folder: Path, version: str) -> tuple[Path, str]:
    """The folder and its commit's tag, where an export of this version has written it."""
    import json

    from components.shared.errors import UserError

    record = folder / "export.json"
    if not record.is_file():
        raise UserError(f"{folder} has no export.json: name a folder that `fineloop adapters export` has written")
    found = json.loads(record.read_text(encoding="utf-8"))
    if found["version"] != version:
        raise UserError(f"{folder} was made of {found['version']}, not of {version}")
    return folder, f"{version}-{found['form']}"
