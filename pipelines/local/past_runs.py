"""The runs in a store, however they were started: one line for each."""

import fcntl
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
from components.gate.comparisons import GROUP, TOKENS, parse_evidence
from components.records import runs
from components.records.steps import Decision, Evaluation, StepRecord, TrainResult
from components.records.sweep import TunedRate
from components.registry.between_runs import require_none_erased
from components.registry.versions import Version, read_lineage
from components.report.run_files import last_turn
from components.shared.errors import ConfigError, DataError, IntegrityError, ObjectMissing, UnknownName, UserError
from components.shared.metrics import metrics_of
from components.shared.paired import Bounds, bounds
from components.shared.parquet import table_of
from components.store import folders

if TYPE_CHECKING:
    import pyarrow as pa

    from components.store.store import Store

LOSS = "loss"
ORDER = ("prepare", "tune", "finetune", "evaluate", "gate", "promote")
"""Steps of a run that trains."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
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
    configs = (each for each in infos if each.key.count("/") == 2 and each.key.endswith(f"/{runs.CONFIG}"))
    began = sorted(((each.last_modified, each.key.split("/")[1]) for each in configs), reverse=True)
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


# Comparison of runs, from what they left in the store: configs, metrics, and the records that turned right or wrong.
#
# Gains and their bounds are computed by the gate's code, from the stored losses of one run's candidate and the other's.

OURS, THEIRS = "candidate_", "champion_"
UNCOMPARED = ("adapter.note",)
"""Config keys that make no difference to a training."""
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared."""

    name: str
    """The name by which the run was asked for."""
    run_id: str
    version: str | None
    note: str
    config: Mapping[str, Any]
    """The run's config, by dotted keys."""
    confidence: float
    """Confidence of each of the gate's bounds."""
    evaluation: Evaluation
    records: "pa.Table"
    curve: Sequence[Mapping[str, Any]]
    """Records of metrics.jsonl."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Metrics of the run's candidate, by key."""
        candidate = self.evaluation.model("candidate")
        return candidate.metrics if candidate else {}


@dataclass(frozen=True)
class Turned:
    """A record that only one of two candidates answered right."""

    id: str
    prompt: str
    reference: str
    before: str
    after: str
    is_right: bool


@dataclass(frozen=True)
class Compared:
    """A run compared with the first one, on the records that both were measured on."""

    name: str
    records: int
    confidence: float
    gains: Mapping[str, Bounds]
    """Gain with its bounds, by metric; positive is better than the first run."""
    turned: Sequence[Turned]


def read_side(store: "Store", wanted: str) -> Side:
    """Read what the run that `wanted` names left.

    Raises:
        UserError: there is no such run, or it compared nothing.
        IntegrityError: one of its records is malformed.
    """
    from components.report.report import parse_metrics

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
        evaluation=evaluation,
        records=table_of(body),
        curve=parse_metrics(curve[0].decode() if curve else "", origin=f"{runs.METRICS} of {run_id}"),
    )


def differing(sides: Sequence[Side]) -> dict[str, list[Any]]:
    """Return the config keys in which the runs differ, with each run's value; None if a run has none."""
    keys = sorted({key for side in sides for key in side.config} - {*UNCOMPARED})
    values = {key: [side.config.get(key) for side in sides] for key in keys}
    return {key: found for key, found in values.items() if any(each != found[0] for each in found)}


def compare(first: Side, other: Side) -> Compared:
    """Compare the second run's candidate with the first one's.

    Raises:
        DataError: they were measured on no common record.
    """
    theirs, ours = _rows(first.records), _rows(other.records)
    common = [key for key in ours if key in theirs]
    if not common:
        raise DataError(
            f"{first.name} and {other.name} were measured on no common record: compare runs on the same data, or "
            "evaluate one of the versions on the other's dataset"
        )
    before = first.records.take([theirs[key] for key in common])
    after = other.records.take([ours[key] for key in common])
    found = parse_evidence(_as_the_gate_reads(before, after), f"{other.name} beside {first.name}")
    same_tokens = before.column(TOKENS).equals(after.column(TOKENS))
    gains = {}
    for metric in metrics_of({*first.metrics} & {*other.metrics}):
        pairs = found.pairs(metric, "champion")
        if pairs is None or metric.probe or (metric.per_token and not same_tokens):
            continue
        if (between := bounds(pairs, other.confidence)) is not None:
            gains[metric.key] = between
    return Compared(other.name, len(common), other.confidence, gains, list(_turned(common, before, after)))


def _as_the_gate_reads(before: "pa.Table", after: "pa.Table") -> bytes:
    """Return evaluation_records.parquet with the second run's candidate, and the first one's as the champion."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: after.column(name) for name in (TOKENS, GROUP) if name in after.column_names}
    columns |= {name: after.column(name) for name in after.column_names if name.startswith(OURS)}
    columns |= {
        THEIRS + name.removeprefix(OURS): before.column(name) for name in before.column_names if name.startswith(OURS)
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def _rows(records: "pa.Table") -> dict[Key, int]:
    """Return the row of each record, by its id, prompt and reference."""
    texts = [
        records.column(name).to_pylist() if name in records.column_names else [""] * len(records)
        for name in ("id", "prompt", "reference")
    ]
    return {(str(a), str(b), str(c)): place for place, (a, b, c) in enumerate(zip(*texts, strict=True))}


def _turned(common: Sequence[Key], before: "pa.Table", after: "pa.Table") -> Iterator[Turned]:
    right, answer = f"{OURS}exact_match", f"{OURS}answer"
    if not all(right in table.column_names for table in (before, after)):
        return
    marks = [table.column(right).to_pylist() for table in (before, after)]
    answers = [
        table.column(answer).to_pylist() if answer in table.column_names else [""] * len(table)
        for table in (before, after)
    ]
    for place, (name, prompt, reference) in enumerate(common):
        if (was := marks[0][place]) != (now := marks[1][place]):
            said, says = (str(column[place]) for column in answers)
            yield Turned(name, last_turn(prompt), reference, said, says, now > was)


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# A version trained again from its lineage: the config for that, and the comparison with the first one.

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
    found: str
    differs: Mapping[str, Sequence[Any]]
    """Differences between what the two ran on: key to values then and now."""
    compared: Compared | None
    """The comparison of the new version with the first; None if they are the same bytes."""

    @property
    def is_same(self) -> bool:
        """Whether weights and adapter config are equal byte by byte: a version is named after them."""
        return self.version == self.found

    @property
    def agrees(self) -> bool:
        """Whether every metric's gain has zero between its bounds."""
        return self.compared is None or all(each.lower <= 0 <= each.upper for each in self.compared.gains.values())


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
        stored, dataset_uri, identity = lineage["config"], lineage["dataset"]["uri"], lineage["base"]["identity"]
    except (KeyError, TypeError) as exc:
        raise IntegrityError(f"{origin} does not say what the version was made from: {exc}") from exc
    if folders.find_manifest(store, store.key(dataset_uri).rstrip("/")) is None:
        raise ObjectMissing(f"{dataset_uri}, which {version.name} {version.version} was trained on, is gone")
    try:
        require_none_erased(store, dataset_uri)
    except DataError as exc:
        raise DataError(f"{version.name} {version.version} cannot be reproduced: {exc}") from exc
    own = config_file.validate(stored, overrides, origin=origin)
    permitted = config_file.with_stored(config, stored, origin=origin, commit=str(identity.get("commit", "")))
    if own.model.trust_remote_code and not permitted.model.trust_remote_code:
        raise ConfigError(f"{origin}: model.trust_remote_code is not this config's to allow")
    if unknown := [name for name in own.metrics if ":" in name and name not in config.metrics]:
        raise ConfigError(f"{origin}: it was measured by {unknown[0]}: allow that with evaluate.metrics of this config")
    revision = {"revision": identity["commit"]} if identity.get("commit") else {}
    changed = {
        "registry": config.registry,
        "adapter": own.adapter.model_copy(update={"note": note}),
        "model": own.model.model_copy(update=revision),
        "train": own.train.model_copy(update=_start(lineage)),
        "tune": own.tune.model_copy(update={"when": "never"}),  # the rate that was found is the recorded one
    }
    return Recipe(own.model_copy(update=changed), dataset_uri, lineage)


def reproduced(store: "Store", first: Version, found: str, made_from: Recipe) -> Reproduced:
    """Return the version trained again, with its comparison with the first one.

    Raises:
        IntegrityError: what the runs left is malformed.
    """
    again = f"{first.name}@{found}"
    if found == first.version:
        return Reproduced(first.version, found, {}, None)
    from components.registry.versions import resolve

    other = read_lineage(store, resolve(store, again))
    then, now = (_computing(each) for each in (made_from.lineage, other))
    differs = {key: [then.get(key), now.get(key)] for key in then if then.get(key) != now.get(key)}
    beside = compare(read_side(store, f"{first.name}@{first.version}"), read_side(store, again))
    return Reproduced(first.version, found, differs, beside)


def _start(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `train` keys for where the training began: at a version, which the lineage names by its address, or
    at the base, of which no share can stay in what it publishes."""
    for uri in lineage.get("parents", []):
        if "/versions/" in uri:
            name, _, version = uri.rstrip("/").rpartition("/adapters/")[2].partition("/versions/")
            return {"start_from": f"{name}@{version}"}
    return {"start_from": "base", "start_share": 0.0}


def _computing(lineage: Mapping[str, Any]) -> dict[str, Any]:
    environment = lineage.get("environment", {})
    found: dict[str, Any] = {key: _at(environment, key.split(".")) for key in COMPUTING} | {
        f"hardware.{key}": value for key, value in lineage.get("hardware", {}).items()
    }
    return {**found, "base": lineage.get("base", {}).get("identity")}


def _at(table: Any, path: Sequence[str]) -> Any:
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    return table
