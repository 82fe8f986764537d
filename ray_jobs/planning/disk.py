"""What a pod's disk has to hold: its node evicts a pod that writes more than `ray.cluster.disk_gib`."""

from typing import TYPE_CHECKING

from components.config.methods import OWN_BASE
from components.config.ray import RayJobCluster
from components.config.schema import RunConfig
from ray_jobs.planning.memory import BF16
from ray_jobs.planning.rehearsal import ModelStats

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPTIMIZER = 12
"""Bytes of a trained weight in a checkpoint: float32 master and moments."""
FOUR_BITS = 0.6
"""Bytes of a weight of a base that a method makes for itself, scales included, if all of it were quantised."""


def disk_bytes(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> int | None:
    """The larger of what home and /tmp hold: the base, and a checkpoint of a pod's workers.

    None where no pod is made, or the base is stored in few bits, so that nobody knows its size.
    """
    cluster = config.ray.cluster
    if not isinstance(cluster, RayJobCluster) or getattr(base, "quantization_config", None):
        return None
    each = getattr(base.dtype, "itemsize", BF16) + FOUR_BITS * (config.method.row.init in OWN_BASE)
    parts = 1 if config.train.zero_stage else config.ray.max_workers // cluster.pods(config.ray.max_workers)
    return max(round(each * stats.parameters), OPTIMIZER * stats.trainable * parts)


def require_disk(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> None:
    """Before any worker downloads; what a listing says of a base is asked before there are pods.

    Raises:
        ConfigError: a pod's disk does not hold it.
    """
    needed, cluster = disk_bytes(config, base, stats), config.ray.cluster
    if needed and isinstance(cluster, RayJobCluster):
        cluster.require_disk(config.model.base, needed)
