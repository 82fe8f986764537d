"""Compare base, champion and candidate on held-out records: `python -m ray_jobs.evaluate --config ... --version URI`.

The workers of the training measure, as soon as that has ended, or a group of their own: each loads the base once and
attaches the adapters to it one after the other, in the base's dtype, as in training: the published files are measured
as the function that was trained. A base that no single worker can hold is sharded over all of them, as in training.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from typing import Any, Literal

from components.config.schema import RunConfig
from components.prepare.dataset import Record, groups_of, load_split
from components.prepare.split import Judges, judges
from components.prepare.validate import keyed
from components.records import runs
from components.records.steps import ROLES, Evaluation, Measured, PairedDifference, Role, TrainResult
from components.registry import between_runs
from components.registry.aliases import read_alias
from components.registry.event_log import events, promotion
from components.registry.looks import BASE
from components.registry.signing import is_revoked
from components.registry.versions import Version, resolve
from components.shared.errors import IntegrityError, ObjectMissing
from components.shared.metrics import METRICS, alike, metrics_of
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import recorded
from ray_jobs.base import attention
from ray_jobs.planning.capacity import is_shared
from ray_jobs.probes import PROBES
from ray_jobs.scoring import STEP, vllm_engine
from ray_jobs.scoring.answers import Score, as_columns, changed_share, confusion, cut_short, metrics, paired_difference
from ray_jobs.scoring.measure import Contender, Outcome, ShardResult, of_version, with_room_for_answers
from ray_jobs.text.chat_format import ChatFormat, without_reasoning
from ray_jobs.training.measuring import Task
from ray_jobs.training.starting import identity_to_keep, resolve_base
from ray_jobs.training.trainer import measured, on_the_cluster

BY_PROBES = [key for key, metric in METRICS.items() if metric.probe and not metric.on_request]
"""Metrics that every evaluation lists, with None where they were not measured."""


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.evaluate", __doc__)
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--dataset", required=True, help="s3:// address of the prepared dataset")
    parser.add_argument("--version", required=True, help="s3:// address of the candidate's version")
    parser.add_argument("--against", default="", help="compare with this version or `base` alone, on all of split eval")
    parser.add_argument("--config-digest", default="", help="refuse another config than the one with this digest")

    def job(config: RunConfig, arguments: argparse.Namespace) -> None:
        if arguments.config_digest not in ("", config.digest):
            raise IntegrityError(f"{arguments.config} was changed: its digest is not {arguments.config_digest}")
        where = {"run_id": arguments.run_id, "dataset_uri": arguments.dataset, "version_uri": arguments.version}
        run(config, **where, against=arguments.against)

    entry.main(STEP, parser, job)


@dataclass(frozen=True)
class Planned:
    """What an evaluation measures, for which run and on which data."""

    run_id: str
    dataset_uri: str
    task: Task
    judging: Judges
    base_identity: Mapping[str, str]
    chat: ChatFormat


def run(
    config: RunConfig,
    *,
    run_id: str,
    dataset_uri: str,
    version_uri: str,
    against: str = "",
    before: tuple[Planned, ShardResult] | None = None,
) -> Evaluation:
    """Measure the three models, or a version `against` another one, as `plan` says, and write the evaluation.

    If the alias has already moved to this candidate by the run's evaluation, that evaluation is returned as it is.

    What the workers of the training have measured `before` counts, as it was planned then, unless another version has
    gone into production since, or other records judge. Raises UserError: dataset, version or base do not exist, or no
    held-out record fits the context; JobError: the workers failed.
    """
    began, store = time.time(), Store.open(config.registry)
    candidate = resolve(store, f"{config.adapter.name}@{version_uri.rstrip('/').rpartition('/')[2]}")
    carried_out = promotion(events(store, candidate.name), run_id, config.adapter.alias)
    if carried_out is not None and carried_out.body["to"] == candidate.version:
        say(STEP, f"{config.adapter.alias} took {candidate.version} by this run's evaluation, which stands")
        return runs.read(store, run_id, Evaluation)
    if before is not None and _stands(before[0], store, candidate):
        began = datetime.fromisoformat(runs.read(store, run_id, TrainResult).trained_at).timestamp()
    else:
        about = {"run_id": run_id, "dataset_uri": dataset_uri, "against": against}
        planned = plan(config, store, candidate=candidate, **about)
        assert planned is not None
        before = planned, measured(planned.task, store, run_id=run_id)
    return evaluate(*before, store, candidate, began)


def plan(
    config: RunConfig,
    store: Store,
    *,
    run_id: str,
    dataset_uri: str,
    candidate: Version | None = None,
    against: str = "",
) -> Planned | None:
    """The evaluation of a candidate, or before its training of one to come: None where only the training will read what
    identifies the base, or holds no whole base in any worker.

    With `against`, a version or `BASE`, the candidate is one that is served, and the two are measured on all of the
    split `eval`, and on nothing else. Raises UserError: dataset, version or base do not exist; IntegrityError: by the
    candidate's lineage it has another base or chat format than `config`.
    """
    import ray

    attention.require_installed(config.model.attention, use_gpu=config.ray.use_gpu)
    if config.evaluate.engine == "vllm":
        vllm_engine.run("-c", "import vllm")  # workers have their driver's image
    lineage_of = recorded.read if against else recorded.of_run
    theirs = lineage_of(config, store, candidate) if candidate else None
    if against and theirs:
        config, judging = theirs.config, Judges(load_split(store, dataset_uri, "eval"))
    else:
        judging = judges(store, dataset_uri, config)
    tell = partial(say, STEP)
    identity = theirs.base_identity if theirs else identity_to_keep(config, store, run_id, tell)
    config, base, shape, chat = resolve_base(config, store, tell, recorded=identity)
    if candidate is None and (config.train.zero_stage == 3 or not base.is_known):
        return None
    records = judging.records[: None if against else config.evaluate.records]
    config = with_room_for_answers(config, records, chat)
    if candidate is None:
        contenders = _beside(Contender("candidate", config, None, base.identity), store)
    else:
        config = on_the_cluster(config, tell)
        contenders = _contenders(config, store, candidate, run_id, against)
    labels = alike(without_reasoning(record.answer_text) for record in judging.records)
    contenders = [replace(contender, alike=labels) for contender in contenders]
    kinds = {} if against else PROBES
    probes = {key: kind.prepare(store, chat, config, contenders) for key, kind in kinds.items()}
    together = candidate is not None and is_shared(config, shape, ray.nodes())
    if together:
        probes = {key: probe.held_together() for key, probe in probes.items()}
    task = Task(contenders, records, shape, probes, judging.records[len(records) :], together)
    return Planned(run_id, dataset_uri, task, judging, base.identity, chat)


def _stands(planned: Planned, store: Store, candidate: Version) -> bool:
    """Whether an evaluation of the candidate would still measure what was planned before its training."""
    config, others = planned.task.config, planned.task.contenders[:-1]
    now = _contenders(config, store, candidate, planned.run_id)[:-1]
    judging = judges(store, planned.dataset_uri, config)
    return [replace(contender, alike=others[0].alike) for contender in now] == others and planned.judging == judging


def evaluate(planned: Planned, result: ShardResult, store: Store, candidate: Version, began: float) -> Evaluation:
    """What was measured, as the run's evaluation.json and evaluation_records.parquet; `began` is the time at which the
    evaluation did, in seconds since the epoch."""
    task, judging, config, run_id = planned.task, planned.judging, planned.task.config, planned.run_id
    outside = {
        key: probe.outcome([share[key] for share in result.shares], planned.chat) for key, probe in task.probes.items()
    }
    kept, tokens, scores = result.order(judging.records), [*result.tokens.values()], result.scores
    contenders = [*task.contenders[:-1], replace(task.contenders[-1], version=candidate)]
    of_champion = next((c.version.run_id for c in contenders if c.role == "champion" and c.version), "")
    is_new = between_runs.are_new_since(store, of_champion, keyed(kept)["content"].to_pylist())
    evaluation = compared(config, contenders, kept, tokens, scores, outside, run_id=run_id).model_copy(
        update={
            "since_champion": since_champion(config, kept, tokens, scores, is_new) if is_new else {},
            "dataset_uri": planned.dataset_uri,
            "dataset_id": planned.dataset_uri.rstrip("/").rpartition("/")[2],
            "held_out": len(judging.records),
            "test_set": judging.sample,
            "records_sha256": _write_records(store, run_id, kept, tokens, scores),
            "base": {"reference": config.model.base, "identity": planned.base_identity},
            "matmul_dtype": result.matmul_dtype,
            "first_scored_at": result.first_scored_at,
            "seconds": {"total": round(time.time() - began, 3)},
        }
    )
    runs.write(store, run_id, evaluation)
    if line := cut_short(tokens, config.evaluate.max_new_tokens):
        say(STEP, line)
    for role, model in [(role, evaluation.model(role)) for role in scores]:
        values = [(m, evaluation.metric(role, m.key)) for m in metrics_of(model.metrics if model else ())]
        say(STEP, f"{role}: {', '.join(f'{m.label} {m.text(x)}' for m, x in values if x is not None)}")
    for line in chain(evaluation.freshness, *(outcome.lines for outcome in outside.values())):
        say(STEP, line)
    return evaluation


def compared(
    config: RunConfig,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    tokens: Sequence[int],
    scores: Mapping[Role, Sequence[Score]],
    outside: Mapping[str, Outcome] | None = None,
    *,
    run_id: str,
) -> Evaluation:
    """The evaluation that follows from the scores and the probes' outcomes; a pure function."""
    outside = outside or {}
    records_of = {key: outcome.record for key, outcome in outside.items()}
    versions = {c.role: c.version.version if c.version else None for c in contenders}
    groups, ours = groups_of(records), scores["candidate"]
    by_both = [score.differs for theirs in scores.values() for score in theirs if score.differs is not None]
    by_vllm = {"engine": "vllm", "compared": len(by_both), "differing": sum(by_both)} if by_both else {}
    measured: dict[str, Measured] = {
        role: Measured(
            version=versions[role],
            metrics={
                **metrics(theirs, tokens),
                **dict.fromkeys(BY_PROBES),
                **{key: value for outcome in outside.values() for key, value in outcome.metrics.get(role, {}).items()},
            },
        )
        for role, theirs in scores.items()
    }
    return Evaluation(
        run_id=run_id,
        records=len(records),
        models={**dict.fromkeys(ROLES), **measured},
        **{key: record for key, record in records_of.items() if key in Evaluation.model_fields},
        probes={key: record for key, record in records_of.items() if key not in Evaluation.model_fields},
        changed_answers=changed_share(scores["champion"], ours) if "champion" in scores else None,
        paired={
            role: paired_difference(ours, scores[role], tokens, config.gate.metric, groups) if role in scores else None
            for role in ROLES
            if role != "candidate"
        },
        confusion=confusion(
            [without_reasoning(record.answer_text) for record in records], [score.text for score in ours]
        ),
        samples=[
            {
                "id": record.id,
                "prompt": record.shown_prompt,
                "reference": record.answer_text,
                **{role: scores[role][row].text if role in scores else None for role in ROLES},
            }
            for row, record in enumerate(records[: config.evaluate.samples])
        ],
        generation={"max_new_tokens": config.evaluate.max_new_tokens, "decoding": "greedy", **by_vllm},
    )


def since_champion(
    config: RunConfig,
    records: Sequence[Record],
    tokens: Sequence[int],
    scores: Mapping[Role, Sequence[Score]],
    is_new: Sequence[bool],
) -> dict[Literal["new", "seen"], list[PairedDifference]]:
    """Candidate and champion on the records that are new to the champion, and on the others; a pure function."""

    def on(some: Sequence[int]) -> list[PairedDifference]:
        ours, theirs = ([scores[role][row] for row in some] for role in ("candidate", "champion"))
        counts, groups = [tokens[row] for row in some], [records[row].group for row in some]
        keys = dict.fromkeys((config.gate.metric, "exact_match"))
        paired = [paired_difference(ours, theirs, counts, key, groups) for key in keys]
        few = {"ci95": None} if len(some) < config.gate.min_records else {}
        return [pair.model_copy(update=few) for pair in paired if pair]

    new, seen = (on([row for row, flag in enumerate(is_new) if flag is kind]) for kind in (True, False))
    return {"new": new, "seen": seen} if new and seen else {}


def _contenders(
    config: RunConfig, store: Store, candidate: Version, run_id: str = "", against: str = ""
) -> list[Contender]:
    """The candidate, last, behind those that it is compared with: as this run trained it, or as its own did."""
    last = of_version("candidate", config, store, candidate)
    if not against:
        trained = runs.find(store, run_id, TrainResult) if run_id else None
        own = trained.manifest_sha256 if trained and trained.version == candidate.version else ""
        last = replace(last, config=config, published_sha256=own)
    return _beside(last, store, against)


def _beside(candidate: Contender, store: Store, against: str = "") -> list[Contender]:
    """Base, champion and anchor, where they exist, or only the one that the candidate is `against`, and the candidate,
    which may have no version yet; each with the base and method of its own run."""
    config, name = candidate.config, candidate.config.adapter.name

    def one(role: Role, version: str) -> Contender:
        return of_version(role, config, store, resolve(store, f"{name}@{version}"))

    base = Contender("base", config, None, candidate.base_identity)
    if against:
        return [base if against == BASE else one("champion", against), candidate]
    result = [base]
    if (pointer := read_alias(store, name, config.adapter.alias)) is not None:
        result.append(one("champion", pointer.version))
        # A manual promotion names no anchor: its own version is meant. A rollback names the anchor of the move before.
        anchor = pointer.event.get("evidence", {}).get("anchor")
        if anchor and anchor not in (pointer.version, candidate.version and candidate.version.version):
            try:
                if is_revoked(store, name, anchor):
                    raise ObjectMissing(f"{anchor} is revoked")
                result.append(one("anchor", anchor))
            except ObjectMissing:
                say(STEP, f"the best version so far, {anchor}, is gone: the candidate is held to the champion alone")
    return [*result, candidate]


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
    texts = {"group": groups_of(records)}
    for name in ("source", "origin", "served_by", "drawn"):
        texts[name] = [getattr(record, name) for record in records]
    columns.update({name: values for name, values in texts.items() if any(values)})
    for role, values in scores.items():
        columns.update(as_columns(role, values))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    body = sink.getvalue().to_pybytes()
    store.put(runs.key_of(store, run_id, runs.EVALUATION_RECORDS), body)
    return hashlib.sha256(body).hexdigest()


if __name__ == "__main__":
    main()
