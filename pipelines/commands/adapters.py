"""`fineloop adapters`: what is in the registry, and what the aliases point at."""

import argparse
import json
import os
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands import export
from pipelines.commands.arguments import EXIT_CODES, Answer, Command, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry

if TYPE_CHECKING:
    from components.registry.store import Store
    from components.registry.versions import Version

REFERENCE = "NAME, NAME@ALIAS or NAME@VERSION; first digits of a version suffice"


def add(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser(
        "adapters",
        help="list, show, promote, roll back, verify, fetch and export adapters",
        description="What is in the registry, and what its aliases point at.",
        epilog="example:\n  fineloop adapters show icd10-chapters\n\n" + EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = group.add_subparsers(metavar="COMMAND", required=True)

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
    rollback = _add(
        verbs,
        "rollback",
        _rollback,
        "Point an alias back at the version that held it before.",
        "fineloop adapters rollback icd10-chapters",
    )
    rollback.add_argument("name", metavar="NAME", help="adapter")
    rollback.add_argument("--to", default=None, metavar="VERSION", help="go back to this one instead")
    for parser in (promote, rollback):
        parser.add_argument(
            "--expect", default=None, metavar="VERSION", help="only when this version holds the alias now"
        )
        parser.add_argument("--alias", default="production", metavar="ALIAS", help="default: production")
        parser.add_argument("--reason", default="", metavar="TEXT", help="kept in the event log")

    history = _add(verbs, "history", _history, "Tell what happened to an adapter.", "fineloop adapters history NAME")
    history.add_argument("name", metavar="NAME", help="adapter")

    lineage = "Print what a version was made of: config, data, base, code."
    _reference(_add(verbs, "lineage", _lineage, lineage, "fineloop adapters lineage icd10-chapters"))

    verify = "Read every byte of a version and check it against its manifest."
    _reference(_add(verbs, "verify", _verify, verify, "fineloop adapters verify icd10-chapters@v3f2"))

    pull = _add(verbs, "pull", _pull, "Fetch a version, verified, for peft or a server.", "fineloop adapters pull NAME")
    _reference(pull)
    pull.add_argument("--to", type=Path, default=None, metavar="DIR", help="default: ./NAME-VERSION")
    pull.add_argument("--with-base", action="store_true", help="LoftQ: fetch the adapter's own base too, to DIR-base")

    export.add(verbs, reference=REFERENCE)


def _add(verbs: Any, name: str, command: Command, does: str, example: str) -> argparse.ArgumentParser:
    parser = add_command(verbs, name, command, does=does, example=example)
    add_config(parser)
    add_home(parser)
    return parser


def _reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)


def _list(options: argparse.Namespace) -> Answer:
    from pipelines.commands.registry_answers import adapters_shown, versions_shown

    with opened_registry(options) as store:
        return versions_shown(store, options.name) if options.name else adapters_shown(store)


def _show(options: argparse.Namespace) -> Answer:
    from components.registry.versions import evaluated, resolve
    from pipelines.commands.registry_answers import version_shown

    with opened_registry(options) as store:
        return version_shown(store, evaluated(store, resolve(store, options.reference)))


def _promote(options: argparse.Namespace) -> Answer:
    from components.promote.by_hand import promote_by_hand
    from pipelines.commands.registry_answers import move_shown

    with opened_registry(options) as store:
        event = promote_by_hand(
            store,
            options.reference,
            alias=options.alias,
            expected=_expected(options),
            actor=_user(),
            reason=options.reason,
        )
        return move_shown(options.reference.partition("@")[0], event)


def _rollback(options: argparse.Namespace) -> Answer:
    from components.registry.aliases import Cause, rollback
    from pipelines.commands.registry_answers import move_shown

    with opened_registry(options) as store:
        cause = Cause(actor=_user(), reason=options.reason)
        expected = _expected(options)
        event = rollback(store, options.name, options.alias, options.to, expected=expected, cause=cause)
        return move_shown(options.name, event)


def _expected(options: argparse.Namespace) -> str | None:
    from components.registry.aliases import ANYONE

    return ANYONE if options.expect is None else options.expect or None


def _history(options: argparse.Namespace) -> Answer:
    from pipelines.commands.registry_answers import history_shown

    with opened_registry(options) as store:
        return history_shown(store, options.name)


def _lineage(options: argparse.Namespace) -> Answer:
    from components.registry.versions import read_lineage, resolve

    with opened_registry(options) as store:
        lineage = read_lineage(store, resolve(store, options.reference))
    return Answer(lineage, json.dumps(lineage, indent=2))


def _verify(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve, verify_version

    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        manifest = verify_version(store, version)
    body = {"name": version.name, "version": version.version, "verified": True, "files": len(manifest.files)}
    return Answer(body, f"{version.name} {version.version}: all {len(manifest.files)} files are what the manifest says")


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
    told = f"{version.name} {version.version} is at {target}, verified"
    return (
        Answer(body, told) if base is None else Answer({**body, "base_path": str(base)}, f"{told}; its base at {base}")
    )


def _pull_base(store: "Store", version: "Version", target: Path) -> None:
    from components.registry import folders
    from components.registry.versions import read_lineage
    from components.shared.errors import UserError

    stands_on = read_lineage(store, version)["recipe"].get("stands_on", "")
    if not stands_on.startswith(store.uri("bases/")):
        raise UserError(
            f"{version.name} {version.version} has no base of its own in this registry, it stands on "
            f"{stands_on or 'the base of its config'}: leave out --with-base"
        )
    folders.pull(store, store.key(stands_on), target)


def _user() -> str:
    return os.environ.get("USER") or os.environ.get("LOGNAME") or ""
