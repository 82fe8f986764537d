"""`fineloop store`: this machine's own S3 server."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, load_config
from pipelines.commands.local_servers import exports, is_down, is_up

TITLE = "the local S3 server"


def add(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser("store", help="this machine's own S3 server: up, down, env", allow_abbrev=False)
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    up = add_command(
        verbs, "up", _up, does="Start the local S3 server and leave it running.", example="fineloop store up"
    )
    add_config(up)
    down = add_command(
        verbs, "down", _down, does="Stop the local S3 server; its data stays.", example="fineloop store down"
    )
    env = add_command(
        verbs,
        "env",
        _env,
        does="Print the variables with which any S3 client finds the local server.",
        example='eval "$(fineloop store env)" && aws s3 ls s3://fineloop/',
    )
    for parser in (up, down, env):
        add_home(parser)


def _up(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_up

    bucket = load_config(options).registry.bucket
    environment = store_up(options.home, bucket)
    body = {"endpoint": environment["AWS_ENDPOINT_URL"], "bucket": bucket}
    return Answer(body, is_up(TITLE, body["endpoint"], "store", options))


def _down(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_down

    return is_down(TITLE, store_down(options.home))


def _env(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_environment

    return exports(store_environment(options.home))
