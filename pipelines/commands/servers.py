"""`fineloop store` and `fineloop ray`: this machine's own S3 server and Ray head."""

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, home_option, load_config


def add(commands: Any) -> None:
    """Add both groups."""
    store = commands.add_parser("store", help="this machine's own S3 server: up, down, env", allow_abbrev=False)
    verbs = store.add_subparsers(metavar="COMMAND", required=True)
    up = add_command(
        verbs, "up", _store_up, does="Start the local S3 server and let it stay.", example="fineloop store up"
    )
    down = add_command(
        verbs, "down", _store_down, does="Stop the local S3 server; its data stays.", example="fineloop store down"
    )
    env = add_command(
        verbs,
        "env",
        _store_env,
        does="Print the variables with which any S3 client finds the local server.",
        example='eval "$(fineloop store env)" && aws s3 ls s3://fineloop/',
    )
    ray = commands.add_parser("ray", help="this machine's own Ray head: up, down, env", allow_abbrev=False)
    verbs = ray.add_subparsers(metavar="COMMAND", required=True)
    ray_up = add_command(
        verbs,
        "up",
        _ray_up,
        does="Start the local Ray head, and the S3 server that its jobs use, and let them stay.",
        example="fineloop ray up",
    )
    ray_down = add_command(verbs, "down", _ray_down, does="Stop the local Ray head.", example="fineloop ray down")
    ray_env = add_command(
        verbs,
        "env",
        _ray_env,
        does="Print the variables with which `ray job submit` finds the local head.",
        example='eval "$(fineloop ray env)" && ray job list',
    )
    for parser in (up, ray_up):
        add_config(parser)
    for parser in (up, down, env, ray_up, ray_down, ray_env):
        add_home(parser)


def _store_up(options: argparse.Namespace) -> Answer:
    from pipelines.local.store import store_up

    bucket = load_config(options).registry.bucket
    environment = store_up(options.home, bucket)
    body = {"endpoint": environment["AWS_ENDPOINT_URL"], "bucket": bucket}
    return Answer(body, _is_up("the local S3 server", body["endpoint"], "store", options))


def _store_down(options: argparse.Namespace) -> Answer:
    from pipelines.local.store import store_down

    return _is_down("the local S3 server", store_down(options.home))


def _store_env(options: argparse.Namespace) -> Answer:
    from pipelines.local.store import store_environment

    environment = store_environment(options.home)
    return Answer(environment, exports(environment))


def _ray_up(options: argparse.Namespace) -> Answer:
    from pipelines.local.ground import ray_up

    environment = ray_up(options.home, bucket=load_config(options).registry.bucket)
    body = {"address": environment["RAY_ADDRESS"]}
    return Answer(body, _is_up("the local Ray head", body["address"], "ray", options))


def _ray_down(options: argparse.Namespace) -> Answer:
    from pipelines.local.ray_head import ray_down

    return _is_down("the local Ray head", ray_down(options.home))


def _ray_env(options: argparse.Namespace) -> Answer:
    from pipelines.local.ray_head import ray_environment

    environment = ray_environment(options.home)
    return Answer(environment, exports(environment))


def exports(environment: Mapping[str, str]) -> str:
    """Lines for a shell's eval, and nothing else."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))


def _is_up(what: str, address: str, group: str, options: argparse.Namespace) -> str:
    use = f'eval "$(fineloop {group} env{home_option(options)})"'
    return f"{what} is up at {address}, until `fineloop {group} down{home_option(options)}`; to use it: {use}"


def _is_down(what: str, was_up: bool) -> Answer:
    return Answer({"stopped": was_up}, f"{what} {'has stopped' if was_up else 'was not up'}")
