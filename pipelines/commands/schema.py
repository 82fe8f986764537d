"""`fineloop schema`."""

import argparse
import json
from typing import Any

from pipelines.commands.arguments import Answer, add_command


def add(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "schema",
        _schema,
        does="Print the JSON Schema of the config, for editors.",
        example="fineloop schema > schema.json",
    )


def _schema(_options: argparse.Namespace) -> Answer:
    from components.config.config_file import json_schema

    schema = json_schema()
    return Answer(json.loads(schema), schema.rstrip("\n"))
