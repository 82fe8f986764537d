"""`fineloop store` and `fineloop ray`, this machine's own servers, and `fineloop reap`, a cluster's forgotten jobs."""

import argparse
import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from components.config.ray import RayConfig, RayJobCluster
from components.ray_cluster.backend import Backend
from components.ray_cluster.kubernetes_api import own_namespace
from components.ray_cluster.submit import connect
from components.shared.errors import KubeflowError, UserError
from pipelines.commands.arguments import (
    CONFIG,
    HOME,
    KUBEFLOW,
    Answer,
    command,
    connected,
    home_option,
    load_config,
    option,
)
from pipelines.local import local_services

if TYPE_CHECKING:
    from pipelines.kubeflow.client import Kubeflow


def _declare(name: str, title: str, *, starts: str, client: str) -> None:
    """Declare the commands of one of this machine's own servers."""

    @command(
        f"{name} up",
        HOME,
        *CONFIG,
        text=f"Start {starts}, until `fineloop {name} down`.",
        example=f"fineloop {name} up",
    )
    def up(options: argparse.Namespace) -> Answer:
        bucket = load_config(options).registry.bucket
        variables, home = local_services.up(name, options.home, bucket), home_option(options)
        body = {"address": variables["RAY_ADDRESS"]} if name == "ray" else {"endpoint": variables["AWS_ENDPOINT_URL"]}
        at, use = next(iter(body.values())), f'eval "$(fineloop {name} env{home})"'
        text = f"{title} is up at {at}, until `fineloop {name} down{home}`; to use it: {use}"
        return Answer(body if name == "ray" else {**body, "bucket": bucket}, text)

    @command(f"{name} down", HOME, text=f"Stop {title}; its files stay.", example=f"fineloop {name} down")
    def down(options: argparse.Namespace) -> Answer:
        was_up = local_services.down(name, options.home)
        return Answer({"stopped": was_up}, f"{title} {'has stopped' if was_up else 'was not up'}")

    example = f'eval "$(fineloop {name} env)" && {client}'

    @command(f"{name} env", HOME, text=f"Print the variables with which clients find {title}.", example=example)
    def env(options: argparse.Namespace) -> Answer:
        """Lines for a shell's eval, and nothing else."""
        variables = local_services.client_environment(name, options.home)
        lines = (f"export {variable}={shlex.quote(value)}" for variable, value in sorted(variables.items()))
        return Answer(variables, "\n".join(lines))


STORE = "the local S3 server"
_declare("store", STORE, starts=STORE, client="aws s3 ls s3://fineloop/")
HEAD = "the local Ray head"
_declare("ray", HEAD, starts=f"{HEAD} and the S3 server that its jobs use", client="ray job list")


@command(
    "reap",
    *KUBEFLOW,
    option("--dry-run", "only say what would be stopped"),
    option("--rayjobs NAMESPACE", "where RayJobs are (default: this pod's namespace)"),
    example="fineloop reap --dry-run",
)
def reap(options: argparse.Namespace) -> Answer:
    """Stop the Ray jobs that no run waits for any more.

    These are jobs past their deadline, and jobs whose Kubeflow run is finished, canceled or gone. A RayJob that
    Kubeflow did not start is deleted a day after its end. It looks at the RayJobs of a namespace and at the cluster of
    RAY_ADDRESS; if one of the two cannot be reached, it still looks at the other. A job in doubt is kept.
    """
    from pipelines.kubeflow import reap as reaping

    backends: dict[str, Callable[[], Backend]] = {}
    if options.rayjobs or own_namespace():
        rayjobs = RayConfig(cluster=RayJobCluster(kind="rayjob", namespace=options.rayjobs))
        backends["RayJobs"] = lambda: connect(rayjobs)
    if address := os.environ.get("RAY_ADDRESS"):
        backends[f"RAY_ADDRESS {address}"] = connect
    if not backends:
        raise UserError("there is no cluster to look at: set RAY_ADDRESS, or name the RayJobs' --rayjobs NAMESPACE")

    def kubeflow() -> "Kubeflow":
        try:
            return connected(options)
        except UserError as exc:  # no server is named: what is in doubt is kept
            raise KubeflowError(str(exc)) from exc

    verdicts, failures = reaping.reap(backends, reaping.state_on(kubeflow), dry_run=options.dry_run)
    did = "would stop" if options.dry_run else "stopped"
    in_order = sorted(verdicts, key=lambda verdict: not verdict.is_orphan)
    lines = [f"{did if verdict.is_orphan else 'kept'} {verdict.job.job_id}: {verdict.why}" for verdict in in_order]
    lines += [f"could not look at {failure}" for failure in failures]
    body = {
        "stopped": [verdict.as_json() for verdict in verdicts if verdict.is_orphan],
        "kept": [verdict.as_json() for verdict in verdicts if not verdict.is_orphan],
        "dry_run": options.dry_run,
        "failures": failures,
    }
    return Answer(body, "\n".join(lines) or "no Ray job of Fineloop is running", 1 if failures else 0)
