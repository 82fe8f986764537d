"""The runs in a store, however they were started: one line for each."""

import fcntl
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from components.config import config_file
from components.config.gate import GateConfig
from components.config.methods import METHODS
from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Decision, Evaluation, StepRecord, TrainResult
from components.records.sweep import TunedRate
from components.registry.between_runs import require_none_erased
from components.registry.versions import Version, read_lineage, resolve
from components.shared.errors import ConfigError, DataError, IntegrityError, ObjectMissing, UnknownName, UserError
from components.shared.metrics import metrics_of
from components.shared.parquet import table_of
from components.store import folders

if TYPE_CHECKING:
    import pyarrow as pa

    from components.report.report import Beside
    from components.store.store import Store

LOSS = "loss"
ORDER = ("prepare", "tune", "finetune", "evaluate", "gate", "promote")  # steps of a run that trains


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class PastRun:
    """A run by what it left in the store, as far as it got."""

    run_id: str
    began: str  # start time in ISO 8601, in UTC
    adapter: str
    outcome: str
    """The gate's verdict; `trained` for a run without a gate; otherwise how far it got, or `damaged` and why."""
    version: str | None = None
    metric: str = LOSS  # key of the metric by which the gate compares models
    metrics: dict[str, float | None] = Field(default_factory=dict)  # metrics of the candidate, by key
    learning_rate: float | None = None
    steps: int | None = None
    note: str = ""
    hours: float | None = None  # worker-hours, as the training recorded them: GPU-hours if it trained on GPUs
    price: float | None = None  # US dollars for `hours`; None without GPUs
    report: str | None = None
    """Path of its report on this machine, or else its address in the store; None if it has none."""

    @property
    def loss(self) -> float | None:
        return self.metrics.get(LOSS)


def listed(store: "Store", home: Path, *, adapter: str = "", limit: int) -> list[PastRun]:
    """Return at most `limit` runs, the newest first; only those of `adapter`, if one is named."""
    infos = list(store.list("runs/"))
    keys = {info.key for info in infos}
    configs = (info for info in infos if info.key.count("/") == 2 and info.key.endswith(f"/{runs.CONFIG}"))
    began = sorted(((info.last_modified, info.key.split("/")[1]) for info in configs), reverse=True)
    past = (_read(store, run_id, moment, home, keys) for moment, run_id in began)
    return list(islice((run for run in past if adapter in ("", run.adapter)), limit))


def one(store: "Store", home: Path, run_id: str) -> PastRun:
    """Return the run with this id, and fetch its report from the store. Raises UnknownName: there is none."""
    infos = {info.key: info for info in store.list(runs.run_key(run_id))}
    began_with = infos.get(runs.run_key(run_id, runs.CONFIG))
    if began_with is None:
        raise UnknownName(f"{store.uri(runs.run_key(run_id))} has no {runs.CONFIG}, so it is no run")
    folder = home / "runs" / run_id
    if folder.is_dir() and (page := store.read(runs.run_key(run_id, runs.REPORT))):
        (folder / runs.REPORT).write_bytes(page[0])
    return _read(store, run_id, began_with.last_modified, home, infos.keys())


def find(store: "Store", wanted: str) -> str:
    """Return the id of the run that `wanted` names: NAME@VERSION for the version's run, an id, or the start of one."""
    if "@" in wanted:
        version = resolve(store, wanted)
        if not version.run_id:
            raise UserError(f"the lineage of {wanted} names no run: name a version that a run has trained")
        return version.run_id
    ids = [run_id for run_id in store.folders("runs/") if run_id.startswith(wanted)]
    if wanted in ids or len(ids) == 1:
        return wanted if wanted in ids else ids[0]
    if ids:
        raise UserError(f"{len(ids)} runs begin with {wanted!r}, such as {ids[0]} and {ids[1]}: give more of it")
    raise UnknownName(f"there is no run {wanted!r} in {store.uri('runs/')}: `fineloop runs list` shows those there are")


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
    decision = runs.find(store, run_id, Decision, to_show=True)
    evaluation = runs.find(store, run_id, Evaluation, to_show=True)
    trained = runs.find(store, run_id, TrainResult)
    candidate = evaluation.model("candidate") if evaluation else None
    used = trained.usage if trained else None
    tuned = runs.find(store, run_id, TunedRate)
    method = METHODS.get(config.get("method", {}).get("name", ""))
    rate = config.get("train", {}).get("learning_rate") or (method.learning_rate if method else None)
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
        learning_rate=tuned.learning_rate if tuned else rate,
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


# Comparison of runs, from what they left in the store, with gains and bounds by the gate's code.

OURS, THEIRS = "candidate_", "champion_"
UNCOMPARED = ("adapter.note",)  # config keys that make no difference to a training
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared."""

    name: str  # the name by which the run was asked for
    run_id: str
    version: str | None
    note: str
    config: Mapping[str, Any]  # the run's config, by dotted keys
    confidence: float  # of each of the gate's bounds
    metrics: Mapping[str, float | None]  # of the run's candidate, by key
    records: "pa.Table"
    curve: Sequence[Mapping[str, Any]]  # records of metrics.jsonl


@dataclass(frozen=True)
class Turned:
    """A record that only one of two candidates answered right."""

    id: str
    prompt: str
    reference: str
    before: str
    after: str
    is_right: bool


def read_side(store: "Store", wanted: str) -> Side:
    """Read what the run that `wanted` names left. Raises UserError: there is no such run, or it compared nothing;
    IntegrityError: one of its records is malformed."""
    run_id = find(store, wanted)
    evaluation = runs.find(store, run_id, Evaluation, to_show=True)
    if evaluation is None:
        raise UserError(f"run {run_id} evaluated nothing, so that there is nothing to compare: name one that did")
    config = runs.config_of(store, run_id)
    curve = store.read(runs.run_key(run_id, runs.METRICS))
    body, _ = runs.lying(store, run_id, runs.EVALUATION_RECORDS) or (b"", "")
    candidate = evaluation.model("candidate")
    return Side(
        name=wanted,
        run_id=run_id,
        version=candidate.version if candidate else None,
        note=config.get("adapter", {}).get("note", ""),
        config=dict(_flat(config)),
        confidence=config.get("gate", {}).get("confidence", GateConfig().confidence),
        metrics=candidate.metrics if candidate else {},
        records=table_of(body),
        curve=runs.parse_metrics(curve[0].decode() if curve else "", origin=f"{runs.METRICS} of {run_id}"),
    )


def differing(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Return the config keys in which the runs differ, with each run's value; None if a run has none."""
    keys = sorted({key for side in sides for key in side.config} - {*UNCOMPARED})
    table = {key: [side.config.get(key) for side in sides] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def compare(first: Side, other: Side) -> "Beside":
    """Compare the second run's candidate with the first's on the records that both were measured on; a positive gain is
    better than the first. Raises DataError: there is no such record."""
    from components.gate.comparisons import TOKENS, parse_evidence
    from components.report.report import Beside
    from components.shared.paired import bounds

    of_first, of_other = _rows(first.records), _rows(other.records)
    common = [key for key in of_other if key in of_first]
    if not common:
        raise DataError(
            f"{first.name} and {other.name} were measured on no common record: compare runs on the same data, or "
            "evaluate one of the versions on the other's dataset"
        )
    before = first.records.take([of_first[key] for key in common])
    after = other.records.take([of_other[key] for key in common])
    evidence = parse_evidence(_as_the_gate_reads(before, after), f"{other.name} beside {first.name}")
    same_tokens = before.column(TOKENS).equals(after.column(TOKENS))
    gains = {}
    for metric in metrics_of({*first.metrics} & {*other.metrics}):
        pairs = evidence.pairs(metric, "champion")
        if pairs is None or metric.probe or (metric.per_token and not same_tokens):
            continue
        if (between := bounds(pairs, other.confidence)) is not None:
            gains[metric.key] = between
    return Beside(other.name, len(common), other.confidence, gains, list(_turned(common, before, after)))


def _as_the_gate_reads(before: "pa.Table", after: "pa.Table") -> bytes:
    """Return evaluation_records.parquet with the second run's candidate, and the first one's as champion."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.gate.comparisons import GROUP, TOKENS

    columns = {name: after.column(name) for name in (TOKENS, GROUP) if name in after.column_names}
    columns |= {name: after.column(name) for name in after.column_names if name.startswith(OURS)}
    columns |= {
        THEIRS + name.removeprefix(OURS): before.column(name) for name in before.column_names if name.startswith(OURS)
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _rows(records: "pa.Table") -> dict[Key, int]:
    """Return the row of each record, by its id, prompt and reference."""
    texts = [_texts(records, name) for name in ("id", "prompt", "reference")]
    return {(a, b, c): place for place, (a, b, c) in enumerate(zip(*texts, strict=True))}


def _texts(records: "pa.Table", name: str) -> list[str]:
    column = records.column(name).to_pylist() if name in records.column_names else [""] * len(records)
    return [str(text) for text in column]


def _turned(common: Sequence[Key], before: "pa.Table", after: "pa.Table") -> Iterator[Turned]:
    from components.report.run_files import last_turn

    right = f"{OURS}exact_match"
    if not all(right in table.column_names for table in (before, after)):
        return
    was, now = (table.column(right).to_pylist() for table in (before, after))
    answered, answers = (_texts(table, f"{OURS}answer") for table in (before, after))
    for place, (name, prompt, reference) in enumerate(common):
        if was[place] != now[place]:
            is_right = now[place] > was[place]
            yield Turned(name, last_turn(prompt), reference, answered[place], answers[place], is_right)


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# A version trained again from its lineage.

PACKAGES = ("bitsandbytes", "deepspeed", "fineloop", "peft", "torch", "transformers")
COMPUTING = ("code.commit", "image", "python", *(f"packages.{name}" for name in PACKAGES))
"""Keys of the lineage's environment on which numbers depend."""


@dataclass(frozen=True)
class Recipe:
    """What a version was trained from."""

    config: RunConfig
    dataset_uri: str
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Reproduced:
    """A version and the one that was trained again."""

    version: str
    again: str
    differs: Mapping[str, Sequence[Any]]  # of what the two ran on: key to values then and now
    compared: "Beside | None"  # the new version beside the first; None if they are the same bytes

    @property
    def is_same(self) -> bool:
        """Whether weights and adapter config are equal byte by byte: a version is named after them."""
        return self.version == self.again

    @property
    def agrees(self) -> bool:
        """Whether every metric's gain has zero between its bounds."""
        return self.compared is None or all(gain.lower <= 0 <= gain.upper for gain in self.compared.gains.values())


def recipe_of(store: "Store", version: Version, config: RunConfig, overrides: Sequence[str], *, note: str) -> Recipe:
    """Return what trains the version again: its run's config, in the registry of `config`, with `overrides`.

    Raises:
        DataError: a record that it was trained on was erased.
        ConfigError: its base comes with code, or it was measured by a function, and `config` does not allow that.
        IntegrityError: the lineage is not the one that was published, or names no dataset.
        ObjectMissing: the dataset is gone.
    """
    lineage: Any = read_lineage(store, version)
    origin = f"lineage of {version.uri}"
    try:
        _, dataset_uri, identity = lineage["config"], lineage["dataset"]["uri"], lineage["base"]["identity"]
    except (KeyError, TypeError) as exc:
        raise IntegrityError(f"{origin} does not say what the version was made from: {exc}") from exc
    if folders.find_manifest(store, store.key(dataset_uri).rstrip("/")) is None:
        raise ObjectMissing(f"{dataset_uri}, which {version.name} {version.version} was trained on, is gone")
    try:
        require_none_erased(store, dataset_uri)
    except DataError as exc:
        raise DataError(f"{version.name} {version.version} cannot be reproduced: {exc}") from exc
    own = own_config(lineage, config, overrides, origin=origin)
    revision = {"revision": identity["commit"]} if identity.get("commit") else {}
    changed = {
        "adapter": own.adapter.model_copy(update={"note": note}),
        "model": own.model.model_copy(update=revision),
        "train": own.train.model_copy(update=_start(lineage)),
        "tune": own.tune.model_copy(update={"when": "never"}),  # the rate that was found is the recorded one
    }
    return Recipe(own.model_copy(update=changed), dataset_uri, lineage)


def own_config(lineage: Mapping[str, Any], config: RunConfig, overrides: Sequence[str], *, origin: str) -> RunConfig:
    """The config that the lineage holds, with `overrides`, in the registry of `config`. Raises ConfigError: its base
    comes with code, or it was measured by a function, and `config` does not allow that."""
    stored, identity = lineage.get("config", {}), lineage.get("base", {}).get("identity", {})
    own = config_file.validate(stored, overrides, origin=origin)
    permitted = config_file.with_stored(config, stored, origin=origin, commit=str(identity.get("commit", "")))
    if own.model.trust_remote_code and not permitted.model.trust_remote_code:
        raise ConfigError(f"{origin}: model.trust_remote_code is not this config's to allow")
    if unknown := [name for name in own.metrics if ":" in name and name not in config.metrics]:
        raise ConfigError(f"{origin}: it was measured by {unknown[0]}: allow that with evaluate.metrics of this config")
    return own.model_copy(update={"registry": config.registry})


def reproduced(store: "Store", first: Version, version: str, made_from: Recipe) -> Reproduced:
    """Compare the version trained again with the first one. Raises IntegrityError: what the runs left is malformed."""
    if version == first.version:
        return Reproduced(first.version, version, {}, None)
    again = f"{first.name}@{version}"
    other = read_lineage(store, resolve(store, again))
    then, now = (_computing(lineage) for lineage in (made_from.lineage, other))
    differs = {key: [then.get(key), now.get(key)] for key in then if then.get(key) != now.get(key)}
    beside = compare(read_side(store, f"{first.name}@{first.version}"), read_side(store, again))
    return Reproduced(first.version, version, differs, beside)


def _start(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `train` keys for where the training began: at a version, which the lineage names by its address, or
    at the base, of which no share can stay in what it publishes."""
    for uri in lineage.get("parents", []):
        if "/versions/" in uri:
            name, _, version = uri.rstrip("/").rpartition("/adapters/")[2].partition("/versions/")
            return {"start_from": f"{name}@{version}"}
    return {"start_from": "base", "start_share": 0.0}


def _computing(lineage: Mapping[str, Any]) -> dict[str, Any]:
    environment = dict(_flat(lineage.get("environment", {})))
    hardware = {f"hardware.{key}": value for key, value in lineage.get("hardware", {}).items()}
    computing = {key: environment.get(key) for key in COMPUTING}
    return {**computing, **hardware, "base": lineage.get("base", {}).get("identity")}
