"""Measuring models on a base that no single worker can hold: the workers shard it, as in training.

All workers take the same steps: under ZeRO-3 every layer's forward pass is a collective operation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from components.prepare.dataset import Record
from components.records.steps import Role, TaskScore
from ray_jobs import entry
from ray_jobs.adapters import build
from ray_jobs.base import together
from ray_jobs.probes import texts
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import (
    Contender,
    Findings,
    Probes,
    Progress,
    ShardResult,
    answer_tokens,
    local_contenders,
    run_all,
)
from ray_jobs.training import zero
from ray_jobs.training.group import Worker

Finding = texts.Read | dict[str, list[str]] | tuple[TaskScore, ...]
"""What the probes find of a model."""


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """The function for Ray Train. On rank 0, returns the results of all records."""
    import ray.train

    contenders: Sequence[Contender] = arguments["contenders"]
    config = contenders[-1].config
    entry.quiet_libraries()
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if config.ray.use_gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, kernels=arguments["kernels"])
    result = measure_together(contenders, arguments["records"], arguments["probes"], worker)
    return {"result": result} if worker.rank == 0 else {}


def measure_together(
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
        mine = _dealt(len(kept), worker)
        my_probes = {key: probe.at(lambda count: _dealt(count, worker)) for key, probe in probes.items()}
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


def _dealt(count: int, worker: Worker) -> list[int]:
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
