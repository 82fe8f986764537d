"""Running one function on every worker of a Ray Train group, and returning rank 0's result.

Workers may start before their driver knows what they are to do, and import what they need while it reads the data.
If one raises while the others wait for it in a collective operation, all of them end: Ray Train's controller notices
within a second and kills the group. It then starts another group, at most `max_failures` times, except for errors for
which `is_mistake` is true.
"""

import asyncio
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from components.config.ray import COLLECTIVE_TIMEOUT_S, PRE_RUNNING_TIMEOUT_S, Cluster, RayConfig
from components.config.schema import RunConfig
from components.records import runs
from components.shared import garbage
from components.shared.errors import ConfigError, JobError, UserError, WorkersMissing
from components.shared.machine import ran_low
from components.shared.protocol import counted
from components.store.store import Store
from ray_jobs import entry

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import ShardResult
    from ray_jobs.training.measuring import Task

RESIZE_EVERY_S = 60.0  # between checks for room for more workers, which start from the newest checkpoint
Work = Callable[[Mapping[str, Any]], dict[str, Any]]


def work(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`ray_jobs.training.measuring.work`: Ray Train's controller imports this module, and no model code with it."""
    import ray

    with garbage.importing():
        from ray_jobs.training import measuring
    if "orders" in arguments:
        orders = ray.get(arguments["orders"].take.remote())
        if not orders:
            return {}
        arguments = ray.get(orders[0])
    return measuring.work(arguments)


class Orders:
    """An actor with a reference to the arguments of workers that wait for them; none if there is nothing to do."""

    def __init__(self) -> None:
        self._orders: list[Any] = []
        self._are_given = asyncio.Event()

    async def give(self, orders: list[Any]) -> None:
        self._orders = orders
        self._are_given.set()

    async def take(self) -> list[Any]:
        await self._are_given.wait()
        return self._orders


def training(workers: RayConfig, store: Store, run_id: str) -> Work:
    """What runs a run's training on workers that start with it. Raises as `run` does."""
    return partial(run, work, workers=workers, store=store, run_id=run_id, max_failures=workers.max_failures)


@contextmanager
def started(workers: RayConfig, store: Store, run_id: str) -> Iterator[Work]:
    """`training` on workers that start now, where the cluster has room for all of them and no GPU that others could use
    meanwhile; elsewhere on workers that start with it. If the block ends before it has run, they end with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    train = training(workers, store, run_id)
    entry.connect()
    shares_gpus = workers.use_gpu and workers.cluster.has_address
    if shares_gpus or _short_of(_needed(workers.per_worker, workers.max_workers), ray.cluster_resources()):
        yield train
        return
    with garbage.importing():  # before the thread: of two that import torch, one might see half of it
        import ray.train.torch
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    orders = ray.remote(num_cpus=0, scheduling_strategy=here)(Orders).remote()
    answer: Future[dict[str, Any]] = Future()

    def wait() -> None:
        try:
            answer.set_result(train({"orders": orders}))
        except BaseException as exc:  # raised where the driver asks for the answer
            answer.set_exception(exc)

    def give(arguments: Mapping[str, Any]) -> dict[str, Any]:
        orders.give.remote([ray.put(arguments)])
        return answer.result()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield give
    finally:
        orders.give.remote([])


def measured(task: "Task", store: Store, *, run_id: str, name: str = runs.RAY_EVALUATE) -> "ShardResult":
    """What a group of workers of its own measures; raises as `run` does."""
    import ray

    from ray_jobs.training.measuring import from_plain

    answer = run(work, {"task": ray.put(task)}, task.config.ray, store, run_id=run_id, name=name, max_failures=1)
    return from_plain(answer["measured"])


def run(
    function: Work,
    arguments: Mapping[str, Any],
    workers: RayConfig,
    store: Store,
    *,
    run_id: str,
    name: str = "ray",
    max_failures: int,
) -> dict[str, Any]:
    """Run the function on all workers, restarting after at most `max_failures` failures, or when a node is preempted.

    `name` is Ray's folder within the run's folder. Raises UserError: the user's mistake, as raised by the first worker
    that met it; JobError: the workers failed for another reason.
    """
    from ray.exceptions import OutOfMemoryError
    from ray.train import FailureConfig, ScalingConfig, UserCallback
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    class EndsAtMistake(UserCallback):
        """Called by the controller at each failure; an error that it raises is not retried."""

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            # A worker that lost its connection to the worker with the mistake may have failed as well.
            for _, exc in sorted(worker_exceptions.items()):
                if is_mistake(exc):
                    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # the controller ends with this error
                    raise exc

    most = workers.max_workers
    # The patch prints and logs what a worker prints: every line would appear twice.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    trainer = TorchTrainer(
        partial(_saying_mistakes_once, function),
        train_loop_config=dict(arguments),
        torch_config=_torch_config(backend="nccl" if workers.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, most) if workers.is_elastic else most,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.per_worker,
        ),
        run_config=RayRunConfig(
            name=name,
            storage_path=store.uri(runs.key_of(store, run_id, name)).removesuffix(f"/{name}"),
            failure_config=FailureConfig(max_failures=max_failures, max_preemption_failures=-1),  # without a limit
            callbacks=[EndsAtMistake()],
        ),
    )
    try:
        answer: dict[str, Any] = trainer.fit().return_value or {}
    except ControllerError as exc:
        if is_mistake(exc.controller_failure):
            raise exc.controller_failure from None
        why, cause = str(exc.controller_failure), exc
    except (OutOfMemoryError, TrainingFailedError) as exc:  # the first is raised by the controller itself
        failures = sorted((getattr(exc, "worker_failures", None) or {}).items())
        why, cause = f"rank {failures[0][0]}: {failures[0][1]}".strip() if failures else str(exc), exc
    else:
        return answer
    raise JobError(f"the workers failed: {ran_low(why) or why}") from cause


def _torch_config(**settings: Any) -> Any:
    """Ray Train's own TorchConfig, but for workers that all run on one node.

    torch's store, through which workers find each other, listens on every interface and asks for no password, even
    where its address is 127.0.0.1. On one node they meet in a file that no other user may open, and connect by the
    loopback interface alone.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

    class Backend(_TorchBackend):
        folder: str | None = None

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            nodes = worker_group.execute(lambda: ray.get_runtime_context().get_node_id())
            if len({*nodes}) > 1:
                super().on_start(worker_group, backend_config)
                return
            worker_group.execute(_stay_on_loopback)
            worker_group.execute(_set_torch_distributed_env_vars)
            self.folder = worker_group.execute_single(0, tempfile.mkdtemp, prefix="fineloop-group-")
            group = {"init_method": f"file://{self.folder}/store", "timeout_s": backend_config.timeout_s}
            group |= {"backend": backend_config.backend, "world_size": len(nodes)}
            meet, ranks = worker_group.execute_single_async, range(len(nodes))
            ray.get([meet(rank, _setup_torch_process_group, world_rank=rank, **group) for rank in ranks])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            try:
                super().on_shutdown(worker_group, backend_config)
            finally:
                if self.folder:
                    shutil.rmtree(self.folder, ignore_errors=True)  # where the controller runs on that node too

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config(**settings)


def _stay_on_loopback() -> None:
    """Have gloo and NCCL connect this process by the loopback interface, unless the environment names another."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)


def is_mistake(exc: BaseException) -> bool:
    """Whether restarting the workers cannot fix the error."""
    return isinstance(exc, (UserError, JobError))


def _saying_mistakes_once(function: Work, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Run the function in a worker, without Ray Train's log of a mistake's stack: the driver reports it in one line."""
    try:
        return function(arguments)
    except (UserError, JobError):
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


# Waiting for the workers' resources: those that the cluster has, or those that its autoscaler can add.
#
# A cluster that was created for the job has workers for it, or will have: after the loss of a head node they return
# later than the driver, and what an autoscaler reports meanwhile is ignored.
#
# Any other cluster can grow if its autoscaler, version 2, reports its state to the GCS (KubeRay runs one if the
# RayCluster enables it). The GCS knows the cluster's maximum size only where a platform reports it. Otherwise a
# placement group is a demand to the autoscaler, which it either fulfils or reports as infeasible.

POLL_S = 1.0
STABLE_S = 60.0
"""Seconds for which an autoscaler must keep reporting that it cannot grow enough: after the loss of a head, nodes may
still be reconnecting."""


def on_the_cluster(config: RunConfig, log: Callable[[str], None]) -> RunConfig:
    """The config for as many workers as the cluster has room for, once it has room for the fewest; raises as
    `wait_for_room` does."""
    entry.connect()
    wait_for_room(config.ray.cluster, config.ray.per_worker, config.ray.min_workers, log)
    return config.on(workers_with_room(config))


def workers_with_room(config: RunConfig) -> int:
    """The largest number of elastic workers for which the cluster's total resources suffice, including those that
    others use now; at least ray.min_workers, which without elasticity means all workers."""
    import ray

    numbers = range(config.ray.max_workers, config.ray.min_workers, -1)
    has = ray.cluster_resources() if numbers else {}
    fitting = (count for count in numbers if _short_of(_needed(config.ray.per_worker, count), has) is None)
    return next(fitting, config.ray.min_workers)


def wait_for_room(
    cluster: Cluster, per_worker: Mapping[str, float], num_workers: int, log: Callable[[str], None]
) -> None:
    """Wait until the cluster has resources for all workers at the same time; returns at once if its size suffices.
    Raises ConfigError: the cluster is too small, and does not grow or cannot grow enough; WorkersMissing: it was
    created for the job, and its workers do not appear."""
    import ray

    needed = _needed(per_worker, num_workers)
    if cluster.has_address:
        _wait_for_growth(per_worker, num_workers, needed, log)
    else:
        wait_for_own(needed, ray.cluster_resources, PRE_RUNNING_TIMEOUT_S, log)


def wait_for_own(
    needed: Mapping[str, float],
    resources: Callable[[], Mapping[str, float]],
    patience_s: float,
    log: Callable[[str], None],
) -> None:
    """Wait for the workers of a cluster that was created for the job, as long as nodes, images and pods may take.
    Raises WorkersMissing: they did not appear within `patience_s`."""
    began, is_logged = time.monotonic(), False
    while name := _short_of(needed, has := resources()):
        what = f"the cluster has {has.get(name, 0):g} of {needed[name]:g} {name}s"
        if time.monotonic() - began > patience_s:
            raise WorkersMissing(
                f"{what} after {patience_s:g} s: its workers are missing; kubectl describe pods says what they wait for"
            )
        if not is_logged:
            log(f"{what}: waiting for its workers")
        is_logged = True
        time.sleep(POLL_S)


def _wait_for_growth(
    per_worker: Mapping[str, float], num_workers: int, needed: Mapping[str, float], log: Callable[[str], None]
) -> None:
    import ray
    from ray._private.state import state
    from ray.util.placement_group import placement_group, remove_placement_group

    has = ray.cluster_resources()
    if (name := _short_of(needed, has)) is None:
        return
    if _autoscaling_state() is None:
        raise _too_small(name, needed, f"the whole cluster has {has.get(name, 0):g}")
    most = state.get_max_resources_from_cluster_config()
    if most and (scarce := _short_of(needed, most)):
        raise _too_small(scarce, needed, f"the cluster grows to {most.get(scarce, 0):g} at most")
    log(f"the cluster has {has.get(name, 0):g} of {needed[name]:g} {name}s: waiting for it to grow")
    group = placement_group([dict(per_worker)] * num_workers)
    refused: set[int] = set()
    since = time.monotonic()
    try:
        while not group.wait(POLL_S):
            report, before = _autoscaling_state(), has
            has = ray.cluster_resources()
            # Resources that others hold may become free, and the report may be older than their release.
            is_busy = ray.available_resources().get(name, 0) < has.get(name, 0)
            # For a placement group the autoscaler's details read "ID:STRATEGY|STATE".
            infeasible = [request.details for request in report.infeasible_gang_resource_requests] if report else []
            if has != before or is_busy or not any(details.startswith(group.id.hex()) for details in infeasible):
                refused.clear()
                since = time.monotonic()
                continue
            refused.add(report.last_seen_cluster_resource_state_version)
            if len(refused) > 1 and time.monotonic() - since > STABLE_S:
                raise _too_small(
                    name, needed, f"its autoscaler cannot add enough to the {has.get(name, 0):g} there are"
                )
    finally:
        remove_placement_group(group)


def _needed(per_worker: Mapping[str, float], num_workers: int) -> dict[str, float]:
    return {name: amount * num_workers for name, amount in per_worker.items()}


def _short_of(needed: Mapping[str, float], limit: Mapping[str, float]) -> str | None:
    return next((name for name, count in needed.items() if count > limit.get(name, 0)), None)


def _too_small(name: str, needed: Mapping[str, float], why: str) -> ConfigError:
    ways = ["lower ray.num_workers"] if needed[name] > 1 else []
    ways += ["set ray.use_gpu=false"] if name == "GPU" else []
    amount = counted(int(needed[name]), name)
    return ConfigError(
        f"ray.num_workers asks for {amount} and {why}: {', or '.join([*ways, 'train on a larger cluster'])}"
    )


def _autoscaling_state() -> Any:
    """The autoscaler's latest AutoscalingState; None where no autoscaler reports one."""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state if reply.HasField("autoscaling_state") else None
