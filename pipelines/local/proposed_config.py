"""A first config for a user's data: values derived from a look at the data, written with a comment for each key."""

import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import config_file
from components.config.schema import DataConfig, RunConfig

Key = tuple[str, str, Any, str]
"""Section, name, value and comment."""

ENOUGH = 200
"""Number of held-out records with which the gate sees a difference of a few points."""
MOST_HELD_OUT = 0.3
SHORTEST, LONGEST = 128, 4096
"""Range of the context lengths that are proposed, in tokens."""
SHORT_ANSWER = 60
"""Length in characters: if nearly all answers are at most this long, they can equal their reference."""


@dataclass(frozen=True)
class Asked:
    """What the user asks for."""

    source: str
    base: str
    name: str
    overrides: Sequence[str] = ()
    """Overrides of config keys, which are written to the file as set."""


def name_from(source: str) -> str:
    """Return a registry name made from the file's name."""
    stem = Path(source.rstrip("/")).name.partition(".")[0]
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63] or "adapter"


def draft(asked: Asked) -> RunConfig:
    """Return the config for a look at the data."""
    table = {
        "adapter": {"name": asked.name},
        "model": {"base": asked.base},
        "data": {"source": asked.source},
    }
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
