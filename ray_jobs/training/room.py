"""Waiting for the workers' resources: those that the cluster has, or those that its autoscaler can add.

A cluster that was created for the job has workers for it, or will have: after the loss of a head node they return later
than the driver, and what an autoscaler reports meanwhile is ignored.

Any other cluster can grow if its autoscaler, version 2, reports its state to the GCS (KubeRay runs one beside a head if
the RayCluster enables it): ray.autoscaler.v2.monitor.AutoscalerMonitor reports it, ray.autoscaler.v2.sdk reads it.
The GCS knows the cluster's maximum size only where a platform reports it; Ray Train compares with that. Otherwise a
placement group is a demand to the autoscaler, which it either fulfils or reports as infeasible.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from components.config.ray import Cluster
from components.config.schema import RunConfig
from components.shared.errors import ConfigError, WorkersMissing

POLL_S = 1.0
STABLE_S = 60.0
"""Seconds for which an autoscaler must keep reporting that it cannot grow enough: after the loss of a head, nodes may
still be reconnecting."""
CALL_S = 10


def has_room(per_worker: Mapping[str, float], num_workers: int) -> bool:
    """Whether the cluster's total resources suffice for all workers, whatever else runs there now."""
    import ray

    return _short_of(_needed(per_worker, num_workers), ray.cluster_resources()) is None


def workers_with_room(config: RunConfig) -> int:
    """The largest number of elastic workers for which the cluster's total resources suffice, including those that
    others use now; at least ray.min_workers, which without elasticity means all workers."""
    numbers = range(config.ray.max_workers, config.ray.min_workers, -1)
    return next((each for each in numbers if has_room(config.ray.per_worker, each)), config.ray.min_workers)


def wait_for_room(
    cluster: Cluster, per_worker: Mapping[str, float], num_workers: int, log: Callable[[str], None]
) -> None:
    """Wait until the cluster has resources for all workers at the same time; returns at once if its size suffices.

    Raises:
        ConfigError: the cluster is too small, and does not grow or cannot grow enough.
        WorkersMissing: it was created for the job, and its workers do not appear.
    """
    import ray

    needed = _needed(per_worker, num_workers)
    if cluster.pre_running_timeout_s is not None:
        wait_for_own(needed, ray.cluster_resources, cluster.pre_running_timeout_s, log)
    else:
        _wait_for_growth(per_worker, num_workers, needed, log)


def wait_for_own(
    needed: Mapping[str, float],
    resources: Callable[[], Mapping[str, float]],
    patience_s: float,
    log: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait for the workers of a cluster that was created for the job.

    Raises:
        WorkersMissing: they did not appear within `patience_s`, the time that nodes, images and pods may take.
    """
    began, said = clock(), False
    while name := _short_of(needed, has := resources()):
        what = f"the cluster has {has.get(name, 0):g} of {needed[name]:g} {name}s"
        if clock() - began > patience_s:
            raise WorkersMissing(
                f"{what} after ray.cluster.pre_running_timeout_s = {patience_s:g} s: its workers are missing; "
                "kubectl describe pods says what they wait for"
            )
        if not said:
            log(f"{what}: waiting for its workers")
        said = True
        sleep(POLL_S)


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
            said, before = _autoscaling_state(), has
            has = ray.cluster_resources()
            # Resources that others hold may become free, and the report may be older than their release.
            if said is None or has != before or not _is_infeasible(group.id.hex(), said) or _is_busy(name):
                refused.clear()
                since = time.monotonic()
                continue
            refused.add(said.last_seen_cluster_resource_state_version)
            if len(refused) > 1 and time.monotonic() - since > STABLE_S:
                raise _too_small(
                    name, needed, f"its autoscaler cannot add enough to the {has.get(name, 0):g} there are"
                )
    finally:
        remove_placement_group(group)


def _needed(per_worker: Mapping[str, float], num_workers: int) -> dict[str, float]:
    return {name: each * num_workers for name, each in per_worker.items()}


def _short_of(needed: Mapping[str, float], limit: Mapping[str, float]) -> str | None:
    return next((name for name, count in needed.items() if count > limit.get(name, 0)), None)


def _too_small(name: str, needed: Mapping[str, float], why: str) -> ConfigError:
    is_one = needed[name] == 1
    ways = [*(() if is_one else ("lower ray.num_workers",)), *(("set ray.use_gpu=false",) if name == "GPU" else ())]
    asked = f"{needed[name]:g} {name}{'' if is_one else 's'}"
    return ConfigError(
        f"ray.num_workers asks for {asked} and {why}: {', or '.join([*ways, 'train on a larger cluster'])}"
    )


def _autoscaling_state() -> Any:
    """The autoscaler's latest AutoscalingState; None where no autoscaler reports one."""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status(timeout_s=CALL_S))
    return reply.autoscaling_state if reply.HasField("autoscaling_state") else None


def _is_infeasible(group_id: str, said: Any) -> bool:
    # For a placement group the autoscaler's details read "ID:STRATEGY|STATE".
    return any(each.details.startswith(group_id) for each in said.infeasible_gang_resource_requests)


def _is_busy(name: str) -> bool:
    import ray

    return bool(ray.available_resources().get(name, 0) < ray.cluster_resources().get(name, 0))
