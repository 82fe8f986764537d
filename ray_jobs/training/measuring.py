"""The function of every group of workers: train by a spec, measure the models of a task, or first one and then the
other on the base that the training has read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records import runs
from components.records.steps import Role, TaskScore, TrainResult
from components.registry.versions import resolve
from components.shared import errors
from components.shared.errors import FineloopError
from components.shared.protocol import TRAINED, counted, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, recorded
from ray_jobs.base import together
from ray_jobs.kernels import door
from ray_jobs.probes import texts
from ray_jobs.scoring import STEP
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import (
    NO_PROBES,
    BaseCache,
    Contender,
    Findings,
    Probes,
    Progress,
    ShardResult,
    further,
    local_contenders,
    measure_shard,
    merged,
    run_all,
)
from ray_jobs.training import zero
from ray_jobs.training.spec import TrainSpec
from ray_jobs.training.worker import train
from ray_jobs.training.zero import Worker

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

Finding = texts.Read | tuple[TaskScore, ...]
"""What the probes find of a model."""
_PLAIN: TypeAdapter[Any] = TypeAdapter(
    tuple[dict[str, int], dict[Role, list[Score]], list[dict[str, dict[Role, Finding]]], str, str]
)
"""The fields of a ShardResult as what JSON can hold."""


@dataclass(frozen=True)
class Task:
    """What a group of workers measures."""

    contenders: Sequence[Contender]
    """Before a training, the candidate among them has no version yet."""
    records: Sequence[Record]
    base: "PretrainedConfig"
    probes: Probes = field(default_factory=dict)
    in_reserve: Sequence[Record] = ()
    """Records that are measured as well where the others do not decide."""
    together: bool = False
    """Whether the workers shard the base, as in training under ZeRO-3; else each of them holds it."""

    @property
    def config(self) -> RunConfig:
        return self.contenders[-1].config

    def of(self, trained: TrainResult) -> "Task":
        """The task with the version that a training has published as its candidate."""
        store, candidate = Store.open(self.config.registry), self.contenders[-1]
        version = resolve(store, f"{self.config.adapter.name}@{trained.version}")
        theirs = recorded.of_run(self.config, store, version)
        candidate = replace(
            candidate,
            version=version,
            stands_on_sha256=theirs.stands_on_sha256,
            published_sha256=trained.manifest_sha256,
        )
        return replace(self, contenders=[*self.contenders[:-1], candidate])


def work(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """On rank 0, returns the training's TrainResult as `trained`, and the measurements as `measured`.

    A training that was published stands: after it, measurements that fail are left out.
    """
    import ray
    import ray.train

    entry.quiet_libraries()
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    task: Task | None = ray.get(arguments["task"]) if "task" in arguments else None
    answer: dict[str, Any] = {}
    cache = BaseCache()
    with together.gloo_group(num_workers) as group:
        if "spec" in arguments:
            answer["trained"] = _trained(arguments, cache, rank, group, is_measured=task is not None)
        if task is not None:
            entry.log_as(STEP, rank=rank)
            device = ray.train.torch.get_device() if task.config.ray.use_gpu else torch.device("cpu")
            here = Worker(rank, num_workers, device)
            if "trained" in answer:
                task = task.of(TrainResult.model_validate(answer["trained"]))
            try:
                answer["measured"] = _as_plain(_measured_in_turn(task, cache, here, group))
            except FineloopError as exc:
                if "trained" not in answer:
                    raise
                logger.warning("measured again by other workers, as these could not: %s", exc)
    return answer if rank == 0 else {}


def _trained(
    arguments: Mapping[str, Any], cache: BaseCache, rank: int, group: "ProcessGroup | None", *, is_measured: bool
) -> Any:
    """The TrainResult, on every worker; a group that was lost after its training need not be repeated."""
    import ray

    stopwatch = arguments["stopwatch"]
    stopwatch.lap("workers start")
    spec = TrainSpec.model_validate_json(arguments["spec"])
    result = runs.find(Store.open(spec.registry), spec.run_id, TrainResult) if rank == 0 else None
    if result is None or result.began_at != stopwatch.began_at:
        result = None
    if (finished := together.from_rank_0(result and result.model_dump(mode="json"), group)) is not None:
        return finished
    # Passed as references: deserialising these objects imports more than the controller needs.
    tokens = tuple(ray.get([arguments["train_tokens"], arguments["eval_tokens"]]))
    trained = together.from_rank_0(train(spec, tokens, stopwatch, load=cache.load), group)
    if rank == 0:
        say("finetune", f"published {spec.adapter.name} {trained['version']} as {trained['version_uri']}")
        if is_measured:
            say("finetune", TRAINED)
    cache.strip()
    door.give_back()
    return trained


def _measured_in_turn(task: Task, cache: BaseCache, here: Worker, group: "ProcessGroup | None") -> ShardResult:
    """Measure the records and, where these do not decide, those in reserve."""
    if not task.config.ray.use_gpu:
        torch.set_num_threads(task.config.ray.cpus_per_worker)
        here = replace(here, kernels=cache.kernels or door.agree(task.config, task.base))
    result = _measured(task, task.records, task.probes, cache, here, group)
    if more := further(task.config, task.records, task.in_reserve, result):
        if here.rank == 0:
            say(STEP, f"{len(task.records)} records do not tell: {len(more)} more are drawn")
        result = merged([result, replace(_measured(task, more, NO_PROBES, cache, here, group), shares=[])])
    return result


def _measured(
    task: Task, records: Sequence[Record], probes: Probes, cache: BaseCache, here: Worker, group: "ProcessGroup | None"
) -> ShardResult:
    # At least two records in each: an answer is also scored after another record's prompt.
    num_shards = here.num_workers if task.together else max(1, min(here.num_workers, len(records) // 2))
    if here.rank == 0:
        names = ", ".join(contender.role for contender in task.contenders)
        workers = counted(num_shards, "worker") + (" that hold the base together" if task.together else "")
        say(STEP, f"{counted(len(records), 'record')} for {names} on {workers}")
    if task.together:
        return measure_shards(task.contenders, records, probes, here)
    mine = failure = None
    if here.rank < num_shards:
        shares = {key: probe.at(lambda count: range(here.rank, count, num_shards)) for key, probe in probes.items()}
        shard = records[here.rank :: num_shards]
        try:
            mine = _as_plain(
                measure_shard(task.contenders, shard, shares, shard_index=here.rank, kernels=here.kernels, cache=cache)
            )
        except FineloopError as exc:
            failure = [type(exc).__name__, str(exc)]
    results = together.all_gather([failure, mine], group) if group else [[failure, mine]]
    for told, _ in results:
        if told:
            raise errors.by_name(*told)
    return merged([from_plain(plain) for _, plain in results[:num_shards]])


def _as_plain(result: ShardResult) -> Any:
    return _PLAIN.dump_python(tuple(getattr(result, part.name) for part in fields(ShardResult)))


def from_plain(plain: Any) -> ShardResult:
    """The measurements in a group's answer, or in a worker's."""
    return ShardResult(*_PLAIN.validate_python(plain))


def measure_shards(
    contenders: Sequence[Contender], records: Sequence[Record], probes: Probes, worker: Worker
) -> ShardResult:
    """Measure every contender on all records and with all probes on a base that the workers shard; the same result on
    each. Every worker of a process group must call this: under ZeRO-3 every layer's forward pass is collective. Raises
    DataError: no record fits the context; JobError: a worker holds more than its share of the base."""
    zero.prepare_environment(use_gpu=contenders[-1].config.ray.use_gpu)
    with together.gloo_group(worker.num_workers) as group, local_contenders(contenders, records) as (kept, local):
        together.meet(group)  # bases and adapters are fetched, by each node at its own pace
        mine = _rows(len(kept), worker.rank, worker.num_workers)
        my_probes = {
            key: probe.at(partial(_rows, rank=worker.rank, num_workers=worker.num_workers))
            for key, probe in probes.items()
        }
        probed: dict[str, Findings] = {key: {} for key in probes}
        progress = Progress(2 * len(mine) * len(contenders), prints=worker.rank == 0)
        scores: dict[Role, list[Score]] = {}
        for contender in local:
            progress.role = contender.role
            with zero.sharding(contender.config, contender.dtype):
                model = contender.load_base(worker.kernels)
                if contender.adapter:
                    model = worker.kernels.adopt(build.load(model, contender.adapter))
                with zero.for_inference(model.eval(), contender.config, contender.dtype) as sharded:
                    scores[contender.role] = contender.scores(sharded, kept, mine, progress)
                    run_all(my_probes, contender.subject(sharded), probed)
        own = ShardResult(local[-1].answer_tokens, scores, [probed], progress.first_scored_at, worker.kernels.dtype)
        parts = [from_plain(plain) for plain in together.all_gather(_as_plain(own))]
    every: dict[Role, dict[int, Score]] = {role: {} for role in scores}
    for rank, part in enumerate(parts):
        rows = _rows(len(kept), rank, worker.num_workers)
        for role, of_shard in part.scores.items():
            every[role].update(zip(rows, of_shard, strict=True))
    whole = {role: [of_row[row] for row in sorted(of_row)] for role, of_row in every.items()}
    return replace(own, scores=whole, shares=[share for part in parts for share in part.shares])


def _rows(count: int, rank: int, num_workers: int) -> list[int]:
    """A worker's rows, as many for each worker, since all take part in every batch; rows repeat to fill up."""
    dealt = np.resize(np.arange(count), -(-count // num_workers) * num_workers)
    return list(dealt[rank::num_workers].tolist())
