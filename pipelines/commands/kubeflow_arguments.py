"""Arguments that the commands for Kubeflow share, and what they become."""

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
    """Which server, and whose part of it."""
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
    """What runs. With `keeps`, what is left out stays as it is."""
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
    """Where Kubeflow shows it."""
    parser.add_argument(
        "--experiment", default=EXPERIMENT, metavar="NAME", help=f"group of runs in the UI (default: {EXPERIMENT})"
    )


def connected(options: argparse.Namespace) -> "Kubeflow":
    """The server that the options or the environment name."""
    from pipelines.kubeflow.client import connect

    return connect(os.environ, host=options.host, namespace=options.namespace)


def prepared(options: argparse.Namespace) -> "tuple[Package, dict[str, Any]]":
    """The compiled pipeline and its parameters, checked before Kubeflow is asked for anything."""
    from components.ray_cluster.base_size import require_disk
    from pipelines.kubeflow import package, parameters
    from pipelines.kubeflow.reach import check_reach

    built = package.build(load_config(options), image=options.image)
    resolved = parameters.resolve(built.spec, built.config, options.parameters)
    check_reach(built.config, resolved)
    if not resolved.get("base_model"):
        require_disk(built.config)
    return built, resolved
