"""What `python -m benchmarks.gate` measured of the real model, record by record."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from components.gate.comparisons import Evidence
from components.records.steps import Evaluation, Measured
from components.shared.metrics import METRICS
from components.shared.paired import Array

FOLDER = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Task:
    """Held-out records, and what each model lost on them."""

    tokens: Array
    references: np.ndarray | None
    columns: dict[str, Array]
    """By `<model>_<what is kept of a record>`."""

    def of(
        self, rows: np.ndarray, roles: dict[str, str], changed: dict[str, Array] | None = None
    ) -> tuple[Evaluation, Evidence]:
        """What an evaluation of these models on some of the records says; `changed` replaces columns of roles."""
        columns = {
            f"{role}_{kept}": self.columns[f"{name}_{kept}"][rows]
            for role, name in roles.items()
            for kept in ("nll", "other_prompt_nll", "exact_match")
            if f"{name}_{kept}" in self.columns
        } | (changed or {})
        tokens = self.tokens[rows]
        slices = {} if self.references is None else {"label": self.references[rows]}
        models = {
            role: Measured(
                version=None if role == "base" else f"{role}-{name}", metrics=_metrics(role, columns, tokens)
            )
            for role, name in roles.items()
        }
        models = {"champion": None, **models}
        measured = Evaluation(run_id="r", records=len(rows), held_out=len(self.tokens), models=models)
        return measured, Evidence(tokens, columns, slices=slices)


def read(task: str) -> Task:
    table = pq.read_table(FOLDER / f"{task}.parquet")
    names = table.schema.names
    kept = [name for name in names if name not in ("id", "reference", "answer_tokens")]
    columns = {name: table[name].to_numpy().astype(float) for name in kept}
    references = np.array(table["reference"].to_pylist()) if "reference" in names else None
    return Task(table["answer_tokens"].to_numpy().astype(float), references, columns)


def _metrics(role: str, columns: dict[str, Array], tokens: Array) -> dict[str, float | None]:
    nll, others = columns[f"{role}_nll"], columns.get(f"{role}_other_prompt_nll")
    gain = None if others is None else (others - nll).mean()
    loss = nll.sum() / tokens.sum()
    perplexity = np.exp(min(loss, 700.0))
    found = {"loss": loss, "perplexity": perplexity, "answer_loss": nll.mean(), "answer_prompt_gain": gain}
    if f"{role}_exact_match" in columns:
        found["exact_match"] = columns[f"{role}_exact_match"].mean()
    assert found.keys() <= METRICS.keys()
    return found
