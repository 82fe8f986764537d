"""`fineloop store` and `fineloop ray`, this machine's own servers, and `fineloop reap`, a cluster's forgotten jobs."""

import argparse
import os
import shlex
from typing import TYPE_CHECKING, Any

from components.shared.errors import KubeflowError, UserError
from pipelines.commands.arguments import (
    Answer,
    add_command,
    add_config,
    add_group,
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


def add_store(commands: Any) -> None:
    _add_server(
        commands,
        "store",
        "the local S3 server",
        up="Start the local S3 server and leave it running.",
        down="Stop the local S3 server; its data stays.",
        env="Print the variables with which any S3 client finds the local server.",
        use="aws s3 ls s3://fineloop/",
    )


def add_ray(commands: Any) -> None:
    _add_server(
        commands,
        "ray",
        "the local Ray head",
        up="Start the local Ray head and the S3 server that its jobs use, and leave them running.",
        down="Stop the local Ray head.",
        env="Print the variables with which `ray job submit` finds the local head.",
        use="ray job list",
    )


def _add_server(commands: Any, name: str, title: str, *, up: str, down: str, env: str, use: str) -> None:
    what = f"this machine's own {title.removeprefix('the local ')}"
    verbs = add_group(commands, name, does=f"{what}: up, down, env", more=f"{what}.", example=f"fineloop {name} up")
    for verb, command, does in (("up", _up, up), ("down", _down, down), ("env", _env, env)):
        example = f'eval "$(fineloop {name} env)" && {use}' if verb == "env" else f"fineloop {name} {verb}"
        parser = add_command(verbs, verb, command, does=does, example=example)
        parser.set_defaults(server=name, title=title)
        add_home(parser)
        if verb == "up":
            add_config(parser)


def _up(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import up

    bucket, name = load_config(options).registry.bucket, options.server
    environment = up(name, options.home, bucket)
    if name == "store":
        body = {"endpoint": environment["AWS_ENDPOINT_URL"], "bucket": bucket}
    else:
        body = {"address": environment["RAY_ADDRESS"]}
    home, address = home_option(options), next(iter(body.values()))
    use = f'eval "$(fineloop {name} env{home})"'
    return Answer(body, f"{options.title} is up at {address}, until `fineloop {name} down{home}`; to use it: {use}")


def _down(options: argparse.Namespace) -> Answer:
    from pipelines.local.local_services import down

    was_up = down(options.server, options.home)
    return Answer({"stopped": was_up}, f"{options.title} {'has stopped' if was_up else 'was not up'}")


def _env(options: argparse.Namespace) -> Answer:
    """Print only lines for a shell's eval."""
    from pipelines.local.local_services import client_environment

    environment = client_environment(options.server, options.home)
    lines = (f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return Answer(environment, "\n".join(lines))


def add_reap(commands: Any) -> None:
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
        is_listed=False,
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
