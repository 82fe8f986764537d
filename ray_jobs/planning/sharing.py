"""Whether the workers of an evaluation shard the base, as training does under ZeRO-3."""

from collections.abc import Iterable, Mapping
from typing import Any

from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from ray_jobs.base import base_config, base_model


def is_shared(config: RunConfig, base: base_model.Base, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one worker cannot hold the base. A base that cannot be planned for is sharded as in its training."""
    from ray_jobs.planning.capacity import cluster_device, must_be_shared
    from ray_jobs.planning.rehearsal import Rehearsal
    from ray_jobs.planning.rehearsing import CannotRehearse, rehearsing

    if config.train.zero_stage < 3:
        return False
    try:
        with rehearsing():
            shape = base_config.load(base.path, config.model)
            rehearsal = Rehearsal(shape, config.method, reference=config.model.base, use_gpu=config.ray.use_gpu)
    except (CannotRehearse, ConfigError):
        return True
    return must_be_shared(config, rehearsal, cluster_device(config, nodes))
