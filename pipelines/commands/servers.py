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


@command("store up", HOME, *CONFIG, example="fineloop store up")
def store_up(options: argparse.Namespace) -> Answer:
    """Start the local S3 server and leave it running."""
    return _up(options, "store")


@command("store down", HOME, example="fineloop store down")
def store_down(options: argparse.Namespace) -> Answer:
    """Stop the local S3 server; its data stays."""
    return _down(options, "store")


@command("store env", HOME, example='eval "$(fineloop store env)" && aws s3 ls s3://fineloop/')
def store_env(options: argparse.Namespace) -> Answer:
    """Print the variables with which any S3 client finds the local server."""
    return _env(options, "store")


@command("ray up", HOME, *CONFIG, example="fineloop ray up")
def ray_up(options: argparse.Namespace) -> Answer:
    """Start the local Ray head and the S3 server that its jobs use, and leave them running."""
    return _up(options, "ray")


@command("ray down", HOME, example="fineloop ray down")
def ray_down(options: argparse.Namespace) -> Answer:
    """Stop the local Ray head."""
    return _down(options, "ray")


@command("ray env", HOME, example='eval "$(fineloop ray env)" && ray job list')
def ray_env(options: argparse.Namespace) -> Answer:
    """Print the variables with which `ray job submit` finds the local head."""
    return _env(options, "ray")


TITLES = {"store": "the local S3 server", "ray": "the local Ray head"}


def _up(options: argparse.Namespace, name: str) -> Answer:
    bucket = load_config(options).registry.bucket
    environment, home = local_services.up(name, options.home, bucket), home_option(options)
    body = {"address": environment["RAY_ADDRESS"]} if name == "ray" else {"endpoint": environment["AWS_ENDPOINT_URL"]}
    at = next(iter(body.values()))
    use = f'eval "$(fineloop {name} env{home})"'
    text = f"{TITLES[name]} is up at {at}, until `fineloop {name} down{home}`; to use it: {use}"
    return Answer(body if name == "ray" else {**body, "bucket": bucket}, text)


def _down(options: argparse.Namespace, name: str) -> Answer:
    was_up = local_services.down(name, options.home)
    return Answer({"stopped": was_up}, f"{TITLES[name]} {'has stopped' if was_up else 'was not up'}")


def _env(options: argparse.Namespace, name: str) -> Answer:
    """Lines for a shell's eval, and nothing else."""
    environment = local_services.client_environment(name, options.home)
    lines = (f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return Answer(environment, "\n".join(lines))


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
    lines = [f"{did if each.is_orphan else 'kept'} {each.job.job_id}: {each.why}" for each in in_order]
    lines += [f"could not look at {failure}" for failure in failures]
    body = {
        "stopped": [each.as_json() for each in verdicts if each.is_orphan],
        "kept": [each.as_json() for each in verdicts if not each.is_orphan],
        "dry_run": options.dry_run,
        "failures": failures,
    }
    return Answer(body, "\n".join(lines) or "no Ray job of Fineloop is running", 1 if failures else 0)
