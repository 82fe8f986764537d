"""Outcome of a finished run, read from the store, as the command line reports it."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.promote.announce import failed_notifications, warning
from components.records import runs
from components.records.runs import PAGES
from components.records.steps import ROLES, Decision, Evaluation, Role, StepRecord, TrainResult
from components.registry.aliases import PRODUCTION
from components.shared.errors import FineloopError
from components.shared.metrics import metrics_of
from pipelines.local.local_services import store_configured
from pipelines.local.private import private_folder

if TYPE_CHECKING:
    from components.store.store import Store


@dataclass(frozen=True)
class Outcome:
    """The object that `fineloop run --json` prints; `train` leaves the decision out. A skipped run has no version."""

    run_id: str
    adapter: str
    alias: str
    version: str | None
    version_uri: str | None
    decision: str | None
    verdict: str | None
    promoted: bool
    reasons: list[str]
    metrics: dict[Role, dict[str, float | None] | None]
    report: str | None
    store: dict[str, str]
    timings_s: dict[str, float]
    untold: dict[str, str] = field(default_factory=dict)
    """Notifications of the promotion that failed, and why."""

    def as_json(self) -> dict[str, Any]:
        """Return the object with the keys that scripts rely on."""
        fields = dict(vars(self))
        del fields["alias"]
        if not self.untold:
            del fields["untold"]
        if self.decision is None:
            for key in ("decision", "verdict", "promoted", "reasons", "report"):
                del fields[key]
        return fields


def read_outcome(store: "Store", run_id: str, *, ground_s: float, total_s: float, report_path: Path) -> Outcome:
    """Read the outcome of a run of the whole pipeline. Copy its report to `report_path`, HOME/runs/RUN/report.html, and
    the registry's pages to HOME/pages/, where the report's links lead.

    Raises:
        ObjectMissing: the run has no decision or no report.
        FineloopError: the run decided to promote and the alias did not move, or the other way round.
    """
    decision, steps = runs.read(store, run_id, Decision, to_show=True), runs.steps(store, run_id)
    promoted = any(step.moved_alias for step in steps)
    if promoted != decision.promoted:
        place, did = f"{decision.adapter}@{decision.alias}", "moved" if promoted else "did not move"
        raise FineloopError(f"run {run_id} decided to {decision.decision} {decision.version}, but {place} {did}")
    report_path.write_bytes(store.get(runs.run_key(run_id, runs.REPORT)))
    pages = private_folder(report_path.parents[2] / PAGES)
    for info in store.list(PAGES):
        if not info.key.endswith(".html"):
            continue
        (pages / Path(info.key).name).write_bytes(store.get(info.key))
    return Outcome(
        run_id=run_id,
        adapter=decision.adapter,
        alias=decision.alias,
        version=decision.version,
        version_uri=decision.version_uri,
        decision=decision.decision,
        verdict=decision.verdict,
        promoted=promoted,
        reasons=list(decision.reasons),
        metrics=_metrics(store, run_id) if decision.version else dict.fromkeys(ROLES),
        report=str(report_path),
        store=_where(store),
        timings_s={"ground": ground_s, **_seconds(steps), "total": total_s},
        untold=failed_notifications(steps),
    )


def read_trained(config: RunConfig, store: "Store", run_id: str, *, ground_s: float, total_s: float) -> Outcome:
    """Read the outcome of `fineloop train`.

    Raises:
        ObjectMissing: the run published no version, or compared none.
    """
    result = runs.read(store, run_id, TrainResult)
    return Outcome(
        run_id=run_id,
        adapter=config.adapter.name,
        alias=config.adapter.alias,
        version=result.version,
        version_uri=result.version_uri,
        decision=None,
        verdict=None,
        promoted=False,
        reasons=[],
        metrics=_metrics(store, run_id),
        report=None,
        store=_where(store),
        timings_s={"ground": ground_s, **_seconds(runs.steps(store, run_id)), "total": total_s},
    )


def _seconds(steps: Sequence[StepRecord]) -> dict[str, float]:
    return {step.step: step.seconds for step in steps}


def summary(outcome: Outcome, *, home_option: str, program: str = "fineloop") -> str:
    """Format the outcome for people.

    `home_option` is the --home option that the suggested commands need, `program` the name of `fineloop` in this shell.
    """
    reference = outcome.adapter if outcome.promoted else f"{outcome.adapter}@{outcome.version}"
    headline = {
        "skipped": f"skipped: {outcome.adapter}@{outcome.alias} stays as it is, and nothing was trained",
        "promote": f"promoted: {outcome.adapter}@{outcome.alias} is now {outcome.version}",
        "hold": f"held: {outcome.version} is published, and {outcome.adapter}@{outcome.alias} stays where it was",
        None: f"published {outcome.adapter} {outcome.version}, without an alias",
    }[outcome.decision]
    waits = outcome.verdict == "needs approval"
    if waits:
        headline = f"waits for approval: {outcome.version}, and {outcome.adapter}@{outcome.alias} stays where it was"
    reasons = [
        textwrap.fill(reason, 100, initial_indent="  - ", subsequent_indent="    ") for reason in outcome.reasons
    ]
    table = [*_table(outcome.metrics), ""] if outcome.version else []
    warnings = [warning(key, outcome.adapter, outcome.alias, why) for key, why in outcome.untold.items()]
    lines = ["", headline, *reasons, *warnings, "", *table]
    where = {"version": outcome.version_uri, "report": outcome.report}
    where["store"] = f"{outcome.store['endpoint']} (bucket {outcome.store['bucket']})"
    lines += [f"  {what:<9} {place}" for what, place in where.items() if place]
    parts = {"servers" if step == "ground" else step: seconds for step, seconds in outcome.timings_s.items()}
    took = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in parts.items() if step != "total")
    lines += [f"  {'time':<9} {outcome.timings_s['total']:.0f} s: {took}", ""]
    commands = {}
    if outcome.version:
        commands[f"{program} chat {shlex.quote(reference)}{home_option}"] = "talk to it, beside its base"
    if outcome.promoted and outcome.metrics["champion"]:
        commands[f"{program} adapters rollback {outcome.adapter}{home_option}"] = "go back to the one before"
    elif waits:
        on_alias = "" if outcome.alias == PRODUCTION else f" --alias {outcome.alias}"
        approve = f"{program} adapters approve {shlex.quote(reference)} --by NAME --reason TEXT{on_alias}{home_option}"
        commands[approve] = "put it into production"
    elif outcome.decision == "skipped":
        commands[f"{program} run --set data.min_new_records=0{home_option}"] = "train all the same"
    elif outcome.decision is None:
        commands[f"{program} adapters promote {reference}{home_option}"] = "put it into production"
    if not store_configured():
        commands[f"{program} store up{home_option}"] = "open the store to other S3 clients; it sleeps between runs"
    width = max(map(len, commands))
    return "\n".join([*lines, *[f"  {command:<{width}}  {why}" for command, why in commands.items()], ""])


def _table(metrics: Mapping[Role, Mapping[str, float | None] | None]) -> list[str]:
    roles = [role for role in ROLES if metrics.get(role)]
    lines = [["", *roles]]
    for metric in metrics_of({key for role in roles for key in metrics[role] or ()}):
        values = [(metrics[role] or {}).get(metric.key) for role in roles]
        if any(value is not None for value in values):
            lines.append([metric.label, *["-" if value is None else metric.text(value) for value in values]])
    width = max(len(line[0]) for line in lines)
    return [f"  {line[0]:<{width}}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines]


def _metrics(store: "Store", run_id: str) -> dict[Role, dict[str, float | None] | None]:
    evaluation = runs.read(store, run_id, Evaluation)
    return {role: dict(model.metrics) if (model := evaluation.model(role)) else None for role in ROLES}


def _where(store: "Store") -> dict[str, str]:
    return {"endpoint": store.endpoint, "bucket": store.bucket, "prefix": store.prefix}
