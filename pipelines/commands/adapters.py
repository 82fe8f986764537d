"""`fineloop adapters` and `fineloop push`: what is in the registry, what its aliases point at, and how it leaves it."""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from components.config.schema import AnnounceConfig, RunConfig
from components.handover import hub, serve_manifest
from components.handover.announce import NOTIFIED, announce
from components.promote import promote as moves
from components.promote.promote import Person
from components.records.steps import finite
from components.registry import event_log, signing, versions
from components.registry.aliases import ANYONE, PRODUCTION, last_move, read_alias, sign_held
from components.registry.audit import audit
from components.registry.cache import forget
from components.registry.collect import Rules, all_adapters, removals, remove
from components.registry.event_log import Event
from components.registry.lineage import parse_terms
from components.registry.looks import BASE, compared
from components.registry.signing import Signer
from components.registry.versions import Version, read_lineage, require_adapter
from components.shared.errors import IntegrityError, UserError
from components.shared.machine import account
from components.shared.metrics import metric_of, metrics_of
from components.shared.protocol import counted
from components.store import folders
from components.store.client import disk_errors
from components.store.store import Store
from pipelines.commands.arguments import (
    ADDRESS,
    REFERENCE,
    REGISTRY,
    Answer,
    answer_of,
    command,
    either,
    home_option,
    load_config,
    opened_registry,
    opened_version,
    option,
    table,
)
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local import run as local
from pipelines.local.past_runs import own_config
from pipelines.local.run import Place


@command(
    "adapters list",
    *REGISTRY,
    option("name NAME", "adapter whose versions to list", nargs="?"),
    example="fineloop adapters list",
)
def list_(options: argparse.Namespace) -> Answer:
    """List the adapters, or the versions of one."""
    with opened_registry(options) as store:
        if options.name:
            require_adapter(store, options.name)
            return _listed(options.name, versions.list_versions(store, options.name))
        adapters: list[dict[str, Any]] = [
            {"name": name, "newest": summary.newest, "versions": summary.versions, "aliases": summary.aliases}
            for name, summary in all_adapters(store).items()
        ]
        none = f"no adapters in {store.uri('')} yet: `fineloop run` makes one"
    rows = [("adapter", "versions", "newest", "aliases")]
    for adapter in adapters:
        aliases = " ".join(f"{alias}={version}" for alias, version in adapter["aliases"].items())
        rows.append((adapter["name"], str(adapter["versions"]), adapter["newest"] or "-", aliases or "-"))
    return Answer({"adapters": adapters}, table(rows) if adapters else none)


def _listed(name: str, listed: Sequence[Version]) -> Answer:
    rows = [("version", "published", "run", "aliases")]
    for version in listed:
        rows.append(
            (version.version, version.created_at[:19], version.run_id or "-", ", ".join(version.aliases) or "-")
        )
    return Answer({"name": name, "versions": [_described(version) for version in listed]}, table(rows))


def _described(version: Version) -> dict[str, Any]:
    return {
        **_named(version),
        "version_uri": version.uri,
        "created_at": version.created_at,
        "run_id": version.run_id,
        "aliases": list(version.aliases),
        "manifest_sha256": version.manifest_sha256,
        "metrics": dict(version.metrics),
    }


def _named(version: Version) -> dict[str, str]:
    return {"name": version.name, "version": version.version}


@command("adapters show", *REGISTRY, REFERENCE, example="fineloop adapters show icd10-chapters@production")
def show(options: argparse.Namespace) -> Answer:
    """Show one version."""
    with opened_version(options) as (store, version):
        version = versions.evaluated(store, version)
        served = serve_manifest.recorded(read_lineage(store, version))
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


ALIAS = option("--alias ALIAS", "default: production", default=PRODUCTION)
EXPECT = option("--expect VERSION", "only when this version holds the alias now", default=None)
PERSON = (
    option("--by NAME", "who answers for it, needed to override the gate"),
    option("--reason TEXT", "kept in the event log, needed likewise"),
)


@command(
    "adapters promote",
    *(*REGISTRY, REFERENCE, EXPECT, *PERSON, ALIAS),
    example="fineloop adapters promote icd10-chapters@v3f2 --reason 'checked by hand'",
)
def promote(options: argparse.Namespace) -> Answer:
    """Point an alias at a version, whatever the gate said."""
    return _moved(options, options.reference.partition("@")[0], moves.promote_by_hand, expected=_expected(options))


@command(
    "adapters approve",
    *(*REGISTRY, REFERENCE),
    option("--by NAME", "who answers for it", required=True),
    option("--reason TEXT", "kept in the event log", required=True),
    ALIAS,
    example="fineloop adapters approve icd10-chapters@v3f2 --by ada --reason 'read fifty answers'",
)
def approve(options: argparse.Namespace) -> Answer:
    """Point an alias at a version that the gate left to a person."""
    return _moved(options, options.reference.partition("@")[0], moves.approve)


@command(
    "adapters rollback",
    *REGISTRY,
    option("reference NAME", "adapter"),
    option("--to VERSION", "go back to this one instead; first digits suffice", default=None),
    *(EXPECT, *PERSON, ALIAS),
    example="fineloop adapters rollback icd10-chapters",
)
def rollback(options: argparse.Namespace) -> Answer:
    """Point an alias back at the version that held it before."""
    return _moved(options, options.reference, moves.roll_back_by_hand, to=options.to, expected=_expected(options))


def _expected(options: argparse.Namespace) -> str | None:
    return ANYONE if options.expect is None else options.expect or None


def _moved(options: argparse.Namespace, name: str, move: Callable[..., Event], **how: Any) -> Answer:
    """Move an alias and print it, and notify the servers that the config names; not where it was there before."""
    person = Person(options.by, options.reason, otherwise=account(os.environ))
    with opened_registry(options) as store:
        store.check()
        before = read_alias(store, name, options.alias)
        event = move(store, options.reference, person, alias=options.alias, **how)
        forget(store, name)
        announced = announce(load_config(options).announce, store, name, event, os.environ)
    return move_shown(name, event, announced, moved=before is None or before.since != event.time)


def move_shown(name: str, event: Event, announced: Mapping[str, str], *, moved: bool) -> Answer:
    """A promotion or a rollback, and the outcome of its notifications; `moved` is False where it changed nothing."""
    move = event.move()
    text = f"{move['from'] or 'none'} -> {move['to']}"
    if not moved:
        text = f"already {move['to']} since {event.time[:16].replace('T', ' ')} UTC"
    elif before := event.body.get("evidence", {}).get("anchor_before"):
        text += f"\nlater candidates are held to {move['to']} as the best version so far, in the place of {before}"
    body: dict[str, Any] = {**move, **({} if moved else {"moved": False})}
    return Answer({**body, **({"announced": dict(announced)} if announced else {})}, f"{name}@{move['alias']}: {text}")


@command(
    "adapters check",
    *(*REGISTRY, option("name NAME", "adapter")),
    option("--against VERSION", "previous (the default, check.against), base, or a version, such as a candidate"),
    option("--worse-by DROP", "the drop to look for, in the unit of gate.metric (check.worse_by)"),
    option("--data DATA", "where records have come since (default: data.source)", dest="source", default=""),
    ADDRESS,
    example="fineloop adapters check icd10-chapters --data july.jsonl",
)
def check(options: argparse.Namespace) -> Answer:
    """Say whether what is in production is still good, on records that came since.

    Production is compared with the version before it on records that neither of them nor any version that they grew
    from has seen. Each look is logged, and looks add up: the bound may be looked at every night. Without -c the config
    is that of production's own run, if that ran on no cluster of its own. With check.roll_back what is shown to be
    worse goes back by itself.
    """
    settings = {"check.against": options.against, "check.worse_by": options.worse_by, "data.source": options.source}
    texts = {key: value if key == "check.worse_by" else json.dumps(value) for key, value in settings.items() if value}
    if "data.source" in texts and "://" not in options.source:
        texts["data.source"] = json.dumps(str(Path(options.source).expanduser().absolute()))
    options.overrides = [*options.overrides, *(f"{key}={value}" for key, value in texts.items())]
    config = load_config(options)
    if options.config != DEFAULT_CONFIG and config.adapter.name != options.name:
        raise UserError(
            f"{options.config} is of the adapter {config.adapter.name}, not of {options.name}: name its own"
        )
    with opened_registry(options) as store:
        if options.config == DEFAULT_CONFIG:
            holder = versions.resolve(store, f"{options.name}@{config.adapter.alias}")
            own = own_config(read_lineage(store, holder), config, options.overrides, origin=f"lineage of {holder.uri}")
            if own.ray.cluster != config.ray.cluster:  # its image, too, is for whoever asks to choose
                raise UserError(f"{holder.uri} was trained on another cluster than the config's: name its own with -c")
            config = own.model_copy(update={"announce": config.announce})
        compared(store, config)  # so that a mistake is said before anything is started
    shown = local.check(config, Place(options.home, sys.stderr, verbose=options.verbose, address=options.address))
    return Answer(shown, "\n".join(_look_lines(shown, config, home_option(options))))


def _look_lines(shown: Mapping[str, Any], config: RunConfig, home: str) -> Iterator[str]:
    """A look for people: what it shows, how production fares beside its own test, and what to do now."""
    if "verdict" not in shown:
        yield f"{config.adapter.name}: too few records came since to compare on"
        return
    yield shown["reasons"][0]
    metric = metric_of(shown["metric"])
    if shown["held_out"] is not None:
        fresh, own = metric.text(shown["fresh"]), metric.text(shown["held_out"])
        yield f"{metric.label} of {shown['version']} on the last look's records: {fresh}; when it was tested: {own}"
    name, against = shown["adapter"], shown["against"]
    on = "" if shown["alias"] == PRODUCTION else f" --alias {shown['alias']}"
    if moved := shown["moved"]:
        yield f"{name}@{moved['alias']} went back to {moved['to']}"
    elif shown["verdict"] == "worse" and against != BASE:
        instead = f"rollback {name}" if shown["can_roll_back"] else f"promote {name}@{against}"
        yield f"to replace it: fineloop adapters {instead}{on} --expect {shown['version']}{home}"


@command(
    "adapters announce",
    *REGISTRY,
    option("alias NAME[@ALIAS]", "adapter, and alias if it is not production"),
    example="fineloop adapters announce icd10-chapters@production",
)
def announce_again(options: argparse.Namespace) -> Answer:
    """Notify all whom the config names of where an alias points."""
    config = load_config(options).announce
    if not config.servers:
        keys = ", ".join(f"announce.{key}" for key in AnnounceConfig.model_fields if key != "nights")
        raise UserError(f"the config names nothing to notify: set one of {keys}")
    name, _, alias = options.alias.partition("@")
    with opened_registry(options) as store:
        event = last_move(store, name, alias or PRODUCTION)
        announced = announce(config, store, name, event, os.environ)
    alias, version = event.body["alias"], event.body["to"]
    rows = [(f"announce.{key}", outcome) for key, outcome in announced.items()]
    failed = any(outcome != NOTIFIED for outcome in announced.values())
    body = {"name": name, "alias": alias, "version": version, "announced": dict(announced)}
    return Answer(body, f"{name}@{alias} is {version}\n{table(rows)}", exit_code=1 if failed else 0)


@command("adapters history", *REGISTRY, option("name NAME", "adapter"), example="fineloop adapters history NAME")
def history(options: argparse.Namespace) -> Answer:
    """Print what happened to an adapter."""
    with opened_registry(options) as store:
        require_adapter(store, options.name)
        log = event_log.events(store, options.name)
    rows = []
    for event in log:
        body = event.body
        if "to" in body:
            by = f" by {body['actor']}" if body.get("actor") else ""
            text = f"{body['alias']}: {body['from'] or 'none'} -> {body['to']}{by}"
            why = body.get("reason", "")
        else:
            text, why = body.get("version", ""), " ".join(body.get("reasons", []))
        text += f": {why}" if why else ""
        text = text if len(text) <= 100 else f"{text[:97]}..."
        rows.append((event.time[:19], event.kind, text))
    return Answer({"name": options.name, "events": [vars(event) for event in log]}, table(rows))


@command(
    "adapters lineage",
    *(*REGISTRY, REFERENCE),
    option("--tree", "draw it, with the versions that it grew from"),
    option("--of KIND=NAME", "instead, list the adapter's versions made of it", action="append", default=[]),
    example="fineloop adapters lineage icd10-chapters --of dataset=4f1c",
)
def lineage(options: argparse.Namespace) -> Answer:
    """Print what a version was made of: config, data, base, code; or which versions were made of something.

    KIND is dataset, source, base, commit, config or parent.
    """
    if terms := parse_terms(options.of):
        with opened_registry(options) as store:
            require_adapter(store, options.reference)
            return _listed(options.reference, versions.descendants(store, options.reference, terms))
    with opened_version(options) as (store, version):
        if options.tree:
            grown = versions.ancestors(store, version)
            described = [{**_named(made), "made_from": [asdict(one) for one in made_from]} for made, made_from in grown]
            return Answer({"versions": described}, "\n".join(versions.tree(grown)))
        record = read_lineage(store, version)
    return Answer(record, json.dumps(record, indent=2))


@command("adapters verify", *REGISTRY, REFERENCE, example="fineloop adapters verify icd10-chapters@v3f2")
def verify(options: argparse.Namespace) -> Answer:
    """Read every byte of a version and check it against its manifest."""
    with opened_version(options) as (store, version):
        num_files = len(versions.verify_version(store, version).files)
    body = {**_named(version), "verified": True, "files": num_files}
    return Answer(body, f"{version.name} {version.version}: all {num_files} files are what the manifest says")


@command(
    "adapters sign",
    *REGISTRY,
    either(
        option("reference NAME[@ALIAS|@VERSION]", "the version", nargs="?"),
        option("--held NAME", "all that is needed of this adapter, each for its alias"),
        required=True,
    ),
    option("--alias ALIAS", "default: that of the reference, else production"),
    example="fineloop adapters sign icd10-chapters@v3f2",
)
def sign(options: argparse.Namespace) -> Answer:
    """Sign that a version may hold an alias.

    The Ed25519 key is in FINELOOP_SIGNING_KEY or the file in FINELOOP_SIGNING_KEY_FILE. With --held, sign everything
    that an alias of the adapter holds or a rollback may need; use it before you remove a key.
    """
    key, public = _key()
    if options.held:
        with opened_registry(options) as store:
            signed = sign_held(store, options.held, key)
        lines = [f"{sig.version} {f'for {sig.alias}' if sig.alias else 'as revoked'}" for sig in signed]
        body = {"name": options.held, "signed": [sig._asdict() for sig in signed], "public_key": public}
        return Answer(body, "\n  ".join([f"of {options.held}, {len(lines)} signed by {public}", *lines]))
    with opened_version(options) as (store, version):
        alias = options.alias or version.asked_as or PRODUCTION
        uri = signing.sign(store, version.name, version.version, key, alias=alias)
    body = {**_named(version), "alias": alias, "signature_uri": uri, "public_key": public}
    return Answer(body, f"{version.name} {version.version} is signed for {alias} by {public}")


@command(
    "adapters revoke",
    *(*REGISTRY, REFERENCE),
    option("--reason TEXT", "signed with it", required=True),
    example="fineloop adapters revoke icd10-chapters@v3f2 --reason 'it was trained on the wrong data'",
)
def revoke(options: argparse.Namespace) -> Answer:
    """Sign that a version must not be used any more.

    The key is where that of `fineloop adapters sign` is. Registries that trust it no longer fetch the version or move
    an alias to it, whoever else signed it. An alias that points at it stays, for a rollback.
    """
    key, public = _key()
    with opened_version(options) as (store, version):
        if public not in store.trusted_keys:
            raise UserError(f"registry.trusted_keys lacks {public}, so its revocations would be ignored: add it there")
        uri = signing.revoke(store, version.name, version.version, key, reason=options.reason)
    body = {**_named(version), "statement_uri": uri, "public_key": public, "aliases": list(version.aliases)}
    still_at = f"; {', '.join(version.aliases)} still at it, so roll back" if version.aliases else ""
    return Answer(body, f"{version.name} {version.version} is revoked{still_at}")


def _key() -> tuple[Signer, str]:
    """The key to sign with, and its public half as text."""
    key = signing.signer_from(os.environ)
    if key is None:
        raise UserError(f"no key to sign with: set {signing.KEY_FILE_VARIABLE} to a file with a private key in PEM")
    return key, signing.public_text(key)


def _names(options: argparse.Namespace, store: Store) -> list[str]:
    """The adapter that is named, else all of them."""
    if options.name:
        require_adapter(store, options.name)
    return [options.name] if options.name else versions.list_adapters(store)


@command(
    "adapters audit",
    *REGISTRY,
    option("name NAME", "default: every adapter", nargs="?"),
    example="fineloop adapters audit",
)
def audit_all(options: argparse.Namespace) -> Answer:
    """Read everything, and compare files, ids, signatures, the event log and the aliases with each other.

    Exit code 1 means that there are findings.
    """
    from components.prepare.dataset import require_promised

    with opened_registry(options) as store:
        audits = [audit(store, name, require_promised) for name in _names(options, store)]
    findings = [finding for trail in audits for finding in trail.findings]
    body = {
        "adapters": [{"name": trail.name, "versions": trail.versions, "events": trail.events} for trail in audits],
        "findings": [asdict(finding) for finding in findings],
    }
    versions_read, events_read = (sum(getattr(trail, what) for trail in audits) for what in ("versions", "events"))
    read = f"{counted(len(audits), 'adapter')}, {counted(versions_read, 'version')}, {counted(events_read, 'event')}"
    lines = [f"{read}: {counted(len(findings), 'finding') if findings else 'no findings'}"]
    lines += [f"{finding.where}: {finding.what}" for finding in findings]
    return Answer(body, "\n".join(lines), exit_code=1 if findings else 0)


@command(
    "adapters gc",
    *REGISTRY,
    option("name NAME", "default: every adapter, and what they share", nargs="?"),
    option("--keep-last N", "newest versions of an adapter to keep (10)", type=int, default=10),
    option("--older-than-days DAYS", "keep what is younger (30)", type=float, default=30),
    either(option("--dry-run", "only print what would be removed; the default"), option("--delete", "remove it")),
    example="fineloop adapters gc icd10-chapters --keep-last 5",
)
def collect(options: argparse.Namespace) -> Answer:
    """Print what nothing needs: versions, checkpoints, datasets and bases; --delete removes it."""
    if options.keep_last < 0 or options.older_than_days < 0:
        raise UserError("--keep-last and --older-than-days are 0 or more")
    rules = Rules(options.keep_last, timedelta(days=options.older_than_days))
    with opened_registry(options) as store:
        gone = removals(store, _names(options, store), rules, now=datetime.now(UTC))
        if options.delete:
            gone = [item for item in gone if remove(store, item)]
    size = sum(item.size_bytes for item in gone)
    described = [
        {"kind": item.kind, "name": item.name, "why": item.why, "objects": len(item.keys), "bytes": item.size_bytes}
        for item in gone
    ]
    did = "removed" if options.delete else "would go (--delete removes them)"
    rows = [(item.kind, item.name, f"{item.size_bytes / 1e6:.1f} MB", item.why) for item in gone]
    lines = [*([table(rows)] if rows else []), f"{len(gone)} {did}, {size / 1e6:.1f} MB"]
    return Answer({"deleted": options.delete, "bytes": size, "removals": described}, "\n".join(lines))


@command(
    "adapters pull",
    *(*REGISTRY, REFERENCE),
    option("--to DIR", "default: ./NAME-VERSION", type=Path),
    option("--with-base", "also write the base that it stands on, as a transformers folder, to DIR-base"),
    example="fineloop adapters pull NAME",
)
def pull(options: argparse.Namespace) -> Answer:
    """Fetch a version, verified, for peft or a server."""
    with opened_version(options) as (store, version):
        target = (options.to or Path(f"{version.name}-{version.version}")).absolute()
        versions.pull_version(store, version, target)
        body = {"path": str(target), "version": version.version, "verified": True}
        text = f"{version.name} {version.version} is at {target}, verified"
        if options.with_base:
            base = target.with_name(f"{target.name}-base")
            _pull_base(options, store, version, base)
            body["base_path"] = str(base)
            text += f"; its base at {base}"
    return Answer(body, text)


def _pull_base(options: argparse.Namespace, store: Store, version: Version, target: Path) -> None:
    """Fetch the base that LoftQ made for the version; or write the base of its config as servers read it, once."""
    lineage = read_lineage(store, version)
    stands_on, sha256 = (lineage["recipe"].get(key, "") for key in ("stands_on", "stands_on_sha256"))
    if stands_on.startswith(store.uri("bases/")):
        if not sha256:
            raise IntegrityError(f"{version.name} {version.version} does not say which bytes {stands_on} has to have")
        folders.pull(store, store.key(stands_on), target, manifest_sha256=sha256)
    elif serve_manifest.base_of(target) != lineage["base"]["identity"]:
        arguments = ("--version", f"{version.name}@{version.version}", "--form", "base", "--to", str(target))
        answer_of(options, "ray_jobs.export", *arguments)


@command(
    "adapters serve-manifest",
    *(*REGISTRY, REFERENCE),
    option("--for", dest="server", required=True, choices=("ray-serve", "kserve", "llm-d", "vllm", "vllm-resolver")),
    option("--base URI", "where the server finds the base: a copy of what `adapters pull --with-base` writes"),
    option(
        "--share N", "kserve, llm-d: N per cent of the requests, the others to what production holds or held", type=int
    ),
    example="fineloop adapters serve-manifest NAME --for llm-d --share 10",
)
def manifest(options: argparse.Namespace) -> Answer:
    """Write what a server needs to serve a version: Ray Serve LLM or KServe; for vLLM, the commands; or what llm-d's
    router needs.

    With --share the version gets that share of the requests for NAME, and the others go to the version in production,
    or, where that is this one, to the one before it.
    """
    with opened_version(options) as (store, version):
        facts = serve_manifest.served(store, version)
        shares = options.share is not None
        rest = serve_manifest.beside(store, facts, options.server, options.share) if shares else None
    facts = serve_manifest.placed(facts, options.server, options.base or "")
    rest = rest and serve_manifest.placed(rest, options.server, options.base or "")
    made = serve_manifest.manifest(facts, options.server, share=options.share or 100, rest=rest)
    text = yaml.safe_dump(made, sort_keys=False).rstrip() if isinstance(made, dict) else shlex.join(made)
    if options.server == "vllm" or facts.is_pulled:
        where = f"{home_option(options)}{' --with-base' if facts.is_pulled else ''}"
        text = f"fineloop adapters pull {facts.name}@{facts.version}{where}\n{text}"
    return Answer({"server": options.server, "version": facts.version, "manifest": made}, text)


@command(
    "adapters page",
    *REGISTRY,
    option("name NAME", "default: every adapter", nargs="?"),
    option("--to DIR", "default: ./registry-page", type=Path, default=Path("registry-page")),
    example="fineloop adapters page --to ./registry",
)
def page(options: argparse.Namespace) -> Answer:
    """Write the registry as web pages: what is in production, since when and why, versions, scores, events."""
    from components.report.html import moment
    from components.report.registry_page import build_pages, read_adapter

    with opened_registry(options) as store:
        names = _names(options, store)
        read = [read_adapter(store, name) for name in names]
        pages, listed = [page for page, _ in read], [row for _, row in read]
        built = build_pages(pages, listed, generated_at=moment(datetime.now(UTC)), address=store.uri(""))
    with disk_errors(options.to):
        options.to.mkdir(parents=True, exist_ok=True)
        index = (options.to / "index.html").absolute()
        if index.exists() and "fineloop adapters" not in index.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{index} is no page of Fineloop's, and stays as it is: give --to another folder")
        for name, text in built.items():
            (options.to / name).write_text(text, encoding="utf-8")
    return Answer({"path": str(index), "adapters": names}, f"the registry is at {index}")


FORMS_OF = {"base": ("merged", "gguf"), "dtype": ("merged", "gguf"), "approximate": ("lora",), "converter": ("gguf",)}
"""The options of `export` that not every form has."""


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 1:
        raise argparse.ArgumentTypeError(f"a rank is at least 1, not {rank}")
    return rank


@command(
    "adapters export",
    *(*REGISTRY, REFERENCE),
    either(
        option("--merged", "a model that needs no peft", action="store_const", dest="form", const="merged"),
        option("--lora", "plain LoRA, where it is one", action="store_const", dest="form", const="lora"),
        option("--gguf", "for llama.cpp and Ollama", action="store_const", dest="form", const="gguf"),
        required=True,
    ),
    option("--to DIR", "default: ./NAME-VERSION-merged, -lora or -gguf", type=Path),
    option("--base", "into which weights a quantised one is merged", choices=("dequantised", "original")),
    option("--dtype", "how the weights are saved", choices=("float32", "bfloat16", "float16")),
    option("--approximate RANK", "with --lora: if it is not a LoRA, the nearest one of this rank", type=_rank),
    option("--converter FILE", "with --gguf: llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)", type=Path),
    example="fineloop adapters export icd10-chapters@production --merged",
)
def export(options: argparse.Namespace) -> Answer:
    """Write a version merged into its base, as a folder or a GGUF, or as plain LoRA.

    With --merged and --gguf, --base is the weights that it was trained on, exactly (dequantised, the default), or those
    from before quantising, with the error measured, as --approximate does; --dtype is bfloat16, in a GGUF float16,
    unless given. Before it is rounded to that, the merged model must predict the same in float32 as the adapter on its
    base; otherwise nothing is written. The cost of rounding is measured on the folder: its exact match and loss on
    held-out records beside the adapter's, with a warning if it is more than a tenth of the adapter's effect. --gguf
    writes one file for llama.cpp with llama.cpp's converter, compares its tensors with the merged model's, and writes a
    Modelfile for Ollama beside it.
    """
    chosen = {name: getattr(options, name) for name in FORMS_OF if getattr(options, name) is not None}
    for name in chosen:
        if options.form not in FORMS_OF[name]:
            forms = " or ".join(f"--{form}" for form in FORMS_OF[name])
            raise UserError(f"--{name} goes with {forms}, not with --{options.form}: remove one of the two")
    with opened_version(options) as (_, version):
        target = (options.to or Path(f"{version.name}-{version.version}-{options.form}")).absolute()
        arguments = ["--version", f"{version.name}@{version.version}", "--form", options.form, "--to", str(target)]
        arguments += [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
        record = answer_of(options, "ray_jobs.export", *arguments)
    keys = ("version", "form", "base", "dtype", "exact", "parity", "answers", "tensors", "warnings")
    return Answer({"path": str(target), **{key: record.get(key) for key in keys}})


@command(
    "push",
    *(*REGISTRY, REFERENCE),
    option("repository ORG/NAME", "repository of models on the hub"),
    option("--from DIR", "push this folder, written by `adapters export`, instead", dest="folder", type=Path),
    option("--base ORG/NAME", "the hub's copy of its base, such as one that was pushed with --from DIR-base"),
    option("--public", "make a repository that anyone may read"),
    example="fineloop push icd10-chapters@production acme/icd10-chapters",
)
def push(options: argparse.Namespace) -> Answer:
    """Push a version, or an exported folder of it, to a model hub.

    A missing repository is created, private unless --public is given. The commit is tagged with the version. The token
    is read from HF_TOKEN only. A version is pushed with its lineage.json and manifest.json, which name the data, the
    store and the user who started the run.
    """
    with opened_version(options) as (store, version), tempfile.TemporaryDirectory(prefix="fineloop-push-") as scratch:
        folder, tag = options.folder or Path(scratch) / "version", version.version
        if options.folder:
            record = folder / "export.json"
            if not record.is_file():
                raise UserError(
                    f"{folder} has no export.json: name a folder that `fineloop adapters export` has written"
                )
            exported = json.loads(record.read_text(encoding="utf-8"))
            if exported["version"] != tag:
                raise UserError(f"{folder} was made of {exported['version']}, not of {tag}")
            tag += f"-{exported['form']}"
        else:
            versions.pull_version(store, version, folder)
            if options.base:
                hub.name_base(folder, options.base)
        about = {"message": f"{version.name} {version.version}", "tag": tag, "is_public": options.public}
        url = hub.push(folder, options.repository, **about, environment=os.environ)
    body = {**_named(version), "repository": options.repository, "tag": tag, "url": url}
    return Answer(body, f"{version.name} {version.version} is at {url}")
