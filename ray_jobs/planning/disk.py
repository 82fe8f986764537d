"""How much disk a pod needs: Kubernetes evicts a pod that writes more than `ray.cluster.disk_gib`."""

from typing import TYPE_CHECKING

from components.config.methods import OWN_BASE
from components.config.ray import RayJobCluster
from components.config.schema import RunConfig
from ray_jobs.planning.memory import BF16
from ray_jobs.planning.rehearsal import ModelStats

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPTIMIZER = 12
"""Bytes per trained parameter in a checkpoint: float32 master weight and moments."""
FOUR_BITS = 0.6
"""Bytes per parameter, scales included, of a base that the run makes (OWN_BASE), if all of it were quantised."""


def disk_bytes(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> int | None:
    """Disk that a pod needs, the larger of home (the base) and /tmp (a checkpoint of the pod's workers).

    None where no pod is created, or where the base is stored quantised, so that its size is unknown.
    """
    cluster = config.ray.cluster
    if not isinstance(cluster, RayJobCluster) or getattr(base, "quantization_config", None):
        return None
    each = getattr(base.dtype, "itemsize", BF16) + FOUR_BITS * (config.method.row.init in OWN_BASE)
    parts = 1 if config.train.zero_stage else config.ray.max_workers // cluster.pods(config.ray.max_workers)
    return max(round(each * stats.parameters), OPTIMIZER * stats.trainable * parts)


def require_disk(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> None:
    """Check a pod's disk before any worker downloads; sizes that a file listing gives are checked before pods start.

    Raises:
        ConfigError: a pod's disk is too small.
    """
    needed, cluster = disk_bytes(config, base, stats), config.ray.cluster
    if needed and isinstance(cluster, RayJobCluster):
        cluster.require_disk(config.model.base, needed)
