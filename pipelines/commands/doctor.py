"""`fineloop doctor` and `fineloop completion`."""

import argparse
import os

from components.shared.errors import UserError
from pipelines.check import IN_MESSAGE
from pipelines.commands.arguments import ACCOUNT, KUBEFLOW, REGISTRY, Answer, command, load_config, option
from pipelines.local.doctor import checks


@command(
    "doctor",
    *(*REGISTRY, *KUBEFLOW),
    option("--image IMAGE", "image of the steps, tried in a pod with the store"),
    ACCOUNT,
    example="fineloop doctor --host http://localhost:8080 --namespace fineloop",
)
def doctor(options: argparse.Namespace) -> Answer:
    """Check whether this machine, or with --host a cluster, can run Fineloop, and how to fix what cannot.

    It starts no server. It writes to a configured store, reads that back, and removes it again. With --host it checks,
    in Kubeflow and by the kubeconfig in Kubernetes, all that a run of the config needs there: accounts, rights,
    secrets, nodes, KubeRay, Kueue's queue and quota, and that their controllers run. What it may not see has a question
    mark. It changes nothing; with --image it starts pods that try the store, and each MLflow that the config names,
    from inside the cluster, and deletes them.
    """
    config = load_config(options)
    if options.host:
        from pipelines.kubeflow.doctor import cluster_checks

        where = {"host": options.host, "namespace": options.namespace}
        account = {"service_account": options.service_account, "image": options.image}
        results = list(cluster_checks(config, os.environ, **where, **account))
    else:
        results = checks(options.home, config)
    width = max(len(check.name) for check in results)
    lines = []
    for check in results:
        mark = "FAIL" if not check.ok else "ok  " if check.seen else "?   "
        fix = "" if check.ok or check.fix == IN_MESSAGE else f": {check.fix}"
        lines.append(f"{mark}  {check.name:<{width}}  {check.detail}{fix}")
    is_well = all(check.ok for check in results)
    if num_unseen := sum(not check.seen for check in results):
        lines.append(f"{num_unseen} not seen: this account may not look at them")
    body = {"ok": is_well, "not_seen": num_unseen, "checks": [vars(check) for check in results]}
    return Answer(body, "\n".join(lines), 0 if is_well else 1)


@command(
    "completion",
    option("shell", choices=("bash", "zsh", "tcsh", "fish")),
    example="fineloop completion bash > ~/.local/share/bash-completion/completions/fineloop",
)
def completion(options: argparse.Namespace) -> Answer:
    """Print a shell completion script for commands and options.

    Where to write it: for bash ~/.local/share/bash-completion/completions/fineloop, for zsh a file _fineloop in a
    folder of its fpath, for fish ~/.config/fish/completions/fineloop.fish.
    """
    try:
        import shtab
    except ImportError as exc:
        raise UserError("shtab is not installed here: pip install 'fineloop[local]'") from exc
    script = shtab.complete(options.whole(), shell=options.shell)
    return Answer({"shell": options.shell, "script": script}, script)
