"""Compare base, champion and candidate on held-out records: `python -m ray_jobs.evaluate --config ... --version URI`.

The records are shared out over the workers of a training that has just ended, or over Ray tasks. Each loads the base
once and puts the adapters on it one after the other, in the base's dtype, as they were trained: what is measured is the
function that was trained, of the published files. A base that no worker can hold is shared out over all of them, as it
was to be trained on.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from components.config.ray import MatmulDtype
from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.prepare.judges import judges
from components.records import runs
from components.records.steps import ROLES, Evaluation, Measured, Role, TrainResult
from components.registry.aliases import read_alias
from components.registry.event_log import events
from components.registry.history import promotion
from components.registry.signing import is_revoked
from components.registry.versions import Version, resolve
from components.shared.counted import counted
from components.shared.errors import ConfigError, FineloopError, JobError, ObjectMissing
from components.shared.metrics import METRICS, metrics_of
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import recorded
from ray_jobs.base import base_config, base_model, chat_format, processor
from ray_jobs.base.chat_format import ChatFormat, without_reasoning
from ray_jobs.probes import PROBES
from ray_jobs.scoring import STEP, drawing
from ray_jobs.scoring.answers import (
    NEW_TOKENS,
    Score,
    as_columns,
    changed_share,
    confusion,
    metrics,
    paired_difference,
)
from ray_jobs.scoring.contender import Contender
from ray_jobs.scoring.drawing import Found
from ray_jobs.scoring.measure import measure_shard
from ray_jobs.scoring.probe import NO_PROBES, Outcome, Probes
from ray_jobs.training.standby import Standby

logger = logging.getLogger(__name__)
NO_OUTCOMES: Mapping[str, Outcome] = {}
BY_PROBES = [key for key, metric in METRICS.items() if metric.probe and not metric.on_request]
"""Metrics that an evaluation has whether they were measured or not."""


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
    arguments = parser.parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        evaluate(config, run_id=arguments.run_id, dataset_uri=arguments.dataset, version_uri=arguments.version)

    entry.run(STEP, job)


def evaluate(
    config: RunConfig, *, run_id: str, dataset_uri: str, version_uri: str, standby: Standby | None = None
) -> Evaluation:
    """Measure the three models and write runs/<run_id>/evaluation.json, and evaluation_records.parquet beside it.

    What the run's decision was made of, and an alias moved on, is not measured anew.

    `standby` are the workers of the training, if they are still there; they are let go of.

    Raises:
        UserError: dataset, version or base do not exist, or no held-out record fits the context.
        JobError: a Ray task failed.
    """
    import ray

    started = time.monotonic()
    store = Store.open(config.registry)
    candidate = resolve(store, f"{config.adapter.name}@{version_uri.rstrip('/').rpartition('/')[2]}")
    carried_out = promotion(events(store, candidate.name), run_id, config.adapter.alias)
    if carried_out is not None and carried_out.body["to"] == candidate.version:
        say(STEP, f"{config.adapter.alias} took {candidate.version} by this run's evaluation, which stands")
        if standby is not None:
            standby.end()
        return runs.read(store, run_id, Evaluation)
    judging = judges(store, dataset_uri, config, run_id=run_id)
    records = judging.records[: config.evaluate.records]
    base = base_model.resolve(config.model, recorded=recorded.read(config, store, candidate).base_identity)
    chat = chat_format.load(base, config.model)
    config = with_room_for_answers(config, chat, records)
    contenders = _contenders(config, store, candidate, run_id)
    probes = {key: kind.prepare(store, chat, config, contenders) for key, kind in PROBES.items()}
    entry.connect()
    if _must_be_shared(config, base, ray.nodes()):
        probes = {key: probe.held_together() for key, probe in probes.items()}
        measured = partial(_measured_together, config, base, contenders, store=store, run_id=run_id)
    else:
        measured = partial(_measured_apart, config, base, contenders, standby=standby)
    found = measured(records, probes)
    outside = {key: probe.outcome([share[key] for share in found.shares], chat) for key, probe in probes.items()}
    if further := drawing.further(config, judging.records[len(records) :], found):
        say(STEP, f"{len(records)} records do not tell: {len(further)} more are drawn")
        found = found.and_then(measured(further, matmul_dtype=found.matmul_dtype))
    if standby is not None:
        standby.end()
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
            "matmul_dtype": found.matmul_dtype,
            "first_scored_at": found.first_scored_at,
            "seconds": {"total": round(time.monotonic() - started, 3)},
        }
    )
    runs.write(store, run_id, evaluation)
    for contender in contenders:
        say(STEP, f"{contender.role}: {', '.join(_told(evaluation, contender.role))}")
    for line in [line for outcome in outside.values() for line in outcome.lines]:
        say(STEP, line)
    return evaluation


def _names(contenders: Sequence[Contender]) -> str:
    return ", ".join(contender.role for contender in contenders)


def _measured_apart(
    config: RunConfig,
    base: base_model.Base,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    matmul_dtype: MatmulDtype | None = None,
    standby: Standby | None = None,
) -> Found:
    """A share of records and probes by each of several workers, which hold the base by themselves.

    They are the training's where those are still there, and Ray tasks where they are not.
    """
    import ray

    # Two records at least in each: an answer is also read behind another record's prompt.
    num_shards = max(1, min(config.ray.num_workers, len(records) // 2))
    say(STEP, f"{counted(len(records), 'held-out record')} for {_names(contenders)} on {counted(num_shards, 'worker')}")
    shards = [records[start::num_shards] for start in range(num_shards)]
    shares = [
        {
            "contenders": contenders,
            "records": shard,
            "probes": {key: probe.at(partial(_dealt, i, num_shards)) for key, probe in probes.items()},
            "shard_index": i,
        }
        for i, shard in enumerate(shards)
    ]
    if standby is not None and standby.is_there:
        if (results := standby.measure(shares)) is not None:
            dtype, *_ = [dtype for dtype, _ in results]
            return Found.of(dtype, shards, [result for _, result in results])
        say(STEP, "the training's workers are gone: others take their place")
    resources = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": int(config.ray.use_gpu)}
    task = ray.remote(max_retries=1, **resources)(measure_shard)
    try:
        dtype = matmul_dtype or _matmul_dtype(config, base, num_shards, resources)
        results = ray.get([task.remote(**share, matmul_dtype=dtype) for share in shares])
    except ray.exceptions.RayTaskError as exc:
        raise (
            exc.cause if isinstance(exc.cause, FineloopError) else JobError(f"an evaluation task failed: {exc.cause}")
        ) from exc
    return Found.of(dtype, shards, results)


def _dealt(index: int, of: int, count: int) -> range:
    """A worker's rows of so many: every `of`-th from `index` on."""
    return range(index, count, of)


def _measured_together(
    config: RunConfig,
    base: base_model.Base,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    store: Store,
    run_id: str,
    matmul_dtype: MatmulDtype | None = None,
) -> Found:
    """All records by a group of workers, which share the base out as they do to train on it."""
    from ray_jobs.training import measure_together, trainer

    workers = f"{config.ray.num_workers} workers that hold the base together"
    say(STEP, f"{len(records)} held-out records for {_names(contenders)} on {workers}")
    resources = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": int(config.ray.use_gpu)}
    dtype = matmul_dtype or _matmul_dtype(config, base, config.ray.num_workers, resources)
    name = "ray-evaluate" if matmul_dtype is None else "ray-evaluate-more"
    arguments = {"contenders": contenders, "records": records, "probes": probes, "matmul_dtype": dtype}
    answer = trainer.run(measure_together.run, arguments, config, store, run_id=run_id, name=name, max_failures=0)
    return Found.of(dtype, [records], [answer["result"]])


def _must_be_shared(config: RunConfig, base: base_model.Base, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one worker cannot hold the base. Where it cannot be planned for, it is held as it was trained on."""
    from ray_jobs.planning.capacity import cluster_device, must_be_shared
    from ray_jobs.planning.rehearsal import Rehearsal
    from ray_jobs.planning.rehearsing import CannotRehearse, rehearsing

    if config.train.zero_stage < 3:
        return False
    try:
        with rehearsing():
            shape = base_config.load(base.path, config.model)
            rehearsal = Rehearsal(shape, config.method, reference=config.model.base, use_gpu=config.ray.use_gpu)
    except (CannotRehearse, ConfigError):
        return True
    return must_be_shared(config, rehearsal, cluster_device(config, nodes))


def _told(evaluation: Evaluation, role: Role) -> Iterator[str]:
    measured = evaluation.model(role)
    for metric in metrics_of(measured.metrics if measured else ()):
        value = evaluation.metric(role, metric.key)
        if value is not None:
            yield f"{metric.label} {metric.text(value)}"


def _matmul_dtype(
    config: RunConfig, base: base_model.Base, num_workers: int, resources: Mapping[str, int]
) -> MatmulDtype:
    """What every task multiplies in: measured where they run, the slowest of each dtype counts."""
    import ray

    if config.ray.use_gpu:
        return "bfloat16"
    if fixed := processor.fixed(config.ray.cpu_matmul_dtype):
        return fixed
    shape = processor.typical_shape(base_config.load(base.path, config.model))
    measure = ray.remote(max_retries=1, **resources)(_rates)
    measured = [measure.remote(shape, num_threads=config.ray.cpus_per_worker) for _ in range(num_workers)]
    return processor.slowest(ray.get(measured)).faster


def _rates(shape: tuple[int, int], *, num_threads: int) -> processor.Rates:
    """What this worker multiplies at; runs as a Ray task, whose process the shard's own will find warm."""
    import torch

    entry.quiet_libraries()
    torch.set_num_threads(num_threads)
    return processor.measure(shape)


def with_room_for_answers(config: RunConfig, chat: ChatFormat, records: Sequence[Record]) -> RunConfig:
    """The config with `evaluate.max_new_tokens` settled: room for every reference, and little more."""
    from ray_jobs.base.batching import tokenize

    if config.evaluate.max_new_tokens is not None:
        return config
    split = tokenize(records, chat, config.model.max_length)
    longest = int(split.num_answer_tokens.max(initial=NEW_TOKENS[0]))
    settled = config.evaluate.model_copy(update={"max_new_tokens": min(longest, NEW_TOKENS[-1])})
    return config.model_copy(update={"evaluate": settled})


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
    """What follows from the scores and from what probes came to; pure."""
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
            [without_reasoning(record.told) for record in records], [score.text for score in scores["candidate"]]
        ),
        samples=[
            {
                "id": records[row].id,
                "prompt": records[row].asked,
                "reference": records[row].told,
                **{role: scores[role][row].text if role in scores else None for role in ROLES},
            }
            for row in shown
        ],
        generation={"max_new_tokens": config.evaluate.max_new_tokens, "decoding": "greedy"},
    )


def _contenders(config: RunConfig, store: Store, candidate: Version, run_id: str = "") -> list[Contender]:
    """Base, champion and anchor where there are any, candidate; each on the base and the method of its own run."""
    name, identity = config.adapter.name, recorded.read(config, store, candidate).base_identity
    result = [Contender("base", config, None, identity)]
    if (pointer := read_alias(store, name, config.adapter.alias)) is not None:
        result.append(_measured_before("champion", config, store, pointer.version))
        # A person who promotes means that version: its move names no other. A rollback's names that of the move before.
        anchor = pointer.event.get("evidence", {}).get("anchor")
        if anchor and anchor not in (pointer.version, candidate.version):
            try:
                if is_revoked(store, name, anchor):
                    raise ObjectMissing(f"{anchor} is revoked")
                result.append(_measured_before("anchor", config, store, anchor))
            except ObjectMissing:
                say(STEP, f"the best version so far, {anchor}, is gone: the candidate is held to the champion alone")
    trained = runs.find(store, run_id, TrainResult) if run_id else None
    own = trained.manifest_sha256 if trained and trained.version == candidate.version else ""
    return [*result, Contender("candidate", config, candidate, identity, own)]


def _measured_before(role: Role, config: RunConfig, store: Store, version: str) -> Contender:
    found = resolve(store, f"{config.adapter.name}@{version}")
    theirs = recorded.read(config, store, found)
    return Contender(role, theirs.config, found, theirs.base_identity)


def _write_records(
    store: Store, run_id: str, records: Sequence[Record], tokens: Sequence[int], scores: Mapping[Role, Sequence[Score]]
) -> str:
    """Write evaluation_records.parquet and return its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "id": [record.id for record in records],
        "prompt": [json.dumps([turn.as_json() for turn in record.prompt], ensure_ascii=False) for record in records],
        "reference": [record.told for record in records],
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
    store.put(runs.run_key(run_id, runs.EVALUATION_RECORDS), body)
    return hashlib.sha256(body).hexdigest()


if __name__ == "__main__":
    main()
