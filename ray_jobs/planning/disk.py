"""What a pod's disk has to hold: its node evicts a pod that writes more than `ray.cluster.disk_gib`."""

from typing import TYPE_CHECKING

from components.config.methods import OWN_BASE
from components.config.ray import RayJobCluster
from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from ray_jobs.planning.memory import BF16, GIB
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
    """Before any pod downloads.

    Raises:
        ConfigError: a pod's disk does not hold it.
    """
    needed, cluster = disk_bytes(config, base, stats), config.ray.cluster
    if needed and isinstance(cluster, RayJobCluster) and needed > cluster.disk_gib * GIB:
        raise ConfigError(
            f"each pod downloads {config.model.base} and writes {needed / GIB:.0f} GiB to its disk, and "
            f"ray.cluster.disk_gib is {cluster.disk_gib}, beyond which it is evicted: set ray.cluster.disk_gib="
            f"{-(-needed * 5 // (4 * GIB))}"
        )
