"""`fineloop data`, `fineloop data audit`, `fineloop data erase` and `fineloop schema`."""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.config_file import json_schema
from components.registry.between_runs import erase, user_hash
from components.shared.errors import UserError
from components.shared.machine import account
from components.shared.metrics import never_trained_text
from components.shared.protocol import counted
from pipelines.commands.arguments import (
    CONFIG,
    REGISTRY,
    Answer,
    answer_of,
    command,
    load_config,
    opened_registry,
    option,
    table,
)
from pipelines.configs import DEFAULT_CONFIG

if TYPE_CHECKING:
    from components.prepare.dataset import Exposure


@command(
    "data",
    *CONFIG,
    option("data FILE", "in place of data.source: a file, a glob, s3://...", nargs="?"),
    option("--html FILE", "write it as a web page too", type=Path),
    example="fineloop data rows.jsonl -c mine.toml --html data.html",
)
def data(options: argparse.Namespace) -> Answer:
    """Show what a run would make of your data, before anything is started.

    It shows unusable rows with the reason, what is left out, lengths, answers, three records as the base's chat
    template renders them with the trained tokens marked, and what the gate could decide on the held-out records.
    Nothing is written. Only the base's tokenizer is read, not its weights. No store is read, so that erased records
    count. `fineloop data erase` keeps records out for good; a file of that name is ./erase.
    """
    following = f"fineloop run -c {options.config}"
    if options.data and options.config == DEFAULT_CONFIG:  # whose name and length are the example's
        following = f"fineloop init {shlex.quote(options.data)}"
    following += "".join(f" --set {shlex.quote(override)}" for override in options.overrides)
    if options.data and options.config != DEFAULT_CONFIG:
        following += f" --set {shlex.quote(f'data.source={options.data}')}"
    load_config(options)  # a mistake in it is said before transformers is loaded
    body = answer_of(options, "ray_jobs.preview")
    if options.html:
        from components.report.report import build_preview

        options.html.write_text(build_preview(body, list(_sentences(body))), encoding="utf-8")
        body["page"] = str(options.html)
    last = f"a run would stop here: {body['refused']}" if body["refused"] else f"next: {following}"
    return Answer(body, "\n".join([*_lines(body), "", last]))


def _lines(body: Mapping[str, Any]) -> Iterator[str]:
    from components.report.sections import data_profile

    profile, tokens = body["profile"], body["tokens"]
    rows, train = profile["rows"], profile["splits"]["train"]
    yield f"{rows['read']:,} rows: {rows['rejected']:,} unusable"
    for rejected in profile["rejected"]:
        yield f"  {rejected['rows']:>6,}  {rejected['reason']} (for example {rejected['example']})"
    shown = data_profile(profile)
    assert shown is not None  # there is a profile
    for title, counts in shown["counts"]:
        yield from [f"{title.lower()}:"] if counts else []
        yield from (f"  {count:>6,}  {what}" for what, count in counts)
    if logged := profile.get("logged"):
        yield from _logged(logged)
    yield from _sentences(body)
    lengths = {"prompt, characters": train["prompt_chars"], "answer, characters": train["answer_chars"]}
    if tokens and tokens["length"]:
        lengths |= {"record, tokens": tokens["length"], "trained on, tokens": tokens["trained"]}
    described = [
        (name, *(f"{values[rank]:,}" for rank in ("p10", "p50", "p90", "p100"))) for name, values in lengths.items()
    ]
    yield "\n" + table([("", "10 %", "median", "90 %", "longest"), *described])
    if top := train["most_frequent_answers"][:5]:
        yield f"\n{train['distinct_answers']:,} different answers; the most frequent:"
        yield from (f"  {answer['share']:>6.1%}  {' '.join(answer['answer'].split())[:80]}" for answer in top)
    yield ""
    yield from _as_read(body)
    if "page" in body:
        yield f"\npage: {body['page']}"


def _logged(logged: Mapping[str, Any]) -> Iterator[str]:
    for name, origins in logged["origin"].items():
        yield f"{name} has of logged answers: {', '.join(f'{n:,} {origin}' for origin, n in origins.items()) or 'none'}"
    if judge := logged.get("judge"):
        yield f"of the log judge: {', '.join(f'{number:,} by {why}' for why, number in judge.items())}"
    if reserved := logged.get("reserved"):
        yield f"  {reserved:>6,}  held out, and may not judge as people chose them: `fineloop data audit` draws of them"
    feedback = logged["feedback"]
    rows = f"{feedback['rows']:,} rows on {feedback['answers']:,} answers"
    yield f"feedback: {rows}, on {feedback['raters_differ']:,} of which raters differ"
    yield from (f"  {number:>6,}  unusable: {reason}" for reason, number in feedback["unusable"].items())


def _sentences(body: Mapping[str, Any]) -> Iterator[str]:
    splits, gate = body["profile"]["splits"], body["gate"]
    train, held_out = splits["train"], splits["eval"]
    groups = f" in {train['groups']:,} groups" if train["groups"] else ""
    yield f"{train['records']:,} records to train on{groups}, {held_out['records']:,} held out"
    yield from body["profile"].get("logged", {}).get("warnings", ())
    if never_trained := body["profile"]["never_trained"]:
        yield never_trained_text(never_trained)
    if not gate["lacking"]:
        yield gate["power"]["sentence"]


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
    for record in body["shown"]:
        yield ""
        text = "".join(f">>{piece['text']}<<" if piece["trained"] else piece["text"] for piece in record["pieces"])
        yield from (f"  {line}" for line in text.splitlines())


@command(
    "data audit",
    *CONFIG,
    option("count N", "how many answers to draw (default: as many as gate.min_records takes)", nargs="?", type=int),
    option("--output FILE", "the file to label, JSONL or CSV by its name", type=Path, default=Path("audit.jsonl")),
    option("--answers", "show what was answered, beside the prompt: who sees it tends to agree", action="store_true"),
    example="fineloop data audit 200 -c mine.toml --output audit.csv",
)
def data_audit(options: argparse.Namespace) -> Answer:
    """Draw logged answers for people to label: by these versions are compared.

    Ratings and edits train alone: people chose these answers by how good they were, so that on them any other version
    looks better than the one that gave them. An audit draws by a hash of the answer's id, whoever liked it, from those
    that are held out. Write the right answer of each into `label`; up to a tenth may stay empty. Then name the file in
    data.feedback. What earlier audits there drew is not drawn again. No store is read.
    """
    config = load_config(options)
    from components.prepare.audit import labels_for
    from components.prepare.drawing import draw_audit, write_audit

    wanted = labels_for(config.gate.min_records, validation_share=config.data.validation_share)
    count = wanted if options.count is None else options.count
    if count < 1:
        raise UserError(f"N is {count}: draw one answer at least")
    drawn = draw_audit(config, count)
    write_audit(options.output, drawn, answers=options.answers)
    number = len(drawn.records)
    body = {"audit": drawn.name, "drawn": number, "eligible": drawn.eligible, "file": str(options.output)}
    lines = [f"{number:,} of {drawn.eligible:,} held-out answers of the log are drawn into {options.output}"]
    if number < wanted:
        lines.append(f"gate.min_records = {config.gate.min_records} takes {wanted:,} labels, this and earlier audits'")
    lines.append(f"next: write the right answer of each into its label, and add {options.output} to data.feedback")
    return Answer(body, "\n".join(lines))


@command(
    "data erase",
    *REGISTRY,
    option("ids ID", "a record's id, as in the id column of its dataset", nargs="*"),
    option("--user NAME", "all records of a user or rater, as logs or feedback name them", action="append", default=[]),
    option("--by NAME", "who answers for it (default: your login)"),
    option("--dry-run", "erase nothing, only list what saw them"),
    example="fineloop data erase 4711 --user ada@example.org",
)
def data_erase(options: argparse.Namespace) -> Answer:
    """Keep records out of every later dataset, for good, and list what saw them.

    An ID is a record's id in its dataset: the id of its row or, if the row has none, the first 16 hex digits of its
    content's hash. With --user, logged requests and feedback of that person are kept out, now and later. The store
    keeps a hash of either. Datasets, versions and runs that saw the records are listed with the commands to run next;
    none of them is changed.
    """
    ids, people = list(dict.fromkeys(options.ids)), {name: user_hash(name) for name in options.user}
    if not ids and not people:
        raise UserError("the following arguments are required: ID, or --user NAME")
    from components.prepare.dataset import exposure_of

    with opened_registry(options) as store:
        by = options.by or account(os.environ)
        # First, so that what is prepared from here on has none of them.
        erased = {} if options.dry_run else {record_id: erase(store, record_id, by=by) for record_id in ids}
        of_people = {} if options.dry_run else {name: erase(store, name, by=by, hash_of=user_hash) for name in people}
        exposure = exposure_of(store, ids, people=people)
        follows = list(_next_steps(exposure, revocable=bool(store.trusted_keys)))
    body = {
        "erased": [{"id": record_id, **asdict(erasure)} for record_id, erasure in erased.items()],
        "users": [{"user": name, **asdict(erasure)} for name, erasure in of_people.items()],
        "datasets": [asdict(dataset) for dataset in exposure.datasets],
        "versions": [asdict(version) for version in exposure.versions],
        "runs": list(exposure.runs),
        "unread": list(exposure.unread),
        "next": [{"command": command, "why": why} for command, why in follows],
    }
    lines = ["nothing is erased (--dry-run)"]
    if erased:
        before = sum(not erasure.is_new for erasure in erased.values())
        lines = [f"{counted(len(erased), 'record')} erased for good{f', {before} of them before' if before else ''}"]
    if of_people:
        lines = [*lines[: len(erased)], f"{counted(len(of_people), 'user')} erased for good, with all later records"]
    if missing := set(ids) - {record_id for holder in exposure.datasets for record_id in holder.ids}:
        names = ", ".join(sorted(missing))
        lines += [f"in no dataset under this id: {names}. A copy of the text under another id is a record too"]
    rows = [("dataset", data.dataset_id, ", ".join(data.parts), ", ".join(data.ids)) for data in exposure.datasets]
    for version in exposure.versions:
        why = {"dataset": f"trained on {version.dataset_id}", "parent": "grew from one that was"}
        text = why.get(version.why, "lineage unread") + (", revoked" if version.revoked else "")
        rows.append(("version", f"{version.name}@{version.version}", text, ", ".join(version.aliases)))
    rows += [("run", run_id, "evaluated on them", "") for run_id in exposure.runs]
    lines += [table(rows)] if rows else []
    lines += ["next:"] if follows else []
    lines += [f"  {command}\n      {why}" if command else f"  {why}" for command, why in follows]
    return Answer(body, "\n".join(lines))


def _next_steps(exposure: "Exposure", *, revocable: bool) -> Iterator[tuple[str, str]]:
    """What has to be done, in this order: the command, or none where there is no command for it, and why."""
    for name in dict.fromkeys(version.name for version in exposure.versions):
        why = f"train {name} again without them: with its own config, and though nothing is new"
        yield "fineloop run -c CONFIG --set data.min_new_records=0", why
    for version in exposure.versions:
        reference = f"{version.name}@{version.version}"
        if version.aliases:
            aliases = ", ".join(version.aliases)
            yield f"fineloop adapters show {reference}", f"{aliases} must move to the new version first"
        if revocable and not version.revoked:
            revoke = f"fineloop adapters revoke {reference} --reason 'trained on an erased record'"
            yield revoke, "so that it is not used again"
    if exposure.versions and not revocable:
        yield "", "what ever held an alias goes only when it is revoked, and registry.trusted_keys names no key"
    if exposure.datasets or exposure.versions:
        gone = "the versions that are revoked or never held an alias, then the datasets that none needs"
        yield "fineloop adapters gc --delete", f"removes, when they are as old as --older-than-days says, {gone}"
    for run_id in exposure.runs:
        yield "", f"delete {run_id}/ from runs/ and evaluations/ in the store by hand: it shows the text of them"
    for uri in exposure.unread:
        yield "", f"look into {uri} yourself: it cannot be read"


@command("schema", example="fineloop schema > schema.json")
def schema(_options: argparse.Namespace) -> Answer:
    """Print the JSON Schema of the config, for editors."""
    text = json_schema()
    return Answer(json.loads(text), text.rstrip("\n"))
