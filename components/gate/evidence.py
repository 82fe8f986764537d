"""The evidence that the gate decides on: each model's values on each held-out record (evaluation_records.parquet)."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.records import runs
from components.records.steps import Evaluation, Role, TextLosses
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import METRICS, Metric, are_labels
from components.shared.paired import Array, Pairs
from components.shared.parquet import table_of

if TYPE_CHECKING:
    from components.store.store import Store

Names = npt.NDArray[np.str_]

TOKENS, GROUP, SOURCE = "answer_tokens", "group", "source"


@dataclass(frozen=True)
class Evidence:
    """Columns of numbers, a row for each held-out record that was used."""

    tokens: Array
    columns: Mapping[str, Array]
    """One value per record, by `<role>_<quantity>`; NaN where it was not measured."""
    groups: npt.NDArray[np.int64] | None = None
    """The index of each record's group, from 0; None where each record stands for itself."""
    slices: Mapping[str, Names] = field(default_factory=dict)
    """For each kind of slice, the name of each record's slice."""
    texts: Mapping[str, "Evidence"] = field(default_factory=dict)
    """By kind, the same for texts that are not records; only the kinds that were read."""

    @property
    def num_independent(self) -> int:
        """The number of groups, or of records where there are no groups."""
        return len(self.tokens) if self.groups is None else int(self.groups.max()) + 1

    def pairs(self, metric: Metric, against: Role, *, relative: bool = False) -> Pairs | None:
        """The candidate's and another model's values on every record, or text; None where either was not measured."""
        of = self.texts.get(metric.probe) if metric.probe else self
        if of is None:
            return None
        ours, theirs = (of.columns.get(f"{role}_{metric.column or metric.key}") for role in ("candidate", against))
        if ours is None or theirs is None:
            return None
        return Pairs(ours, theirs, of._weights(metric), of.groups, metric.lower_is_better, metric.exponential, relative)

    def prompts(self, metric: Metric) -> Pairs | None:
        """The candidate's losses given each record's own prompt and another's; None where they were not measured."""
        ours, others = (self.columns.get(f"candidate_{name}") for name in ("nll", "other_prompt_nll"))
        if ours is None or others is None:
            return None
        return Pairs(ours, others, self._weights(metric), self.groups, lower_is_better=True)

    def _weights(self, metric: Metric) -> Array:
        return self.tokens if metric.per_token else np.ones(len(self.tokens))


def read(store: "Store", evaluation: Evaluation) -> Evidence:
    """The records behind an evaluation.

    Raises:
        ObjectMissing: they are not there.
        IntegrityError: they are not what the evaluation was made of.
    """
    lying = runs.lying(store, evaluation.run_id, runs.EVALUATION_RECORDS)
    if lying is None:
        raise ObjectMissing(
            f"{store.uri(runs.key_of(store, evaluation.run_id, runs.EVALUATION_RECORDS))} does not exist"
        )
    body, uri = lying[0], store.uri(lying[1])
    found = hashlib.sha256(body).hexdigest()
    # An evaluation by release 0.1.0 does not say what it was made of.
    if evaluation.records_sha256 and found != evaluation.records_sha256:
        raise IntegrityError(
            f"{uri} has sha256 {found}, but the evaluation was made of {evaluation.records_sha256}: evaluate "
            f"{evaluation.run_id} again"
        )
    evidence = parse(body, uri)
    if len(evidence.tokens) != evaluation.records:
        raise IntegrityError(
            f"{uri} has {len(evidence.tokens)} records, and the evaluation is of {evaluation.records}: evaluate "
            f"{evaluation.run_id} again"
        )
    return replace(evidence, texts=dict(of_texts(evaluation)))


def of_texts(evaluation: Evaluation) -> Iterator[tuple[str, Evidence]]:
    """Yield each kind of text with its evidence: a row per passage of general text, or per answer of the base's own."""
    for kind in filter(None, (metric.probe for metric in METRICS.values())):
        found = getattr(evaluation, kind, None)
        if isinstance(found, TextLosses):
            columns = {f"{role}_nll": np.array(nll) for role, nll in found.nll.items()}
            yield kind, Evidence(np.array(found.tokens, dtype=float), columns)


def parse(body: bytes, uri: str) -> Evidence:
    """The numbers of evaluation_records.parquet.

    Raises:
        IntegrityError: it is not Parquet, or has no column of answer tokens.
    """
    import pyarrow as pa

    try:
        table = table_of(body)
        tokens = _numbers(table.column(TOKENS))
    except (pa.ArrowException, KeyError) as exc:
        raise IntegrityError(f"{uri} holds no evaluated records: {exc}") from exc
    columns = {
        name: _numbers(table.column(name))
        for name, kind in zip(table.schema.names, table.schema.types, strict=True)
        if pa.types.is_floating(kind)
    }
    groups = None
    if GROUP in table.schema.names:
        _, groups = np.unique(table.column(GROUP).to_pylist(), return_inverse=True)
    return Evidence(tokens, columns, groups, dict(_slices(table)))


def _slices(table: Any) -> Iterator[tuple[str, Names]]:
    texts = {
        name: [str(value) for value in table.column(name).to_pylist()]
        for name in ("prompt", "reference", SOURCE)
        if name in table.schema.names
    }
    if (references := texts.get("reference")) and are_labels(len(set(references)), len(references)):
        yield "label", np.array(references)
    if SOURCE in texts:
        yield "source", np.array(texts[SOURCE])
    if "prompt" in texts and references:
        yield "length", _thirds(np.array([len(a) + len(b) for a, b in zip(texts["prompt"], references, strict=True)]))


def _thirds(lengths: npt.NDArray[np.int64]) -> Names:
    """The name of each record's third by length: the characters of prompt and reference together."""
    short, long = np.quantile(lengths, [1 / 3, 2 / 3], method="nearest")
    return np.select(
        [lengths <= short, lengths <= long],
        [f"up to {short} characters", f"{short + 1} to {long} characters"],
        f"more than {long} characters",
    )


def _numbers(column: Any) -> Array:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
