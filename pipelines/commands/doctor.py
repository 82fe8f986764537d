"""`fineloop doctor`."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import (
    SERVICE_ACCOUNT,
    Answer,
    add_command,
    add_kubeflow,
    load_config,
)

if TYPE_CHECKING:
    from components.config.schema import RunConfig
    from pipelines.check import Check


def add_doctor(commands: Any) -> None:
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        does="Check whether this machine, or with --host a cluster, can run Fineloop, and how to fix what cannot.",
        more="It starts no server. It writes to a configured store, reads that back, and removes it again. With "
        "--host it checks, in Kubeflow and by the kubeconfig in Kubernetes, all that a run of the config needs "
        "there: accounts, rights, secrets, nodes, KubeRay, Kueue's queue and quota, and that their controllers run. "
        "What it may not see has a question mark. It changes nothing; with --image it starts pods that try the "
        "store, and each MLflow that the config names, from inside the cluster, and deletes them.",
        example="fineloop doctor --host http://localhost:8080 --namespace fineloop",
        opens_registry=True,
    )
    add_kubeflow(doctor)
    doctor.add_argument(
        "--image", default="", metavar="IMAGE", help="image of the steps, tried in a pod with the store"
    )
    doctor.add_argument(
        "--service-account",
        default=SERVICE_ACCOUNT,
        metavar="NAME",
        help=f"Kubernetes account of the steps (default: {SERVICE_ACCOUNT})",
    )


def _doctor(options: argparse.Namespace) -> Answer:
    from pipelines.check import IN_MESSAGE

    config = load_config(options)
    found = _of_cluster(config, options) if options.host else _of_this_machine(config, options)
    width = max(len(check.name) for check in found)
    fixes = ["" if check.ok or check.fix == IN_MESSAGE else f": {check.fix}" for check in found]
    lines = [
        f"{_mark(check)}  {check.name:<{width}}  {check.detail}{fix}" for check, fix in zip(found, fixes, strict=True)
    ]
    is_well = all(check.ok for check in found)
    if num_unseen := sum(not check.seen for check in found):
        lines.append(f"{num_unseen} not seen: this account may not look at them")
    body = {"ok": is_well, "not_seen": num_unseen, "checks": [vars(check) for check in found]}
    return Answer(body, "\n".join(lines), 0 if is_well else 1)


def _mark(check: "Check") -> str:
    return "FAIL" if not check.ok else "ok  " if check.seen else "?   "


def _of_this_machine(config: "RunConfig", options: argparse.Namespace) -> "list[Check]":
    from pipelines.local.doctor import checks

    return checks(options.home, config=config)


def _of_cluster(config: "RunConfig", options: argparse.Namespace) -> "list[Check]":
    from pipelines.kubeflow.doctor import cluster_checks

    asked = cluster_checks(
        config,
        os.environ,
        host=options.host,
        namespace=options.namespace,
        service_account=options.service_account,
        image=options.image,
    )
    return list(asked)
