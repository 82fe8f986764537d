"""`fineloop data`; `fineloop data erase` is in erase.py."""

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from components.shared.durations import counted
from components.shared.metrics import never_trained_text
from pipelines.commands import erase
from pipelines.commands.arguments import Answer, add_command, add_config, load_config, print_err
from pipelines.commands.table import table
from pipelines.configs import DEFAULT_CONFIG

ANSWERS_SHOWN = 5
CHANGED = {0.1: "one answer in ten", 0.3: "three answers in ten"}
"""Shares of answers in which two models may differ."""
LENGTHS = ("p10", "p50", "p90", "p100")


def add(commands: Any) -> None:
    """Add the command."""
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
    erase.add(data)


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
        from components.report.preview_page import build_page

        options.html.write_text(build_page(body, list(_sentences(body))), encoding="utf-8")
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
