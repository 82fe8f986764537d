"""`fineloop store`: this machine's own S3 server."""

import argparse
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.shared.errors import KubeflowError, UserError
from pipelines.commands.arguments import (
    Answer,
    add_command,
    add_config,
    add_home,
    add_kubeflow,
    connected,
    home_option,
    load_config,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from components.ray_cluster.backend import Backend
    from pipelines.kubeflow.client import Kubeflow


# Answers that `fineloop store` and `fineloop ray` share, about a server of this machine.


def is_up(title: str, address: str, group: str, options: argparse.Namespace) -> str:
    """Return the text of `up`: how to use the server and how to stop it."""
    use = f'eval "$(fineloop {group} env{home_option(options)})"'
    return f"{title} is up at {address}, until `fineloop {group} down{home_option(options)}`; to use it: {use}"


def is_down(title: str, was_up: bool) -> Answer:
    """Return the answer of `down`."""
    return Answer({"stopped": was_up}, f"{title} {'has stopped' if was_up else 'was not up'}")


def exports(environment: Mapping[str, str]) -> Answer:
    """Return the answer of `env`: only lines for a shell's eval."""
    lines = (f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return Answer(dict(environment), "\n".join(lines))


STORE_TITLE = "the local S3 server"


def add_store(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser("store", help="this machine's own S3 server: up, down, env", allow_abbrev=False)
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    up = add_command(
        verbs, "up", _store_up, does="Start the local S3 server and leave it running.", example="fineloop store up"
    )
    add_config(up)
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
    for parser in (up, down, env):
        add_home(parser)


def _store_up(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_up

    bucket = load_config(options).registry.bucket
    environment = store_up(options.home, bucket)
    body = {"endpoint": environment["AWS_ENDPOINT_URL"], "bucket": bucket}
    return Answer(body, is_up(STORE_TITLE, body["endpoint"], "store", options))


def _store_down(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_down

    return is_down(STORE_TITLE, store_down(options.home))


def _store_env(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import store_environment

    return exports(store_environment(options.home))


# `fineloop ray`: this machine's own Ray head.

RAY_TITLE = "the local Ray head"


def add_ray(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser("ray", help="this machine's own Ray head: up, down, env", allow_abbrev=False)
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    up = add_command(
        verbs,
        "up",
        _ray_up,
        does="Start the local Ray head and the S3 server that its jobs use, and leave them running.",
        example="fineloop ray up",
    )
    add_config(up)
    down = add_command(verbs, "down", _ray_down, does="Stop the local Ray head.", example="fineloop ray down")
    env = add_command(
        verbs,
        "env",
        _ray_env,
        does="Print the variables with which `ray job submit` finds the local head.",
        example='eval "$(fineloop ray env)" && ray job list',
    )
    for parser in (up, down, env):
        add_home(parser)


def _ray_up(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_up

    environment = ray_up(options.home, load_config(options).registry.bucket)
    body = {"address": environment["RAY_ADDRESS"]}
    return Answer(body, is_up(RAY_TITLE, body["address"], "ray", options))


def _ray_down(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_down

    return is_down(RAY_TITLE, ray_down(options.home))


def _ray_env(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import ray_environment

    return exports(ray_environment(options.home))


# `fineloop reap`.


def add_reap(commands: Any) -> None:
    """Add the command."""
    reap = add_command(
        commands,
        "reap",
        _reap,
        does="Stop the Ray jobs that no run waits for any more.",
        more="These are jobs past their deadline, and jobs whose Kubeflow run is finished, canceled or gone. A "
        "RayJob that Kubeflow did not start is deleted a day after its end. It looks at the RayJobs of a namespace "
        "and at the cluster of RAY_ADDRESS; if one of the two cannot be reached, it still looks at the other. A "
        "job in doubt is kept.",
        example="fineloop reap --dry-run",
    )
    add_kubeflow(reap)
    reap.add_argument("--dry-run", action="store_true", help="only say what would be stopped")
    reap.add_argument(
        "--rayjobs", default="", metavar="NAMESPACE", help="where RayJobs are (default: the namespace of this pod)"
    )


def _reap(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.reap import reap, state_on

    def connect() -> "Kubeflow":
        try:
            return connected(options)
        except UserError as exc:  # no server is named: what is in doubt is kept
            raise KubeflowError(str(exc)) from exc

    verdicts, failures = reap(_backends(options.rayjobs), state_on(connect), dry_run=options.dry_run)
    orphans = [verdict for verdict in verdicts if verdict.is_orphan]
    kept = [verdict for verdict in verdicts if not verdict.is_orphan]
    did = "would stop" if options.dry_run else "stopped"
    lines = [f"{did} {each.job.job_id}: {each.why}" for each in orphans]
    lines += [f"kept {each.job.job_id}: {each.why}" for each in kept]
    lines += [f"could not look at {failure}" for failure in failures]
    body: dict[str, Any] = {"stopped": [each.as_json() for each in orphans], "kept": [each.as_json() for each in kept]}
    body |= {"dry_run": options.dry_run, "failures": failures}
    return Answer(body, "\n".join(lines) or "no Ray job of Fineloop is running", 1 if failures else 0)


def _backends(namespace: str) -> "dict[str, Callable[[], Backend]]":
    from components.config.ray import RayConfig, RayJobCluster
    from components.ray_cluster.kubernetes_api import own_namespace
    from components.ray_cluster.submit import connect

    found: dict[str, Callable[[], Backend]] = {}
    if namespace or own_namespace():
        rayjobs = RayConfig(cluster=RayJobCluster(kind="rayjob", namespace=namespace))
        found["RayJobs"] = lambda: connect(rayjobs)
    if address := os.environ.get("RAY_ADDRESS"):
        found[f"RAY_ADDRESS {address}"] = connect
    if not found:
        raise UserError("there is no cluster to look at: set RAY_ADDRESS, or name the RayJobs' --rayjobs NAMESPACE")
    return found
