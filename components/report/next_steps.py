"""Commands that a reader of the report may want to run next."""

import re
import shlex

from components.config.config_file import key_paths
from components.config.schema import RunConfig
from components.registry.aliases import PRODUCTION
from components.report.headline import failed_step
from components.report.run_files import RunFiles
from components.shared.errors import UserError, by_name

HOME = ".fineloop"
"""The default of --home."""


def next_steps(run: RunFiles, *, home: str = HOME, verb: str = "run") -> list[tuple[str, str]]:
    """The commands, each with its purpose; `home` and `verb` are those of the command that began the run."""
    option = "" if home == HOME else f" --home {shlex.quote(home)}"
    return [(f"{command}{option}", why) for command, why in _steps(run, home, verb)]


def _steps(run: RunFiles, home: str, verb: str) -> list[tuple[str, str]]:
    version, decision = run.version, run.decision
    config = shlex.quote(f"{home}/runs/{run.run_id}/config.toml")
    failed = failed_step(run)
    error = dict(failed.result.get("error") or {}) if failed else {}
    if isinstance(by_name(error.get("kind", ""), ""), UserError):  # the same config would fail again
        named = dict.fromkeys(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", error.get("message", "")))
        keys = [key for key in named if key in {*key_paths(RunConfig)}]
        again = [(f"fineloop {verb} -c {config} --set {key}=VALUE", f"run it with another {key}") for key in keys]
        return again or [(f"fineloop {verb} -c {config}", "run it again, once what the message names is mended")]
    if failed or (decision is None and run.evaluation is None):
        return [(f"fineloop {verb} -c {config} --run-id {run.run_id}", "go on from where it was")]
    if version is None or (decision is not None and decision.decision == "skipped"):
        return []
    reference = f"{run.adapter}@{version}"
    on_alias = "" if run.alias == PRODUCTION else f" --alias {shlex.quote(run.alias)}"
    steps = [(f"fineloop chat {reference}", "talk to the candidate, beside its base")]
    champion = run.model("champion")
    if champion is not None and champion.version and champion.version != version:
        compared = f"{run.adapter}@{champion.version} {reference}"
        steps.append((f"fineloop compare {compared} --html side-by-side.html", "lay it beside the version before it"))
    if decision is None:
        steps.append((f"fineloop adapters promote {reference}{on_alias}", f"put it into {run.alias}"))
    elif decision.waits:
        approve = f"fineloop adapters approve {reference} --by NAME --reason TEXT{on_alias}"
        steps.append((approve, f"put it into {run.alias}"))
    elif decision.promoted and decision.champion:
        steps.append((f"fineloop adapters rollback {run.adapter}{on_alias}", "go back to the version before it"))
    elif not decision.promoted:
        steps.append((f"fineloop replay {run.run_id}", "decide again by the same records"))
    return steps
