"""`fineloop reap`."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from components.shared.errors import KubeflowError, UserError
from pipelines.commands.arguments import Answer, add_command
from pipelines.commands.kubeflow_arguments import add_kubeflow, connected

if TYPE_CHECKING:
    from collections.abc import Callable

    from components.ray_cluster.backend import Backend
    from pipelines.kubeflow.client import Kubeflow


def add(commands: Any) -> None:
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
