"""`fineloop watch`."""

import argparse
import sys
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry


def add(commands: Any) -> None:
    """Add the command."""
    watch = add_command(
        commands,
        "watch",
        _watch,
        does="Show the progress of a run on Kubeflow or another cluster, until it is over.",
        more="It reads what the run writes to the registry's store: each step when it has ended, and the "
        "training's curve every 15 s. Ctrl-C stops watching, not the run.",
        example="fineloop watch 20261101-0300 -c mine.toml",
    )
    watch.add_argument(
        "run", metavar="RUN", help="id in the store, or the first digits of it: `fineloop runs list --store`"
    )
    add_config(watch)
    add_home(watch)


def _watch(options: argparse.Namespace) -> Answer:
    from pipelines.local.display import Display, is_live
    from pipelines.local.elsewhere import Elsewhere, follow
    from pipelines.local.past_runs import find

    with opened_registry(options) as store:
        run_id = find(store, options.run)
        display = Display(sys.stderr, live=is_live(sys.stderr))
        run = Elsewhere(store, run_id, display)
        follow(run, display.tick)
        display.close()
        decision = run.decision()
    body: dict[str, Any] = {"run_id": run_id, "decision": decision.decision if decision else None, "error": None}
    if run.failed:
        error = run.failed.result.get("error", {})
        said = f"{run_id} failed in {run.failed.step}: {error.get('message', 'its log says why')}"
        return Answer({**body, "error": error or None}, said, exit_code=1)
    why = f"; fineloop runs show {run_id} --store says why"
    return Answer(body, f"{run_id} is over: {(decision.verdict or decision.decision) + why if decision else 'trained'}")
