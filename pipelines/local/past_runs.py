"""The runs in a store, however they were started: one line for each."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from components.config.methods import METHODS
from components.records import runs
from components.records.steps import Decision, Evaluation, StepRecord, TrainResult
from components.records.sweep import TunedRate
from components.shared.errors import UnknownName, UserError

if TYPE_CHECKING:
    from components.store.store import Store

LOSS = "loss"


@dataclass(frozen=True)
class PastRun:
    """A run by what it left in the store, as far as it got."""

    run_id: str
    began: str
    """Start time in ISO 8601, in UTC."""
    adapter: str
    outcome: str
    """The gate's verdict; `trained` for a run without a gate; otherwise how far it got."""
    version: str | None
    metric: str
    """Key of the metric by which the gate compares models."""
    metrics: dict[str, float | None]
    """Metrics of the candidate, by key."""
    learning_rate: float | None
    steps: int | None
    note: str
    hours: float | None
    """Worker-hours, as the training recorded them: GPU-hours if it trained on GPUs."""
    price: float | None
    """US dollars for `hours`; None without GPUs."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get(LOSS)

    @property
    def value(self) -> float | None:
        """The candidate's value of the metric by which the gate compares."""
        return self.metrics.get(self.metric)


def listed(store: "Store", *, adapter: str = "", limit: int) -> list[PastRun]:
    """Return at most `limit` runs, the newest first; only those of `adapter`, if one is named."""
    began = sorted(
        ((info.last_modified, info.key.split("/")[1]) for info in store.list("runs/") if _is_config(info.key)),
        reverse=True,
    )
    found = (_read(store, run_id, moment) for moment, run_id in began)
    return list(islice((run for run in found if adapter in ("", run.adapter)), limit))


def find(store: "Store", wanted: str) -> str:
    """Return the id of the run that `wanted` names: NAME@VERSION for the version's run, an id, or the start of one.

    Raises:
        UnknownName: there is no such run.
        UserError: several ids begin so, or the version names no run.
    """
    from components.registry.versions import resolve

    if "@" in wanted:
        version = resolve(store, wanted)
        if not version.run_id:
            raise UserError(f"the lineage of {wanted} names no run: name a version that a run has trained")
        return version.run_id
    found = [run_id for run_id in store.folders("runs/") if run_id.startswith(wanted)]
    if wanted in found or len(found) == 1:
        return wanted if wanted in found else found[0]
    if found:
        raise UserError(f"{len(found)} runs begin with {wanted!r}, such as {found[0]} and {found[1]}: give more of it")
    raise UnknownName(f"there is no run {wanted!r} in {store.uri('runs/')}: `fineloop runs list` shows those there are")


def config_of(store: "Store", run_id: str) -> dict[str, Any]:
    """Return the run's resolved config as it was written; empty if it wrote none."""
    found = store.read(runs.run_key(run_id, runs.CONFIG))
    return tomllib.loads(found[0].decode()) if found else {}


def rate_of(config: dict[str, Any], tuned: TunedRate | None) -> float | None:
    """Return the learning rate that a run trained at."""
    if tuned is not None:
        return tuned.learning_rate
    set_to = config.get("train", {}).get("learning_rate")
    method = METHODS.get(config.get("method", {}).get("name", ""))
    return set_to if set_to is not None else method.learning_rate if method else None


def _is_config(key: str) -> bool:
    return key.endswith(f"/{runs.CONFIG}") and key.count("/") == 2


def _read(store: "Store", run_id: str, written: datetime) -> PastRun:
    config = config_of(store, run_id)
    steps = runs.steps(store, run_id)
    decision, evaluation = runs.find(store, run_id, Decision), runs.find(store, run_id, Evaluation)
    trained = runs.find(store, run_id, TrainResult)
    candidate = evaluation.model("candidate") if evaluation else None
    used = trained.usage if trained else None
    return PastRun(
        run_id=run_id,
        began=steps[0].started_at if steps else written.astimezone(UTC).isoformat(),
        adapter=config.get("adapter", {}).get("name", ""),
        outcome=" ".join(_outcome(decision, evaluation, steps)),
        version=trained.version if trained else None,
        metric=config.get("gate", {}).get("metric", LOSS),
        metrics=dict(candidate.metrics) if candidate else {},
        learning_rate=rate_of(config, runs.find(store, run_id, TunedRate)),
        steps=trained.steps if trained else None,
        note=config.get("adapter", {}).get("note", ""),
        hours=used.hours if used else None,
        price=used.price if used else None,
    )


def _outcome(decision: Decision | None, evaluation: Evaluation | None, steps: list[StepRecord]) -> Iterator[str]:
    failed = [step.step for step in steps if not step.succeeded]
    if decision is not None:
        yield decision.verdict or decision.decision
    elif failed:
        yield f"failed in {failed[-1]}"
    elif evaluation is not None:
        yield "trained"
    else:
        yield f"after {steps[-1].step}" if steps else "begun"
