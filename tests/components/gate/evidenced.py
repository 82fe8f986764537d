"""Records that sum to an evaluation's numbers, all of them alike: no bound is apart from the number itself."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.gate.evidence import Evidence
from components.registry.records import Evaluation
from components.shared.metrics import METRICS

TOKENS = 4.0


def evidence(evaluation: Evaluation, *, nll_from: str = "loss") -> Evidence:
    """`nll_from` is the metric that is compared, where that is loss or perplexity: both are made of one column."""
    columns = {}
    for role, model in evaluation.models.items():
        for key, value in (model.metrics if model else {}).items():
            metric = METRICS[key]
            if metric.may_compare and value is not None and (key == nll_from or not metric.per_token):
                mean = math.log(value) if metric.exponential and value > 0 else value
                total = mean * TOKENS if metric.per_token else mean
                columns[f"{role}_{metric.column or key}"] = np.full(evaluation.records, total)
    return Evidence(np.full(evaluation.records, TOKENS), columns)


def as_parquet(found: Evidence) -> bytes:
    """As an evaluation writes them."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"answer_tokens": found.tokens.astype(int), **found.columns}), sink)
    return sink.getvalue()
