"""`fineloop data erase`."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from components.shared.account import account
from components.shared.durations import counted
from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry
from pipelines.commands.table import table

if TYPE_CHECKING:
    from components.prepare.exposure import Exposed, Exposure
    from components.registry.erasures import Erasure

REVOKED_BECAUSE = "trained on an erased record"


def add(verbs: Any) -> None:
    """Add the command."""
    erase = add_command(
        verbs,
        "erase",
        _erase,
        does="Keep records out of every later dataset, for good, and list what saw them.",
        more="An ID is a record's id in its dataset: the id of its row or, if the row has none, the first 16 hex "
        "digits of its content's hash. The store keeps a hash of it. Datasets, versions and runs that saw the "
        "record are listed with the commands to run next; none of them is changed.",
        example="fineloop data erase 4711",
    )
    erase.add_argument("ids", nargs="+", metavar="ID", help="a record's id, as in the id column of its dataset")
    erase.add_argument("--by", default="", metavar="NAME", help="who answers for it (default: your login)")
    erase.add_argument("--dry-run", action="store_true", help="erase nothing, only list what saw them")
    add_config(erase)
    add_home(erase)


def _erase(options: argparse.Namespace) -> Answer:
    from components.prepare.exposure import find
    from components.registry.erasures import erase

    ids = list(dict.fromkeys(options.ids))
    with opened_registry(options) as store:
        by = options.by or account(os.environ)
        # First, so that what is prepared from here on has none of them.
        erased = {} if options.dry_run else {each: erase(store, each, by=by) for each in ids}
        found = find(store, ids)
        follows = list(_next(found, revocable=bool(store.trusted_keys)))
    body = {
        "erased": [{"id": each, **asdict(erasure)} for each, erasure in erased.items()],
        "datasets": [asdict(each) for each in found.datasets],
        "versions": [asdict(each) for each in found.versions],
        "runs": list(found.runs),
        "unread": list(found.unread),
        "next": [{"command": command, "why": why} for command, why in follows],
    }
    return Answer(body, "\n".join(_lines(ids, list(erased.values()), found, follows)))


def _next(found: "Exposure", *, revocable: bool) -> Iterator[tuple[str, str]]:
    """What has to be done, in this order: the command, or none where there is no command for it, and why."""
    for name in dict.fromkeys(each.name for each in found.versions):
        why = f"train {name} again without them: with its own config, and though nothing is new"
        yield "fineloop run -c CONFIG --set data.min_new_records=0", why
    for each in found.versions:
        reference = f"{each.name}@{each.version}"
        if each.aliases:
            yield f"fineloop adapters show {reference}", f"{_listed(each.aliases)} must move to the new version first"
        if revocable and not each.revoked:
            yield f"fineloop adapters revoke {reference} --reason '{REVOKED_BECAUSE}'", "so that it is not used again"
    if found.versions and not revocable:
        yield (
            "",
            "a version that ever held an alias goes only when it is revoked, and registry.trusted_keys names no key",
        )
    if found.datasets or found.versions:
        gone = "the versions that are revoked or never held an alias, then the datasets that none needs"
        yield "fineloop adapters gc --delete", f"removes, when they are as old as --older-than-days says, {gone}"
    for run_id in found.runs:
        yield "", f"delete {run_id}/ from runs/ and evaluations/ in the store by hand: it shows the text of them"
    for uri in found.unread:
        yield "", f"look into {uri} yourself: it cannot be read"


def _lines(
    ids: Sequence[str], erased: Sequence["Erasure"], found: "Exposure", follows: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """For a person."""
    if erased:
        before = sum(not each.is_new for each in erased)
        yield f"{counted(len(erased), 'record')} erased for good{f', {before} of them before' if before else ''}"
    else:
        yield "nothing is erased (--dry-run)"
    if missing := [each for each in ids if not any(each in holder.ids for holder in found.datasets)]:
        yield f"in no dataset under this id: {', '.join(missing)}. A copy of the text under another id is a record too"
    rows = [("dataset", each.dataset_id, ", ".join(each.parts), _listed(each.ids)) for each in found.datasets]
    rows += [("version", f"{each.name}@{each.version}", _why(each), _listed(each.aliases)) for each in found.versions]
    rows += [("run", run_id, "evaluated on them", "") for run_id in found.runs]
    if rows:
        yield table(rows)
    if follows:
        yield "next:"
        yield from (f"  {command}\n      {why}" if command else f"  {why}" for command, why in follows)


def _why(each: "Exposed") -> str:
    why = {"dataset": f"trained on {each.dataset_id}", "parent": "grew from one that was", "unknown": "lineage unread"}
    return why[each.why] + (", revoked" if each.revoked else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
