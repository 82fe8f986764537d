"""Arguments that the commands for Kubeflow share, and the values parsed from them."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import load_config

if TYPE_CHECKING:
    from pipelines.kubeflow.client import Kubeflow
    from pipelines.kubeflow.package import Package

SERVICE_ACCOUNT = "fineloop-pipeline"
EXPERIMENT = "fineloop"


def add_kubeflow(parser: argparse.ArgumentParser) -> None:
    """Add the server's address and the user's namespace on it."""
    parser.add_argument(
        "--host",
        default="",
        metavar="URL",
        help="Kubeflow Pipelines (default: KFP_ENDPOINT, the pod's, the kubeconfig's)",
    )
    parser.add_argument(
        "--namespace",
        default="",
        metavar="NAME",
        help="your namespace on a multi-user Kubeflow (default: KFP_NAMESPACE)",
    )


def add_pipeline(parser: argparse.ArgumentParser, *, keeps: bool = False) -> None:
    """Add the pipeline's image, parameters and service account. With `keeps`, those omitted stay as they are."""
    parser.add_argument("--image", default="", metavar="IMAGE", help="image of every step, pinned by digest")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        dest="parameters",
        metavar="NAME=VALUE",
        help="another parameter of the pipeline; may be repeated",
    )
    default = "as it is" if keeps else SERVICE_ACCOUNT
    parser.add_argument(
        "--service-account",
        default=None if keeps else SERVICE_ACCOUNT,
        metavar="NAME",
        help=f"Kubernetes account of the steps (default: {default}; '' means the server's)",
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add --experiment, the group in which Kubeflow shows the runs."""
    parser.add_argument(
        "--experiment", default=EXPERIMENT, metavar="NAME", help=f"group of runs in the UI (default: {EXPERIMENT})"
    )


def connected(options: argparse.Namespace) -> "Kubeflow":
    """Connect to the server that the options or the environment name."""
    from pipelines.kubeflow.client import connect

    return connect(os.environ, host=options.host, namespace=options.namespace)


def prepared(options: argparse.Namespace) -> "tuple[Package, dict[str, Any]]":
    """Compile the pipeline and resolve its parameters; both are checked before any request to Kubeflow."""
    from components.ray_cluster.base_size import require_disk
    from pipelines.kubeflow import package, parameters
    from pipelines.kubeflow.reach import check_reach

    built = package.build(load_config(options), image=options.image)
    resolved = parameters.resolve(built.spec, built.config, options.parameters)
    check_reach(built.config, resolved)
    if not resolved.get("base_model"):
        require_disk(built.config)
    return built, resolved
