"""Evaluations, the records behind them, and what the gate decides on both."""

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config.gate import GateConfig
from components.config.schema import AdapterConfig
from components.gate import policy as policy_of_the_gate
from components.gate.comparisons import Evidence, of_texts
from components.records.steps import Decision, Evaluation, Measured, RuleResult
from components.shared.metrics import metric_of

TOKENS = 4.0
GOOD = {"loss": 1.0, "perplexity": 2.72, "exact_match": 0.70, "token_f1": 0.75, "answer_prompt_gain": 4.8}


def evidence(evaluation: Evaluation, *, nll_from: str = "loss") -> Evidence:
    """Records that sum to the evaluation's numbers, all of them alike: no bound is apart from the number itself.

    `nll_from` is the metric that is compared, where that is loss or perplexity: both are made of one column.
    """
    columns = {}
    for role, model in evaluation.models.items():
        for key, value in (model.metrics if model else {}).items():
            metric = metric_of(key)
            compares = metric.may_compare and not metric.probe and (key == nll_from or not metric.per_token)
            if compares and value is not None:
                mean = math.log(value) if metric.exponential and value > 0 else value
                total = mean * TOKENS if metric.per_token else mean
                columns[f"{role}_{metric.column or key}"] = np.full(evaluation.records, total)
    return Evidence(np.full(evaluation.records, TOKENS), columns, texts=dict(of_texts(evaluation)))


def as_parquet(found: Evidence) -> bytes:
    """As an evaluation writes them."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"answer_tokens": found.tokens.astype(int), **found.columns}), sink)
    return sink.getvalue()


def model(version: str | None = None, **metrics: float | None) -> Measured:
    return Measured(version=version, metrics={**GOOD, **metrics})


def evaluation(candidate: Measured | None, base: Measured | None, champion: Measured | None = None) -> Evaluation:
    models = {"base": base, "champion": champion, "candidate": candidate}
    return Evaluation(run_id="r", records=300, models=models)


def decide(measured: Evaluation, policy: GateConfig, records: Evidence | None = None, **looked: Any) -> Decision:
    nll_from = "perplexity" if policy.metric == "perplexity" else "loss"
    found = records or evidence(measured, nll_from=nll_from)
    return policy_of_the_gate.decide(measured, found, policy, AdapterConfig(name="icd10"), **looked)


def rule(decision: Decision, name: str) -> RuleResult:
    return next(each for each in decision.rules if each.name == name)
