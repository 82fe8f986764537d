"""Configs with some keys changed, and the spec of a training by one, for tests that have no driver."""

from typing import Any

from components.config import config_file
from components.config.schema import RunConfig


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    return config_file.loads(config_file.dumps(config), overrides)


def spec_of(config: Any, **resolved: Any) -> Any:
    """A TrainSpec of a dataset that is nowhere, on a base of no identity, but for what is `resolved`."""
    from components.registry import lineage
    from ray_jobs.training.spec import TrainSpec

    nowhere = lineage.Dataset("d0", "s3://none", "0" * 64, 4, 4)
    base = lineage.Base(config.model.base, {})
    return TrainSpec.of(config, **{"run_id": "run-1", "dataset": nowhere, "base": base, "pad": 0, **resolved})
