"""Compare base, champion and candidate on held-out records: `python -m ray_jobs.evaluate --config ... --version URI`.

The records are distributed over the workers of a training that has just ended, or over Ray tasks. Each worker loads the
base once and attaches the adapters to it one after the other, in the base's dtype, as in training: the published files
are measured as the function that was trained. A base that no single worker can hold is sharded over all of them, as in
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.prepare.split import judges
from components.records import runs
from components.records.steps import ROLES, Evaluation, Measured, Role, TrainResult
from components.registry.aliases import read_alias
from components.registry.event_log import events, promotion
from components.registry.signing import is_revoked
from components.registry.versions import Version, resolve
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import METRICS, alike, metrics_of
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import recorded
from ray_jobs.base import attention, base_model
from ray_jobs.planning.capacity import is_shared
from ray_jobs.probes import PROBES
from ray_jobs.scoring import STEP, measure
from ray_jobs.scoring.answers import (
    Score,
    as_columns,
    changed_share,
    confusion,
    cut_short,
    metrics,
    paired_difference,
)
from ray_jobs.scoring.measure import Contender, Found, Outcome, of_version, with_room_for_answers
from ray_jobs.text import chat_format
from ray_jobs.text.batching import tokenize
from ray_jobs.text.chat_format import ChatFormat, without_reasoning
from ray_jobs.training.job import Standby
from ray_jobs.training.measuring import measured_apart, measured_together
from ray_jobs.training.trainer import workers_with_room

logger = logging.getLogger(__name__)
NO_OUTCOMES: Mapping[str, Outcome] = {}
BY_PROBES = [key for key, metric in METRICS.items() if metric.probe and not metric.on_request]
"""Metrics that every evaluation lists, with None where they were not measured."""


def main() -> None:
    """Parse the command line and run the job; the process ends with the exit code of `entry.run`."""
    parser = entry.parser(
        "ray_jobs.evaluate",
        "Measure base, champion and candidate on the held-out records of a dataset.",
        "ray job submit --working-dir . -- python -m ray_jobs.evaluate --config pipelines/configs/icd10.toml "
        "--run-id ID --dataset s3://... --version s3://...",
    )
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--dataset", required=True, help="s3:// address of the prepared dataset")
    parser.add_argument("--version", required=True, help="s3:// address of the candidate's version")
    parser.add_argument("--config-digest", default="", help="refuse another config than the one with this digest")
    arguments = parser.parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        if arguments.config_digest not in ("", config.digest):
            raise IntegrityError(f"{arguments.config} was changed: its digest is not {arguments.config_digest}")
        evaluate(config, run_id=arguments.run_id, dataset_uri=arguments.dataset, version_uri=arguments.version)

    entry.run(STEP, job)


def evaluate(
    config: RunConfig, *, run_id: str, dataset_uri: str, version_uri: str, standby: Standby | None = None
) -> Evaluation:
    """Measure the three models and write the run's evaluation.json and evaluation_records.parquet.

    If the alias has already moved to this candidate by the run's evaluation, that evaluation is returned as it is.

    `standby` holds the workers of the training, if they are still there; they are released.

    Raises:
        UserError: dataset, version or base do not exist, or no held-out record fits the context.
        JobError: a Ray task failed.
    """
    started = time.monotonic()
    attention.require_installed(config.model.attention)
    store = Store.open(config.registry)
    candidate = resolve(store, f"{config.adapter.name}@{version_uri.rstrip('/').rpartition('/')[2]}")
    carried_out = promotion(events(store, candidate.name), run_id, config.adapter.alias)
    if carried_out is not None and carried_out.body["to"] == candidate.version:
        say(STEP, f"{config.adapter.alias} took {candidate.version} by this run's evaluation, which stands")
        if standby is not None:
            standby.end()
        return runs.read(store, run_id, Evaluation)
    judging = judges(store, dataset_uri, config, run_id=run_id)
    identity = recorded.read(config, store, candidate).base_identity
    base = base_model.resolve(config.model, recorded=identity, weights=False, registry=store)
    config = base_model.fitted(config, base_model.load_config(base.path, config.model), lambda line: say(STEP, line))
    chat = chat_format.load(base, config.model)
    if config.evaluate.max_new_tokens is None:
        judged = judging.records[: config.evaluate.records]
        config = with_room_for_answers(config, tokenize(judged, chat, config.model.max_length))
    entry.connect()
    config = config.on(workers_with_room(config))
    labels = alike(without_reasoning(record.answer_text) for record in judging.records)
    contenders = [replace(each, alike=labels) for each in _contenders(config, store, candidate, run_id)]
    found, outside = _measured(config, base, chat, contenders, judging.records, store, run_id, standby)
    kept, tokens, scores = found.records, found.tokens, found.scores
    evaluation = compared(config, contenders, kept, tokens, scores, outside, run_id=run_id).model_copy(
        update={
            "dataset_uri": dataset_uri,
            "dataset_id": dataset_uri.rstrip("/").rpartition("/")[2],
            "held_out": len(judging.records),
            "test_set": judging.sample,
            "fold": judging.fold,
            "folds": config.evaluate.folds,
            "records_sha256": _write_records(store, run_id, kept, tokens, scores),
            "base": {"reference": config.model.base, "identity": base.identity},
            "matmul_dtype": found.kernels.dtype,
            "first_scored_at": found.first_scored_at,
            "seconds": {"total": round(time.monotonic() - started, 3)},
        }
    )
    runs.write(store, run_id, evaluation)
    if line := cut_short(tokens, config.evaluate.max_new_tokens):
        say(STEP, line)
    for contender in contenders:
        say(STEP, f"{contender.role}: {', '.join(_metric_texts(evaluation, contender.role))}")
    for line in [line for outcome in outside.values() for line in outcome.lines]:
        say(STEP, line)
    return evaluation


def _measured(
    config: RunConfig,
    base: base_model.Base,
    chat: ChatFormat,
    contenders: Sequence[Contender],
    held_out: Sequence[Record],
    store: Store,
    run_id: str,
    standby: Standby | None,
) -> tuple[Found, dict[str, Outcome]]:
    """Scores on enough held-out records to decide, and each probe's outcome; releases the training's workers."""
    import ray

    records = held_out[: config.evaluate.records]
    probes = {key: kind.prepare(store, chat, config, contenders) for key, kind in PROBES.items()}
    if is_shared(config, base, ray.nodes()):
        probes = {key: probe.held_together() for key, probe in probes.items()}
        measured = partial(measured_together, config, base, contenders, store=store, run_id=run_id)
    else:
        measured = partial(measured_apart, config, base, contenders, standby=standby)
    found = measured(records, probes)
    outside = {key: probe.outcome([share[key] for share in found.shares], chat) for key, probe in probes.items()}
    if further := measure.further(config, held_out[len(records) :], found):
        say(STEP, f"{len(records)} records do not tell: {len(further)} more are drawn")
        found = found.and_then(measured(further, kernels=found.kernels))
    if standby is not None:
        standby.end()
    return found, outside


def _metric_texts(evaluation: Evaluation, role: Role) -> Iterator[str]:
    measured = evaluation.model(role)
    for metric in metrics_of(measured.metrics if measured else ()):
        value = evaluation.metric(role, metric.key)
        if value is not None:
            yield f"{metric.label} {metric.text(value)}"


def compared(
    config: RunConfig,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    tokens: Sequence[int],
    scores: Mapping[Role, Sequence[Score]],
    outside: Mapping[str, Outcome] = NO_OUTCOMES,
    *,
    run_id: str,
) -> Evaluation:
    """The evaluation that follows from the scores and the probes' outcomes; a pure function."""
    records_of = {key: outcome.record for key, outcome in outside.items()}
    versions = {c.role: c.version.version if c.version else None for c in contenders}
    shown, groups = range(min(config.evaluate.samples, len(records))), [record.group for record in records]
    return Evaluation(
        run_id=run_id,
        records=len(records),
        models={
            **dict.fromkeys(ROLES),
            **{
                role: Measured(
                    version=versions[role],
                    metrics={
                        **metrics(found, tokens),
                        **dict.fromkeys(BY_PROBES),
                        **{
                            key: value for each in outside.values() for key, value in each.metrics.get(role, {}).items()
                        },
                    },
                )
                for role, found in scores.items()
            },
        },
        **{key: record for key, record in records_of.items() if key in Evaluation.model_fields},
        probes={key: record for key, record in records_of.items() if key not in Evaluation.model_fields},
        changed_answers=changed_share(scores["champion"], scores["candidate"]) if "champion" in scores else None,
        paired={
            role: paired_difference(scores["candidate"], scores[role], tokens, config.gate.metric, groups)
            if role in scores
            else None
            for role in ROLES
            if role != "candidate"
        },
        confusion=confusion(
            [without_reasoning(record.answer_text) for record in records], [score.text for score in scores["candidate"]]
        ),
        samples=[
            {
                "id": records[row].id,
                "prompt": records[row].asked,
                "reference": records[row].answer_text,
                **{role: scores[role][row].text if role in scores else None for role in ROLES},
            }
            for row in shown
        ],
        generation={"max_new_tokens": config.evaluate.max_new_tokens, "decoding": "greedy"},
    )


def _contenders(config: RunConfig, store: Store, candidate: Version, run_id: str = "") -> list[Contender]:
    """Base, champion and anchor where they exist, and candidate; each with the base and method of its own run."""
    name, theirs = config.adapter.name, recorded.read(config, store, candidate)
    identity, stands_on_sha256 = theirs.base_identity, theirs.stands_on_sha256
    result = [Contender("base", config, None, identity)]
    if (pointer := read_alias(store, name, config.adapter.alias)) is not None:
        result.append(of_version("champion", config, store, pointer.version))
        # A manual promotion names no anchor: its own version is meant. A rollback names the anchor of the move before.
        anchor = pointer.event.get("evidence", {}).get("anchor")
        if anchor and anchor not in (pointer.version, candidate.version):
            try:
                if is_revoked(store, name, anchor):
                    raise ObjectMissing(f"{anchor} is revoked")
                result.append(of_version("anchor", config, store, anchor))
            except ObjectMissing:
                say(STEP, f"the best version so far, {anchor}, is gone: the candidate is held to the champion alone")
    trained = runs.find(store, run_id, TrainResult) if run_id else None
    own = trained.manifest_sha256 if trained and trained.version == candidate.version else ""
    return [*result, Contender("candidate", config, candidate, identity, stands_on_sha256, own)]


def _write_records(
    store: Store, run_id: str, records: Sequence[Record], tokens: Sequence[int], scores: Mapping[Role, Sequence[Score]]
) -> str:
    """Write evaluation_records.parquet and return its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "id": [record.id for record in records],
        "prompt": [json.dumps([turn.as_json() for turn in record.prompt], ensure_ascii=False) for record in records],
        "reference": [record.answer_text for record in records],
        "answer_tokens": list(tokens),
    }
    for name in ("group", "source"):
        if any(named := [getattr(record, name) for record in records]):
            columns[name] = named
    for role, values in scores.items():
        columns.update(as_columns(role, values))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    body = sink.getvalue().to_pybytes()
    store.put(runs.key_of(store, run_id, runs.EVALUATION_RECORDS), body)
    return hashlib.sha256(body).hexdigest()


if __name__ == "__main__":
    main()
