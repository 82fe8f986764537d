"""A Ray job that keeps the real one's contract and trains nothing: an adapter is one number, its held-out loss.

`python stub_jobs.py ...` takes the arguments of `python -m ray_jobs.candidate` and `-m ray_jobs.evaluate`. The
loss is train.weight_decay of the config; each of train.max_steps takes half a second, and the first is recorded;
method.dropout says what goes wrong: 0.1 a user's mistake, 0.2 a crash, 0.3 hangs, 0.4 forges its own promotion.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.config import config_file
from components.prepare.dataset import load_split
from components.records import runs
from components.registry import aliases, versions
from components.shared.errors import DataError
from components.shared.protocol import TRAINED, say, say_failure
from components.store.store import Store, open_uri

BASE_LOSS = 2.0
STEP_S = 0.5


def asked():  # type: ignore[no-untyped-def]
    """The config, the store and the options that a job was started with."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--run-id", "--dataset", "--version", "--against", "--config-digest"):
        parser.add_argument(name)
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    config_store, key = open_uri(options.config)
    config = config_file.loads(config_store.get(key).decode())
    return config, Store.open(config.registry), options


def main() -> None:
    config, store, options = asked()
    if not options.version:
        finetune(config, store, options)
        if config.method.dropout == 0.4:
            forge(config, store, options)
    if not options.version and not options.train_only:
        say("finetune", TRAINED)
    if not options.train_only:
        evaluate(config, store, options)


def forge(config, store, options) -> None:  # type: ignore[no-untyped-def]
    """What whoever may write below runs/ can do to have its version promoted."""
    everyones = Store(store._client, store.bucket, store.prefix)
    evaluate(config, everyones, options)
    evaluation = everyones.get_json(f"runs/{options.run_id}/evaluation.json")
    for metric in ("loss", "perplexity"):
        evaluation["models"]["candidate"]["metrics"][metric] = 0.01
    everyones.put_json(f"runs/{options.run_id}/evaluation.json", evaluation)
    about = {"adapter": config.adapter.name, "alias": config.adapter.alias, "run_id": options.run_id}
    version = everyones.get_json(f"runs/{options.run_id}/finetune.json")["version"]
    decision = {"decision": "promote", "verdict": "promote", "reasons": ["better"], "version": version, **about}
    everyones.put_json(f"runs/{options.run_id}/decision.json", decision)


def finetune(config, store, options) -> None:  # type: ignore[no-untyped-def]
    records = load_split(store, options.dataset, "train")
    say("finetune", f"1/2 {len(records)} records")
    if config.method.dropout == 0.1:
        error = DataError("data.source: every answer is empty")
        say_failure("finetune", error)
        sys.exit(error.exit_code)
    if config.method.dropout == 0.2:
        raise MemoryError("no memory for the adapter")
    if config.method.dropout == 0.3:
        Path("hanging").write_text(str(os.getpid()))
        time.sleep(600)
    if steps := config.train.max_steps:
        step = {"kind": "train", "step": 1, "num_steps": steps, "loss": 1.0, "elapsed_s": STEP_S}
        store.put(f"runs/{options.run_id}/metrics.jsonl", json.dumps(step).encode() + b"\n")
        time.sleep(STEP_S * steps)
    files = {
        "adapter_model.safetensors": str(config.train.weight_decay).encode(),
        "adapter_config.json": b"{}",
        "README.md": b"# a test",
    }
    dataset = {"dataset_id": options.dataset.rpartition("/")[2], "uri": options.dataset}
    lineage = {"run_id": options.run_id, "config": config.model_dump(mode="json"), "dataset": dataset}
    lineage["base"] = {"reference": config.model.base, "identity": {}}
    version = versions.publish_version(store, config.adapter.name, files, lineage=lineage)
    say("finetune", "2/2")
    result = {
        "version": version.version,
        "version_uri": version.uri,
        "dataset_uri": options.dataset,
        "train_seconds": 0,
    }
    store.put_json(f"runs/{options.run_id}/finetune.json", result)


def evaluate(config, store, options) -> None:  # type: ignore[no-untyped-def]
    name = config.adapter.name
    records = load_split(store, options.dataset, "eval")
    pointer = aliases.read_alias(store, name, config.adapter.alias)
    if options.against:  # of a look at what is served, on every record
        candidate, champion, number = options.version.rpartition("/")[2], options.against, len(records)
    else:
        candidate = store.get_json(f"runs/{options.run_id}/finetune.json")["version"]
        champion = pointer.version if pointer else ""
        number = max(len(records), config.gate.min_records, 300)  # of which a rare loss would show

    def model(version: str | None) -> dict[str, object]:
        loss = BASE_LOSS
        if version is not None:
            loss = float(store.get(f"adapters/{name}/versions/{version}/adapter_model.safetensors"))
        gain = None if version is None else 1.0
        metrics = {"loss": loss, "perplexity": 2.7**loss, "exact_match": 0.5, "token_f1": 0.5}
        metrics |= {"prompt_gain": gain, "answer_prompt_gain": gain}
        return {"version": version, "metrics": metrics}

    evaluation = {
        "run_id": options.run_id,
        "dataset_id": options.dataset.rpartition("/")[2],
        "dataset_uri": options.dataset,
        "records": number,
        "base": {"reference": config.model.base, "identity": {}},
        "models": {
            "base": model(None),
            "champion": model(champion) if champion and champion != "base" else None,
            "candidate": model(candidate),
        },
        "paired": {"base": None, "champion": None},
        "confusion": {"labels": ["a", "b"], "counts": [[1, 0], [0, 1]]},
        "samples": [],
        "generation": {"max_new_tokens": config.evaluate.max_new_tokens},
        "seconds": {},
    }
    behind = records_of(evaluation, [each.id for each in records])
    store.put(runs.key_of(store, options.run_id, runs.EVALUATION_RECORDS), behind)
    named = {**evaluation, "records_sha256": hashlib.sha256(behind).hexdigest()}
    store.put_json(runs.key_of(store, options.run_id, runs.EVALUATION), named)
    say("evaluate", json.dumps(evaluation["records"]))


def records_of(evaluation: dict, ids: list[str]) -> bytes:  # type: ignore[type-arg]
    """Records of one answer token, all alike; as many as are asked for, though fewer have ids."""
    number = evaluation["records"]
    columns: dict[str, list[float] | list[str]] = {"answer_tokens": [1] * number}
    columns["id"] = [*ids, *(f"more/{place}" for place in range(len(ids), number))]
    for role, model in evaluation["models"].items():
        if model:
            columns[f"{role}_nll"] = [model["metrics"]["loss"]] * number
            columns[f"{role}_exact_match"] = [model["metrics"]["exact_match"]] * number
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


if __name__ == "__main__":
    main()
