"""Distributing an evaluation's measurements: over workers that each hold the base, or a group that shards it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records import runs
from components.records.steps import Role, TaskScore
from components.shared.errors import FineloopError, JobError
from components.shared.protocol import counted, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build
from ray_jobs.base import base_model, together
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.probes import texts
from ray_jobs.scoring import STEP
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import (
    NO_PROBES,
    Contender,
    Findings,
    Found,
    Probes,
    Progress,
    ShardResult,
    answer_tokens,
    local_contenders,
    measure_shard,
    run_all,
)
from ray_jobs.training import zero
from ray_jobs.training.job import Standby
from ray_jobs.training.zero import Worker


def measured_apart(
    config: RunConfig,
    base: base_model.Base,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    kernels: Kernels | None = None,
    standby: Standby | None = None,
) -> Found:
    """Measure shares of records and probes on several workers, each of which holds the whole base.

    These are the training's workers if they are still there, and Ray tasks otherwise.
    """
    import ray

    # At least two records in each: an answer is also scored after another record's prompt.
    num_shards = max(1, min(config.ray.max_workers, len(records) // 2))
    say(STEP, f"{counted(len(records), 'record')} for {_names(contenders)} on {counted(num_shards, 'worker')}")
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
            held_with, *_ = [held_with for held_with, _ in results]
            return Found.of(held_with, shards, [result for _, result in results])
        say(STEP, "the training's workers are gone: others take their place")
    resources = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": int(config.ray.use_gpu)}
    task = ray.remote(max_retries=1, **resources)(measure_shard)
    try:
        kernels = kernels or _kernels(config, base, num_shards, resources)
        results = ray.get([task.remote(**share, kernels=kernels) for share in shares])
    except ray.exceptions.RayTaskError as exc:
        raise (
            exc.cause if isinstance(exc.cause, FineloopError) else JobError(f"an evaluation task failed: {exc.cause}")
        ) from exc
    return Found.of(kernels, shards, results)


def measured_together(
    config: RunConfig,
    base: base_model.Base,
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    store: Store,
    run_id: str,
    kernels: Kernels | None = None,
    name: str = runs.RAY_EVALUATE,
) -> Found:
    """Measure all records on a group of workers, which shard the base as in training."""
    from ray_jobs.training import trainer

    workers = f"{config.ray.max_workers} workers that hold the base together"
    say(STEP, f"{counted(len(records), 'record')} for {_names(contenders)} on {workers}")
    resources = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": int(config.ray.use_gpu)}
    name = name if kernels is None else f"{name}-more"
    kernels = kernels or _kernels(config, base, config.ray.max_workers, resources)
    arguments = {"contenders": contenders, "records": records, "probes": probes, "kernels": kernels}
    answer = trainer.run(run_group, arguments, config, store, run_id=run_id, name=name, max_failures=0)
    return Found.of(kernels, [records], [answer["result"]])


def _names(contenders: Sequence[Contender]) -> str:
    return ", ".join(contender.role for contender in contenders)


def _dealt(index: int, of: int, count: int) -> range:
    """A worker's rows out of `count`: every `of`-th, starting at `index`."""
    return range(index, count, of)


def _kernels(config: RunConfig, base: base_model.Base, num_workers: int, resources: Mapping[str, int]) -> Kernels:
    """The kernels of every task: measured where the tasks run, with the slowest rate for each dtype."""
    import ray

    if config.ray.use_gpu:
        return PLAIN
    if fixed := door.fixed(config):
        return fixed
    shape = door.typical_shape(base_model.load_config(base.path, config.model))
    measure = ray.remote(max_retries=1, **resources)(_rates)
    measured = [measure.remote(shape, num_threads=config.ray.cpus_per_worker) for _ in range(num_workers)]
    return Kernels(door.slowest(ray.get(measured)).faster)


def _rates(shape: tuple[int, int], *, num_threads: int) -> door.Rates:
    """Measure this worker's rates; runs as a Ray task, whose warm process the measurement then reuses."""
    import torch

    entry.quiet_libraries()
    torch.set_num_threads(num_threads)
    return door.measure(shape)


# Measuring models on a base that no single worker can hold: the workers shard it, as in training.
#
# All workers take the same steps: under ZeRO-3 every layer's forward pass is a collective operation.

Finding = texts.Read | dict[str, list[str]] | tuple[TaskScore, ...]
"""What the probes find of a model."""


def run_group(arguments: dict[str, Any]) -> dict[str, Any]:
    """The function for Ray Train. On rank 0, returns the results of all records."""
    import ray.train

    contenders: Sequence[Contender] = arguments["contenders"]
    config = contenders[-1].config
    entry.quiet_libraries()
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if config.ray.use_gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, kernels=arguments["kernels"])
    result = measure_shards(contenders, arguments["records"], arguments["probes"], worker)
    return {"result": result} if worker.rank == 0 else {}


def measure_shards(
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes,
    worker: Worker,
) -> ShardResult:
    """Measure every contender on all records and with all probes, which the workers share; the same result on each.

    Call it on every worker of a process group.

    Raises:
        DataError: no record fits the context.
        JobError: a worker holds more than its share of the base.
    """
    config = contenders[-1].config
    zero.prepare_environment(use_gpu=config.ray.use_gpu)
    if not config.ray.use_gpu:
        torch.set_num_threads(config.ray.cpus_per_worker)
    with together.gloo_group(worker.num_workers) as group, local_contenders(contenders, records) as (kept, local):
        together.meet(group)  # bases and adapters are fetched, by each node at its own pace
        mine = _own_rows(len(kept), worker)
        my_probes = {key: probe.at(lambda count: _own_rows(count, worker)) for key, probe in probes.items()}
        probed: dict[str, Findings] = {key: {} for key in probes}
        progress = Progress(2 * len(mine) * len(contenders), prints=worker.rank == 0)
        scores: dict[Role, list[Score]] = {}
        for each in local:
            progress.role = each.role
            with zero.sharding(each.config, each.dtype):
                model = each.load_base(worker.kernels, in_host_memory=True)
                if each.adapter:
                    model = worker.kernels.adopt(build.load(model, each.adapter))
                with zero.for_inference(model.eval(), each.config, each.dtype) as sharded:
                    found = each.scores(sharded, kept, mine, progress)
                    run_all(my_probes, each.subject(sharded), probed)
            scores[each.role] = _gathered(mine, found)
        shares = _all_gather(dict[str, dict[Role, Finding]], probed)
        return ShardResult(answer_tokens(local), scores, shares, progress.first_scored_at)


def _own_rows(count: int, worker: Worker) -> list[int]:
    """A worker's rows, as many for each worker, since all take part in every batch; rows repeat to fill up."""
    dealt = np.resize(np.arange(count), -(-count // worker.num_workers) * worker.num_workers)
    rows: list[int] = dealt[worker.rank :: worker.num_workers].tolist()
    return rows


def _gathered(rows: Sequence[int], found: Sequence[Score]) -> list[Score]:
    """All workers' scores, in the order of the rows."""
    parts = _all_gather(dict[int, Score], dict(zip(rows, found, strict=True)))
    every = {row: value for part in parts for row, value in part.items()}
    return [every[row] for row in sorted(every)]


def _all_gather(kind: Any, value: Any) -> list[Any]:
    """The value of each worker, of a type that pydantic knows."""
    adapter = TypeAdapter(kind)
    return [adapter.validate_python(each) for each in together.all_gather(adapter.dump_python(value))]
