"""The folder of a run: its layout and its records. No other module spells its paths.

runs/<run_id>/config.toml                  the resolved config, overrides applied
              steps/<step>.json            how each step went
              consumed/header.json         which data the run read; names the file of record hashes beside it
              prepared.json                what a Ray job made of the data, where one did
              replayed.json                where production's answers to earlier records are, if it gave any
              start.json                   the version that its training goes on from
              checkpoints/step-<n>/        resumable states of the training
              trials/<name>.json           each training of a sweep that has ended
              sweep.json                   what the sweep found
              rate.json                    the learning rate that was tuned for the run
              metrics.jsonl                a record for each step and each measurement
              restarts.json                how often its training began again, and the steps taken twice
              finetune.json                what the training published
              evaluation.json              the models compared, and evaluation_records.parquet record by record
              decision.json                promote, hold or skipped, with reasons
              report.html

Where the registry trusts keys, evaluation.json, evaluation_records.parquet and decision.json lie where a training may
not write, in evaluations/<run_id>/, beside evaluation.dsse.json, the signature of the step that evaluated.
"""

import hashlib
import json
import tomllib
from typing import Any, ClassVar, TypeVar

from components.records.steps import Decision, Evaluation, Record, StepRecord
from components.records.sweep import SweepResult, Trial
from components.shared.errors import IntegrityError, JobError, ObjectMissing
from components.store.store import JSON, Store

CONFIG = "config.toml"
CONSUMED = "consumed/"
START = "start.json"
METRICS = "metrics.jsonl"
RESTARTS = "restarts.json"
EVALUATION = Evaluation.FILE
EVALUATION_RECORDS = "evaluation_records.parquet"
DECISION = Decision.FILE
REPORT = "report.html"
PAGES = "pages/"
"""Folder of the registry's pages: index.html and one page per adapter, which link to the reports."""
SWEEP = SweepResult.FILE
TRIALS = "trials/"
STEPS = "steps/"
CHECKPOINTS = "checkpoints/"
EVALUATIONS = "evaluations/"
EVALUATION_SIGNATURE = "evaluation.dsse.json"
RAY_EVALUATE = "ray-evaluate"
APART = (EVALUATION, EVALUATION_RECORDS, DECISION, EVALUATION_SIGNATURE, RAY_EVALUATE)

R = TypeVar("R", bound=Record)


def run_key(run_id: str, file: str = "") -> str:
    """Return the key of a file of the run; without `file`, of its folder with a trailing slash."""
    return f"runs/{run_id}/{file}"


def key_of(store: Store, run_id: str, file: str) -> str:
    """Return the key of a file of the run: apart if the registry trusts keys and a decision rests on the file."""
    return f"{EVALUATIONS}{run_id}/{file}" if store.trusted_keys and file in APART else run_key(run_id, file)


def config_of(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """Read the run's resolved config as its release wrote it, by sections; empty if it wrote none. Raises
    IntegrityError if it is no such config. Whoever trains may write anything there."""
    key = run_key(run_id, CONFIG)
    stored = store.read(key)
    try:
        config = tomllib.loads(stored[0].decode()) if stored else {}
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{store.uri(key)} is no config: {exc}") from exc
    if odd := [name for name, section in config.items() if not isinstance(section, dict)]:
        raise IntegrityError(f"{store.uri(key)} is no config: {odd[0]} is no section")
    return config


def read(store: Store, run_id: str, kind: type[R], *, sha256: str | None = None, to_show: bool = False) -> R:
    """Read the run's record of this kind; one that is only `to_show`, not to decide on, also from before the registry
    trusted keys. Raises ObjectMissing if the run has no such record; IntegrityError if the record is malformed, or its
    SHA-256 is not `sha256`."""
    if (stored := lying(store, run_id, kind.FILE, to_show=to_show)) is None:
        raise ObjectMissing(f"{store.uri(key_of(store, run_id, kind.FILE))} does not exist")
    body, key = stored
    if sha256 is not None and (written := hashlib.sha256(body).hexdigest()) != sha256:
        raise IntegrityError(
            f"{store.uri(key)} has sha256 {written}, but {sha256} was written: it was changed since, so run the step "
            "that writes it again"
        )
    return kind.from_json(body, store.uri(key))


def find(store: Store, run_id: str, kind: type[R], *, to_show: bool = False) -> R | None:
    """Read the run's record of this kind; None if the run did not get that far. `to_show` is as in `read`. Raises
    IntegrityError if the record is malformed."""
    stored = lying(store, run_id, kind.FILE, to_show=to_show)
    return kind.from_json(stored[0], store.uri(stored[1])) if stored else None


def left_by(job_id: str, store: Store, run_id: str, kind: type[R]) -> R:
    """Read the record that a Ray job was to leave. Raises JobError if there is none; IntegrityError as `find`."""
    record = find(store, run_id, kind)
    if record is None:
        uri = store.uri(key_of(store, run_id, kind.FILE))
        raise JobError(f"Ray job {job_id} succeeded without its result: {uri} does not exist")
    return record


def lying(store: Store, run_id: str, file: str, *, to_show: bool = True) -> tuple[bytes, str] | None:
    """Return the content and the key of a run's file; `to_show` also of one from before the registry trusted keys."""
    for key in dict.fromkeys((key_of(store, run_id, file), *([run_key(run_id, file)] if to_show else []))):
        if stored := store.read(key):
            return stored[0], key
    return None


def has_decided(store: Store, run_id: str) -> bool:
    """Whether the run's gate left a decision; a damaged one counts, `skipped` does not."""
    try:
        decision = find(store, run_id, Decision, to_show=True) if run_id else None
    except IntegrityError:
        return True
    return decision is not None and decision.decision != "skipped"


def decision_of(store: Store, run_id: str, *, to_show: bool = False) -> Decision | None:
    """Return the decision of the run's gate; None if it decided nothing, or the decision is damaged."""
    try:
        decision = find(store, run_id, Decision, to_show=to_show) if run_id else None
    except IntegrityError:
        return None
    return None if decision is None or decision.decision == "skipped" else decision


def write(store: Store, run_id: str, record: Record) -> None:
    """Write the run's record of this kind, replacing an earlier one."""
    match record:
        case StepRecord():
            key = run_key(run_id, f"{STEPS}{record.step}.json")
        case Trial():
            key = run_key(run_id, f"{TRIALS}{record.name}.json")
        case Decision(decision="skipped"):  # nothing rests on it, and the job that prepares the data may write it
            key = run_key(run_id, record.FILE)
        case _:
            key = key_of(store, run_id, record.FILE)
    store.put(key, record.as_json(), content_type=JSON)


def steps(store: Store, run_id: str) -> list[StepRecord]:
    """Read the records of the run's steps, in the order in which the steps began. Raises IntegrityError if a record is
    malformed."""
    return sorted(_all(store, run_key(run_id, STEPS), StepRecord), key=lambda record: record.started_at)


def trials(store: Store, run_id: str) -> list[Trial]:
    """Read the trials of a sweep that have ended, in any order; raises as `steps`."""
    return _all(store, run_key(run_id, TRIALS), Trial)


def _all(store: Store, folder: str, kind: type[R]) -> list[R]:
    keys = [info.key for info in store.list(folder) if info.key.endswith(".json")]
    return [kind.from_json(store.get(key), store.uri(key)) for key in keys]


def parse_metrics(text: str, *, origin: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. An incomplete last line, left by a job that was killed, is skipped. Raises
    IntegrityError: another line is not JSON."""
    lines, records = text.split("\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as exc:
            if number < len(lines):
                raise IntegrityError(f"{origin} line {number} is not JSON: {exc}") from exc
    return records


class Replayed(Record):
    """Where a training finds the dataset that holds production's answers beside the prepared records."""

    FILE: ClassVar[str] = "replayed.json"

    prepared_uri: str
    """URI of the dataset with the records to be answered."""
    dataset_uri: str
    """URI of the dataset that is trained on."""
    version: str | None
    """The version that was asked; None if nothing was in production."""
    asked: int
    kept: int
    """Number of them that are trained on with the version's answers, as these were right; the others have their own."""
