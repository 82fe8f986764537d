"""A run that was evaluated, as the gate's step finds it in the store."""

import hashlib
import json
import math
from typing import Any

from components.config.gate import GateConfig
from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Evaluation
from components.store.store import Store
from tests.components.gate.evidenced import as_parquet, evidence

RUN = "run-1"


def config(**gate: Any) -> RunConfig:
    about = {"adapter": {"name": "icd10"}, "model": {"base": "org/model"}, "data": {"source": "rows.jsonl"}}
    return RunConfig.model_validate({**about, "gate": GateConfig(**gate).model_dump()})


def evaluation(candidate_loss: float, **changes: Any) -> dict[str, Any]:
    def model(version: str | None, loss: float, prompt_gain: float | None) -> dict[str, Any]:
        metrics = {"loss": loss, "perplexity": math.exp(loss), "exact_match": 0.7, "token_f1": 0.7}
        return {"version": version, "metrics": {**metrics, "answer_prompt_gain": prompt_gain}}

    models = {"base": model(None, 2.0, None), "champion": model("v1", 1.0, 1.1)}
    models["candidate"] = model("v2", candidate_loss, 1.2)
    about = {"run_id": RUN, "records": 300, "models": models, "paired": {"base": None, "champion": None}}
    return {**about, **changes}


def put(store: Store, found: dict[str, Any], key: str = "", run_id: str = RUN) -> None:
    records = as_parquet(evidence(Evaluation.model_validate_json(json.dumps(found))))
    store.put(runs.key_of(store, run_id, runs.EVALUATION_RECORDS), records)
    named = {"records_sha256": hashlib.sha256(records).hexdigest(), **found}
    store.put_json(key or runs.key_of(store, run_id, runs.EVALUATION), named)
