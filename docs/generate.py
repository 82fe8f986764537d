"""Write what the code says of itself: every config key, every command, and the JSON Schema for editors."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.config import config_file
from docs.json_keys import FREE, JSON_KEYS
from pipelines import cli
from pipelines.commands.arguments import Parser

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"-h", "--json", "-v", "-c", "--set", "--home"}
"""Options that the page describes once."""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}

CONFIG = """# Config keys

A config is one TOML file with the sections below. `--set SECTION.KEY=VALUE` replaces one key. Written by `make docs`
from `components/config/`.

These are the keys that people set. The others have defaults that rarely need a change.
"""
FIRST = (
    *("adapter.name", "data.source", "data.group", "data.personal", "model.base", "model.max_length"),
    *("method.name", "method.rank", "method.target_modules"),
    *("train.learning_rate", "train.epochs", "train.batch_size", "train.micro_batch_size"),
    *("train.zero_stage", "train.gradient_checkpointing", "ray.use_gpu", "ray.num_workers"),
    *("gate.metric", "gate.worse_than_champion_by", "registry.bucket"),
)
"""The keys that people set."""
COMMANDS = """# Commands

Every command takes `--help`, `-v` (more on stderr) and `--json`: one JSON object as the last line of stdout, with the
keys named here, while text for people goes to stderr. Exit code 0 is done, whether promoted or held; 2 is a mistake in
the input; 1 is any other failure. A failure's JSON has `error` (`kind`, `message`) and `exit_code`. Written by
`make docs` from `pipelines/commands/`.

What reads a config or the registry takes these too:

| option | |
|---|---|
| `-c FILE`, `--config FILE` | TOML config (default: the built-in example, pipelines/configs/icd10.toml) |
| `--set KEY=VALUE` | replace one key, such as train.learning_rate=2e-4; may be repeated |
| `--home DIR` | where this machine's store, logs and reports lie (default: ./.fineloop) |
"""


def pages() -> dict[Path, str]:
    """Each file with its text."""
    return {
        ROOT / "docs" / "config.md": config_page(json.loads(config_file.json_schema())),
        ROOT / "docs" / "cli.md": cli_page(cli.parser()),
        ROOT / "pipelines" / "configs" / "schema.json": config_file.json_schema(),
    }


def config_page(schema: Mapping[str, Any]) -> str:
    """Markdown: a table for each section of the config, from its JSON Schema."""
    definitions = schema["$defs"]
    lines, shown = list[str](), dict[str, str]()
    waiting = [(name, _resolved(each, definitions)) for name, each in schema["properties"].items()]
    while waiting:
        name, section = waiting.pop(0)
        required = set(section.get("required", []))
        lines += [f"## {name}", "", _one_line(section.get("description", "")), ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        inner = []
        for key, each in section["properties"].items():
            found = _resolved(each, definitions)
            if "properties" in found:
                inner.append((f"{name}.{key}", found))
                continue
            inner += [(f"{name}.{key}", table) for table in _tables(found, definitions) if len(table["properties"]) > 1]
            default = "required" if key in required else f"`{json.dumps(each.get('default'))}`"
            default = "" if default == "`null`" else default
            text = _one_line(each.get("description", ""))
            lines.append(f"| `{key}` | {_type(each, definitions)} | {default} | {text} |")
            shown[f"{name}.{key}"] = f"| `{name}.{key}` | {default} | {text.partition('. ')[0].rstrip('.')} |"
        lines.append("")
        waiting = inner + waiting
    lines = [CONFIG, "| key | default | |", "|---|---|---|", *(shown[key] for key in FIRST), "", *lines]
    return "\n".join(lines).rstrip() + "\n"


def cli_page(parser: argparse.ArgumentParser) -> str:
    """Markdown: what each command does and takes, and the keys of its JSON."""
    lines = [COMMANDS]
    for name, command in commands(parser, "fineloop"):
        example = textwrap.dedent((command.epilog or "").partition("\n\n")[0].removeprefix("example:\n"))
        lines += [f"## {name}", "", _one_line(command.description or ""), "", "```bash", example, "```", ""]
        options = [action for action in command._actions if not SHARED.intersection(action.option_strings)]
        if options:
            lines += ["| option | |", "|---|---|"]
            lines += [f"| {_option(action)} | {_one_line(action.help or '')} |" for action in options]
            lines.append("")
        spelled = name.removeprefix("fineloop ")
        keys = ", ".join(f"`{key}`" for key in JSON_KEYS.get(spelled, "").split())
        lines += [f"JSON: {'; '.join(filter(None, [keys, FREE.get(spelled)]))}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command below `name`, as a person types it, and its parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    if isinstance(parser, Parser):
        for verb, command in parser.verbs.items():
            yield from commands(command, f"{name} {verb}")
    for group in groups:
        for verb, command in group.choices.items():
            yield from commands(command, f"{name} {verb}")


def _option(action: argparse.Action) -> str:
    metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    shown = str(metavar).replace("|", "\\|")
    if not action.option_strings:
        return f"`{shown}`"
    takes = "" if action.nargs == 0 else f" {shown}"
    return ", ".join(f"`{flag}{takes}`" for flag in action.option_strings)


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref", "")
    return {**definitions[reference.rpartition("/")[2]], **schema} if reference else schema


def _tables(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that a key takes, or a list of them."""
    taken = [_resolved(each, definitions) for each in [*schema.get("anyOf", []), *schema.get("oneOf", [])]]
    taken += [_resolved(schema["items"], definitions)] if "items" in schema else []
    return [each for each in taken if "properties" in each]


def _type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    found = _resolved(schema, definitions)
    if any_of := found.get("anyOf") or found.get("oneOf"):
        kinds = [_type(each, definitions) for each in any_of if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in found or "const" in found:
        return ", ".join(f"`{each}`" for each in found.get("enum", [found.get("const")]))
    if found.get("type") == "array":
        return f"list of {_type(found.get('items', {}), definitions)}"
    if "properties" in found:
        return "table"
    if "pattern" in found and found.get("type") != "string":
        return "`module:function`"
    bounds = [f"{word} {found[key]:g}" for key, word in BOUNDS.items() if key in found]
    return ", ".join([str(found.get("type", "any")), *bounds])


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
