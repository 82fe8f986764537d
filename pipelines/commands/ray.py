"""`fineloop ray`: this machine's own Ray head."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, load_config
from pipelines.commands.local_servers import exports, is_down, is_up

TITLE = "the local Ray head"


def add(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser("ray", help="this machine's own Ray head: up, down, env", allow_abbrev=False)
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    up = add_command(
        verbs,
        "up",
        _up,
        does="Start the local Ray head and the S3 server that its jobs use, and leave them running.",
        example="fineloop ray up",
    )
    add_config(up)
    down = add_command(verbs, "down", _down, does="Stop the local Ray head.", example="fineloop ray down")
    env = add_command(
        verbs,
        "env",
        _env,
        does="Print the variables with which `ray job submit` finds the local head.",
        example='eval "$(fineloop ray env)" && ray job list',
    )
    for parser in (up, down, env):
        add_home(parser)


def _up(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_up

    environment = ray_up(options.home, bucket=load_config(options).registry.bucket)
    body = {"address": environment["RAY_ADDRESS"]}
    return Answer(body, is_up(TITLE, body["address"], "ray", options))


def _down(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_down

    return is_down(TITLE, ray_down(options.home))


def _env(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_environment

    return exports(ray_environment(options.home))
