"""The runs in a store, however they were started: one line for each."""

import fcntl
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from components.config.methods import METHODS
from components.records import runs
from components.records.steps import Decision, Evaluation, StepRecord, TrainResult
from components.records.sweep import TunedRate
from components.shared.errors import IntegrityError, UnknownName, UserError

if TYPE_CHECKING:
    from components.store.store import Store

LOSS = "loss"
ORDER = ("prepare", "tune", "finetune", "evaluate", "gate", "promote")
"""Steps of a run that trains."""


@dataclass(frozen=True, config=ConfigDict(strict=True))
class PastRun:
    """A run by what it left in the store, as far as it got."""

    run_id: str
    began: str
    """Start time in ISO 8601, in UTC."""
    adapter: str
    outcome: str
    """The gate's verdict; `trained` for a run without a gate; otherwise how far it got, or `damaged` and why."""
    version: str | None = None
    metric: str = LOSS
    """Key of the metric by which the gate compares models."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Metrics of the candidate, by key."""
    learning_rate: float | None = None
    steps: int | None = None
    note: str = ""
    hours: float | None = None
    """Worker-hours, as the training recorded them: GPU-hours if it trained on GPUs."""
    price: float | None = None
    """US dollars for `hours`; None without GPUs."""
    report: str | None = None
    """Path of its report on this machine, or else its address in the store; None if it has none."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get(LOSS)


def listed(store: "Store", home: Path, *, adapter: str = "", limit: int) -> list[PastRun]:
    """Return at most `limit` runs, the newest first; only those of `adapter`, if one is named.

    `home` is where runs of this machine keep their files.
    """
    infos = list(store.list("runs/"))
    keys = {info.key for info in infos}
    began = sorted(
        ((info.last_modified, info.key.split("/")[1]) for info in infos if _is_config(info.key)), reverse=True
    )
    found = (_read(store, run_id, moment, home, keys) for moment, run_id in began)
    return list(islice((run for run in found if adapter in ("", run.adapter)), limit))


def one(store: "Store", home: Path, run_id: str) -> PastRun:
    """Return the run with this id; its report is fetched from the store to this machine.

    Raises:
        UnknownName: the folder is not one of a run.
    """
    infos = {info.key: info for info in store.list(runs.run_key(run_id))}
    began_with = infos.get(runs.run_key(run_id, runs.CONFIG))
    if began_with is None:
        raise UnknownName(f"{store.uri(runs.run_key(run_id))} has no {runs.CONFIG}, so it is no run")
    folder = home / "runs" / run_id
    if folder.is_dir() and (page := store.read(runs.run_key(run_id, runs.REPORT))):
        (folder / runs.REPORT).write_bytes(page[0])
    return _read(store, run_id, began_with.last_modified, home, infos.keys())


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


def rate_of(config: Mapping[str, Any], tuned: TunedRate | None) -> float | None:
    """Return the learning rate that a run trained at."""
    if tuned is not None:
        return tuned.learning_rate
    set_to = config.get("train", {}).get("learning_rate")
    method = METHODS.get(config.get("method", {}).get("name", ""))
    return set_to if set_to is not None else method.learning_rate if method else None


def _is_config(key: str) -> bool:
    return key.endswith(f"/{runs.CONFIG}") and key.count("/") == 2


def _read(store: "Store", run_id: str, written: datetime, home: Path, keys: Collection[str]) -> PastRun:
    """Read a run; what cannot be read of it is its outcome: whoever trains may write anything among the runs."""
    adapter, began = "", written.astimezone(UTC).isoformat()
    try:
        config = runs.config_of(store, run_id)
        adapter = str(config.get("adapter", {}).get("name", ""))
        return _sound(store, run_id, began, home, keys, config)
    except ValidationError as exc:
        why = f"{exc.errors()[0]['loc'][0]}: {exc.errors()[0]['msg']}"
    except (IntegrityError, TypeError) as exc:
        why = str(exc)
    return PastRun(run_id=run_id, began=began, adapter=adapter, outcome=f"damaged: {why}")


def _sound(
    store: "Store", run_id: str, written: str, home: Path, keys: Collection[str], config: Mapping[str, Any]
) -> PastRun:
    steps = runs.steps(store, run_id)
    decision, evaluation = (
        runs.find(store, run_id, Decision, to_show=True),
        runs.find(store, run_id, Evaluation, to_show=True),
    )
    trained = runs.find(store, run_id, TrainResult)
    candidate = evaluation.model("candidate") if evaluation else None
    used = trained.usage if trained else None
    page, here = runs.run_key(run_id, runs.REPORT), home / "runs" / run_id
    if (here / runs.REPORT).is_file():
        report: str | None = str(here / runs.REPORT)
    else:
        report = store.uri(page) if page in keys else None
    if decision is not None:
        outcome: str = decision.verdict or decision.decision
    else:
        tunes = config.get("tune", {}).get("when", "never") != "never"
        outcome = _undecided(steps, here, tunes=tunes, evaluated=evaluation is not None)
    return PastRun(
        run_id=run_id,
        began=steps[0].started_at if steps else written,
        adapter=config.get("adapter", {}).get("name", ""),
        outcome=outcome,
        version=trained.version if trained else None,
        metric=config.get("gate", {}).get("metric", LOSS),
        metrics=dict(candidate.metrics) if candidate else {},
        learning_rate=rate_of(config, runs.find(store, run_id, TunedRate)),
        steps=trained.steps if trained else None,
        note=config.get("adapter", {}).get("note", ""),
        hours=used.hours if used else None,
        price=used.price if used else None,
        report=report,
    )


def _undecided(steps: list[StepRecord], folder: Path, *, tunes: bool, evaluated: bool) -> str:
    """What became of a run without a decision; `folder` is the run's on this machine, if it ran here."""
    ended = [step for step in steps if step.step in ORDER]
    place = ORDER.index(ended[-1].step) + 1 if ended else 0
    at = next((step for step in ORDER[place:] if step != "tune" or tunes), ORDER[-1])
    started_by, is_running = lock_of(folder)
    if is_running:
        return f"running: {at}"
    if ended and not ended[-1].succeeded:
        return f"failed in {ended[-1].step}"
    if steps and steps[-1].step == "report":  # a pipeline's last step, which runs after an interruption as well
        return f"interrupted in {at}"
    if evaluated:
        return "trained"
    if started_by == "sweep" and place > ORDER.index("tune"):
        return "swept"
    return f"interrupted in {at}" if folder.is_dir() else f"not past {at}"


def lock_of(folder: Path) -> tuple[str, bool]:
    """What the command that began the run in this folder does: retrain, train or sweep; and whether it is under way."""
    try:
        with (folder / "lock").open() as lock:
            started_by = lock.read()
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return "", False
    except BlockingIOError:
        return started_by, True
    return started_by, False
