"""Device placement of a base in one process: across all GPUs of the machine, or on the CPU if they are too small."""

from components.config.schema import RunConfig
from components.shared.errors import ConfigError, UserError
from components.shared.memory import machine_bytes
from ray_jobs.base import base_config
from ray_jobs.base.base_model import Base
from ray_jobs.planning.capacity import BASE_SHARE
from ray_jobs.planning.memory import FLOAT32, GIB, Sharing, weight_bytes
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal


def on_gpus(config: RunConfig, base: Base) -> bool:
    """Whether the machine's GPUs together hold a version's base, with room for activations; False without GPUs.

    For a base that cannot be planned for, the GPUs are tried.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    free = sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    stats = _stats(config, base)
    return stats is None or weight_bytes(stats, config.method.row.base, Sharing(1, 0)) <= BASE_SHARE * free


def require_float32(config: RunConfig, base: Base) -> None:
    """Raise UserError where a version's base in float32 needs more than the machine's memory."""
    stats, memory = _stats(config, base), machine_bytes()
    if stats and FLOAT32 * stats.parameters > memory:
        raise UserError(
            f"a version is written in another form in float32, in which {base.reference} takes "
            f"{FLOAT32 * stats.parameters / GIB:.0f} GiB, and this machine has {memory / GIB:.0f}: do it on one with "
            "more memory"
        )


def _stats(config: RunConfig, base: Base) -> ModelStats | None:
    """The base's statistics; None if it cannot be planned for, or not as another release trained on it."""
    try:
        shape = base_config.load(base.path, config.model)
        return Rehearsal(shape, config.method, reference=base.reference).stats
    except (ConfigError, RuntimeError, TypeError, ValueError, AttributeError):
        return None
