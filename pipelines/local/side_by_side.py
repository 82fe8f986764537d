"""Comparison of runs, from what they left in the store: configs, metrics, and the records that turned right or wrong.

Gains and their bounds are computed by the gate's code, from the stored losses of one run's candidate and the other's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.config.gate import GateConfig
from components.gate import evidence
from components.records import runs
from components.records.steps import Evaluation
from components.report.errors import last_turn
from components.shared.errors import DataError, UserError
from components.shared.metrics import metrics_of
from components.shared.paired import Bounds, bounds
from components.shared.parquet import table_of
from pipelines.local import past_runs

if TYPE_CHECKING:
    import pyarrow as pa

    from components.store.store import Store

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


def read(store: "Store", wanted: str) -> Side:
    """Read what the run that `wanted` names left.

    Raises:
        UserError: there is no such run, or it compared nothing.
        IntegrityError: one of its records is malformed.
    """
    from components.report.report import parse_metrics

    run_id = past_runs.find(store, wanted)
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
    found = evidence.parse(_as_the_gate_reads(before, after), f"{other.name} beside {first.name}")
    same_tokens = before.column(evidence.TOKENS).equals(after.column(evidence.TOKENS))
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

    columns = {name: after.column(name) for name in (evidence.TOKENS, evidence.GROUP) if name in after.column_names}
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
