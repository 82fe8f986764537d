"""Configs whose registry is a test's own store, and versions in it."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.config import config_file
from components.config.schema import RunConfig
from components.store.store import Store

if TYPE_CHECKING:
    from components.registry.versions import Version
    from ray_jobs.base.base_model import Base


def in_store(config: RunConfig, store: Store, *changes: str) -> RunConfig:
    """The config with some keys changed, that writes to this store."""
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    return config_file.loads(config_file.dumps(config), [*place, *changes])


def stood(config: RunConfig, store: Store) -> "Base":
    """What an adapter stands on, which is made if it is not there."""
    from ray_jobs.adapters import own_base
    from ray_jobs.base import base_model

    return own_base.prepare(config, base_model.resolve(config.model), store)


def published(
    config: RunConfig, store: Store, *, moved: float = 1.0, start: "Version | None" = None, told: Any = None
) -> "Version":
    """A version whose every weight was moved, by a worker that was told that identity of the base."""
    import torch

    from components.registry import lineage
    from ray_jobs.adapters import dora
    from ray_jobs.base import base_model
    from ray_jobs.training import checkpoint, opening, publishing
    from ray_jobs.training.train_loop import TrainedAdapter
    from ray_jobs.training.zero import Worker
    from tests.models.spec import spec_of

    base = base_model.resolve(config.model)
    adapted = opening.assemble(config, base, use_gpu=False)
    dora.settle(adapted)
    with torch.no_grad():
        for parameter in checkpoint.trainable(adapted).values():
            parameter.add_(moved)
    one = Worker(0, 1, torch.device("cpu"))
    spec = spec_of(config, run_id="earlier", base=lineage.Base(config.model.base, told or base.identity), start=start)
    outcome = TrainedAdapter({}, checkpoint.TrainingProgress(config.digest, 1, step=1), stopped_early=False)
    recipe = publishing.recipe_of(config, adapted, base, base, one)
    return publishing.publish(
        spec, store, publishing.Fitted(adapted, outcome, recipe, base), one, started_at=datetime.now(UTC)
    )
