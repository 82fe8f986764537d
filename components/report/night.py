"""Tells of a run that ended without moving its alias: held, skipped or failed, why, and what to do about it."""

import hmac
import re
from collections.abc import Mapping
from typing import Any

from components.config.schema import NightKind, RunConfig
from components.handover.announce import NOTIFIED, Night, announce_night, secrets, without_secrets
from components.ray_cluster.backend import kubeflow_run
from components.report.html import clipped
from components.report.run_files import RunFiles
from components.report.sections import headline, next_steps
from components.shared.protocol import printable
from components.step.step import INTERRUPTED

KINDS: dict[str, NightKind] = {"hold": "held", "skipped": "skipped", "failed": "failed"}
ENDS: dict[str, NightKind] = {"hold": "held", "skip": "skipped"}
"""The steps that end a run and move no alias."""
UNSAID = "A step ended without saying why: it was killed, or somebody stopped the run. Its log may say more."


def told(
    config: RunConfig, run: RunFiles, report_uri: str, *, failed: bool, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Notify the servers of `announce` that are told of nights, each once however often the run is reported on.

    `failed` is the runner's word: a step that was killed left none. Returns the night's `event_id` and the outcomes by
    server as `announced`, for the step's record; empty where there is nothing to tell: the alias moved, or somebody at
    this machine interrupted the run.
    """
    top = headline(run)
    kind, reasons, title, commands = KINDS.get(top.verdict), top.reasons, top.title, next_steps(run)
    end = next((step for step in run.steps if step.succeeded and step.step in ENDS), None)
    if kind is None and end and not any(step.moved_alias for step in run.steps):  # the decision was replaced since
        own = end.result.get("reasons")
        kind, reasons, commands = ENDS[end.step], tuple(map(str, own)) if isinstance(own, list) else (), []
        title = f"{run.adapter}: {run.alias} stays as it is"
    if kind is None and failed:
        kind, reasons = "failed", (UNSAID,)
    if kind is None or environment.get(INTERRUPTED) or not config.announce.servers:
        return {}
    # A reason may hold what a training or a library wrote, and is sent elsewhere.
    text = re.sub(r"(\w://)[^\s/@]+@", r"\1***@", without_secrets(" ".join(" ".join(reasons).split()), environment))
    reason = clipped(printable(text))
    on_kubeflow = kubeflow_run(environment, run.run_id)
    if not commands or kind == "skipped" or (on_kubeflow and kind == "failed"):
        commands = [(f"fineloop runs show {on_kubeflow or run.run_id}", "see what came of it, step by step")]
    # Keyed, so that a training, which may write the record of this step, cannot say of a coming night that it was told.
    key = "\0".join(environment.get(name, "") for name in secrets(of_nights=True))
    night = Night(
        event_id=hmac.digest(key.encode(), "\0".join((report_uri, kind, reason)).encode(), "sha256").hex()[:32],
        kind=kind,
        time=run.generated_at.isoformat(),
        adapter=run.adapter,
        alias=run.alias,
        run_id=run.run_id,
        candidate=run.version,
        title=title,
        reason=reason,
        commands=[{"command": command, "why": why} for command, why in commands],
        report_uri=report_uri,
    )
    before = run.result("report")
    outcomes = before.get("announced") if before.get("event_id") == night.event_id else None
    notified = [key for key, outcome in outcomes.items() if outcome == NOTIFIED] if isinstance(outcomes, dict) else []
    announced = announce_night(config.announce, night, environment, notified=notified)
    return {"event_id": night.event_id, "announced": announced}
