"""Distributing an evaluation's measurements: over workers that each hold the base, or a group that shards it."""

from collections.abc import Mapping, Sequence
from functools import partial

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records import runs
from components.shared.errors import FineloopError, JobError
from components.shared.protocol import counted, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.base import base_config, base_model
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.scoring import STEP
from ray_jobs.scoring.measure import NO_PROBES, Contender, Found, Probes, measure_shard
from ray_jobs.training.standby import Standby


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
    from ray_jobs.training import measure_together, trainer

    workers = f"{config.ray.max_workers} workers that hold the base together"
    say(STEP, f"{counted(len(records), 'record')} for {_names(contenders)} on {workers}")
    resources = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": int(config.ray.use_gpu)}
    name = name if kernels is None else f"{name}-more"
    kernels = kernels or _kernels(config, base, config.ray.max_workers, resources)
    arguments = {"contenders": contenders, "records": records, "probes": probes, "kernels": kernels}
    answer = trainer.run(measure_together.run, arguments, config, store, run_id=run_id, name=name, max_failures=0)
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
    shape = door.typical_shape(base_config.load(base.path, config.model))
    measure = ray.remote(max_retries=1, **resources)(_rates)
    measured = [measure.remote(shape, num_threads=config.ray.cpus_per_worker) for _ in range(num_workers)]
    return Kernels(door.slowest(ray.get(measured)).faster)


def _rates(shape: tuple[int, int], *, num_threads: int) -> door.Rates:
    """Measure this worker's rates; runs as a Ray task, whose warm process the measurement then reuses."""
    import torch

    entry.quiet_libraries()
    torch.set_num_threads(num_threads)
    return door.measure(shape)
