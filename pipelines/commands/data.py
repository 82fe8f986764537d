"""`fineloop data`; `fineloop data erase` is in erase.py."""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from components.shared.machine import account
from components.shared.metrics import never_trained_text
from components.shared.protocol import counted
from pipelines.commands.arguments import (
    Answer,
    add_command,
    add_config,
    load_config,
    opened_registry,
    print_err,
    table,
)
from pipelines.configs import DEFAULT_CONFIG

if TYPE_CHECKING:
    from components.prepare.dataset import Exposed, Exposure
    from components.registry.between_runs import Erasure


# `fineloop data erase`.

REVOKED_BECAUSE = "trained on an erased record"


def add_erase(verbs: Any) -> None:
    erase = add_command(
        verbs,
        "erase",
        _erase,
        does="Keep records out of every later dataset, for good, and list what saw them.",
        more="An ID is a record's id in its dataset: the id of its row or, if the row has none, the first 16 hex "
        "digits of its content's hash. The store keeps a hash of it. Datasets, versions and runs that saw the "
        "record are listed with the commands to run next; none of them is changed.",
        example="fineloop data erase 4711",
        opens_registry=True,
    )
    erase.add_argument("ids", nargs="+", metavar="ID", help="a record's id, as in the id column of its dataset")
    erase.add_argument("--by", default="", metavar="NAME", help="who answers for it (default: your login)")
    erase.add_argument("--dry-run", action="store_true", help="erase nothing, only list what saw them")


def _erase(options: argparse.Namespace) -> Answer:
    from components.prepare.dataset import exposure_of
    from components.registry.between_runs import erase

    ids = list(dict.fromkeys(options.ids))
    with opened_registry(options) as store:
        by = options.by or account(os.environ)
        # First, so that what is prepared from here on has none of them.
        erased = {} if options.dry_run else {each: erase(store, each, by=by) for each in ids}
        found = exposure_of(store, ids)
        follows = list(_next_steps(found, revocable=bool(store.trusted_keys)))
    body = {
        "erased": [{"id": each, **asdict(erasure)} for each, erasure in erased.items()],
        "datasets": [asdict(each) for each in found.datasets],
        "versions": [asdict(each) for each in found.versions],
        "runs": list(found.runs),
        "unread": list(found.unread),
        "next": [{"command": command, "why": why} for command, why in follows],
    }
    return Answer(body, "\n".join(_erased_lines(ids, list(erased.values()), found, follows)))


def _next_steps(found: "Exposure", *, revocable: bool) -> Iterator[tuple[str, str]]:
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


def _erased_lines(
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
    rows += [
        ("version", f"{each.name}@{each.version}", _exposure_text(each), _listed(each.aliases))
        for each in found.versions
    ]
    rows += [("run", run_id, "evaluated on them", "") for run_id in found.runs]
    if rows:
        yield table(rows)
    if follows:
        yield "next:"
        yield from (f"  {command}\n      {why}" if command else f"  {why}" for command, why in follows)


def _exposure_text(each: "Exposed") -> str:
    why = {"dataset": f"trained on {each.dataset_id}", "parent": "grew from one that was", "unknown": "lineage unread"}
    return why[each.why] + (", revoked" if each.revoked else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


ANSWERS_SHOWN = 5
CHANGED = {0.1: "one answer in ten", 0.3: "three answers in ten"}
"""Shares of answers in which two models may differ."""
LENGTHS = ("p10", "p50", "p90", "p100")


def add_data(commands: Any) -> None:
    data = add_command(
        commands,
        "data",
        _data,
        does="Show what a run would make of your data, before anything is started.",
        more="It shows unusable rows with the reason, what is left out, lengths, answers, three records as the "
        "base's chat template renders them with the trained tokens marked, and what the gate could decide on the "
        "held-out records. Nothing is written. Only the base's tokenizer is read, not its weights. No store is "
        "read, so that erased records count. `fineloop data erase` keeps records out for good; a file of that name "
        "is ./erase.",
        example="fineloop data rows.jsonl -c mine.toml --html data.html",
    )
    data.add_argument("source", nargs="?", metavar="FILE", help="in place of data.source: a file, a glob, s3://...")
    data.add_argument("--html", type=Path, metavar="FILE", help="write it as a web page too")
    add_config(data)
    add_erase(data)


def _data(options: argparse.Namespace) -> Answer:
    from pipelines.local.job import Job, answer

    given = "".join(f" --set {shlex.quote(override)}" for override in options.overrides)
    following = f"fineloop run -c {options.config}{given}"
    if options.source:
        following += f" --set {shlex.quote(f'data.source={options.source}')}"
        if options.config == DEFAULT_CONFIG:  # whose name and length are the example's
            following = f"fineloop init {shlex.quote(options.source)}{given}"
        options.overrides = [*options.overrides, f"data.source={json.dumps(options.source, ensure_ascii=False)}"]
    load_config(options)  # a mistake in it is said before transformers is loaded
    job = Job("ray_jobs.preview", str(options.config.absolute()), overrides=options.overrides)
    body = answer(job, on_line=print_err, verbose=options.verbose)
    if options.html:
        from components.report.report import build_preview

        options.html.write_text(build_preview(body, list(_sentences(body))), encoding="utf-8")
        body["page"] = str(options.html)
    last = f"a run would stop here: {body['refused']}" if body["refused"] else f"next: {following}"
    return Answer(body, "\n".join([*_lines(body), "", last]))


def _lines(body: Mapping[str, Any]) -> Iterator[str]:
    """For a person."""
    profile = body["profile"]
    rows, train = profile["rows"], profile["splits"]["train"]
    yield f"{rows['read']:,} rows: {rows['rejected']:,} unusable"
    for each in profile["rejected"]:
        yield f"  {each['rows']:>6,}  {each['reason']} (for example {each['example']})"
    if dropped := {name: count for name, count in profile["dropped"].items() if count}:
        yield "left out:"
        yield from (f"  {count:>6,}  {name.replace('_', ' ')}" for name, count in dropped.items())
    if found := profile["personal"]["found"]:
        pieces = ", ".join(f"{count:,} {kind}" for kind, count in found.items())
        yield f"personal data in {counted(profile['personal']['records'], 'record')}: {pieces} (data.personal)"
    if near := profile["near_duplicates"].get("in_train"):
        yield f"{counted(near, 'training record')} hardly differ from another one, and stay"
    yield from _sentences(body)
    yield ""
    lengths = [("", "10 %", "median", "90 %", "longest"), *_lengths(body)]
    yield table(lengths)
    if top := train["most_frequent_answers"][:ANSWERS_SHOWN]:
        yield ""
        yield f"{train['distinct_answers']:,} different answers; the most frequent:"
        yield from (f"  {each['share']:>6.1%}  {' '.join(each['answer'].split())[:80]}" for each in top)
    yield ""
    yield from _as_read(body)
    if "page" in body:
        yield ""
        yield f"page: {body['page']}"


def _sentences(body: Mapping[str, Any]) -> Iterator[str]:
    splits, gate = body["profile"]["splits"], body["gate"]
    train, held_out = splits["train"], splits["eval"]
    groups = f" in {train['groups']:,} groups" if train["groups"] else ""
    yield f"{train['records']:,} records to train on{groups}, {held_out['records']:,} held out"
    if never_trained := body["profile"]["never_trained"]:
        yield never_trained_text(never_trained)
    if gate["lacking"]:
        if not body["refused"]:
            yield f"the gate: {gate['lacking']}"
        return
    kind = "groups of records" if gate["independent"] < gate["records"] else "records"
    sure = NormalDist().inv_cdf(gate["confidence"])
    points = [
        f"{100 * sure * sqrt(share / gate['independent']):.1f} points where {words} changes"
        for share, words in CHANGED.items()
    ]
    yield (
        f"the gate decides by {gate['independent']:,} {kind}: at {gate['confidence']:.0%} confidence it sees a "
        f"difference in exact match of {' and '.join(points)}"
    )


def _lengths(body: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    train, tokens = body["profile"]["splits"]["train"], body["tokens"]
    yield ("prompt, characters", *(f"{train['prompt_chars'][each]:,}" for each in LENGTHS))
    yield ("answer, characters", *(f"{train['answer_chars'][each]:,}" for each in LENGTHS))
    if tokens and tokens["length"]:
        yield ("record, tokens", *(f"{tokens['length'][each]:,}" for each in LENGTHS))
        yield ("trained on, tokens", *(f"{tokens['trained'][each]:,}" for each in LENGTHS))


def _as_read(body: Mapping[str, Any]) -> Iterator[str]:
    tokens = body["tokens"]
    if tokens is None:
        yield f"not read by {body['base']}: {body['unread_because']}"
        return
    limit = f"model.max_length {tokens['max_length']:,}"
    if tokens["cut"] or tokens["too_long"]:
        has_more = body["positions"] is None or tokens["max_length"] < body["positions"]
        of_system = f" ({tokens['cut_system']:,} of the system message too)" if tokens["cut_system"] else ""
        advice = "raise it" if has_more else "shorten them, or take a base with more positions"
        yield (
            f"of {tokens['records']:,} records {tokens['cut']:,} lose part of their prompt to {limit}{of_system}, and "
            f"{tokens['too_long']:,} do not fit at all: {advice}"
        )
    else:
        yield f"{limit} holds every one of {tokens['records']:,} records"
    yield f"as {body['base']} reads them, with >>what is trained on<<:"
    for each in body["shown"]:
        yield ""
        text = "".join(f">>{piece['text']}<<" if piece["trained"] else piece["text"] for piece in each["pieces"])
        yield from (f"  {line}" for line in text.splitlines())


# `fineloop schema`.


def add_schema(commands: Any) -> None:
    add_command(
        commands,
        "schema",
        _schema,
        does="Print the JSON Schema of the config, for editors.",
        example="fineloop schema > schema.json",
        is_listed=False,
    )


def _schema(_options: argparse.Namespace) -> Answer:
    from components.config.config_file import json_schema

    schema = json_schema()
    return Answer(json.loads(schema), schema.rstrip("\n"))
