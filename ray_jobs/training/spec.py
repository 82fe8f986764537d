"""What the driver resolves a run's config into, once: all that the workers of a training get, as JSON.

Its sections are the config's own, so that what both an evaluation and a training use takes either (`TrainingConfig`).
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.config.ray import RayConfig
from components.config.schema import TRACKED_RUNS as TRACKED_RUNS
from components.config.schema import TRACKER_SECRETS_FILE as TRACKER_SECRETS_FILE
from components.config.schema import AdapterConfig, MethodConfig, ModelConfig, RegistryConfig, RunConfig, TrackConfig
from components.config.schema import TrainingConfig as TrainingConfig
from components.config.train import TrainConfig
from components.records.steps import Took
from components.registry import lineage
from components.registry.versions import Version


@dataclass
class Stopwatch:
    """Durations of the phases before the first step, one after the other, across processes."""

    began: float = field(default_factory=time.time)
    """Start time in seconds since the epoch, which is the same on all processes and machines."""
    parts: list[Took] = field(default_factory=list)

    def lap(self, part: str) -> None:
        """Record the phase that ends now."""
        passed = sum(took.seconds for took in self.parts)
        self.parts.append(Took(part=part, seconds=round(time.time() - self.began - passed, 3)))

    @property
    def began_at(self) -> str:
        """Start time, ISO 8601 in UTC."""
        return datetime.fromtimestamp(self.began, UTC).isoformat()


class TrainSpec(BaseModel):
    """A training, resolved: its settings, its base, its data and its start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    adapter: AdapterConfig
    model: ModelConfig
    method: MethodConfig
    train: TrainConfig
    """With the learning rate in force."""
    ray: RayConfig
    registry: RegistryConfig
    track: TrackConfig
    asked: lineage.Asked
    """The run's whole config, as the lineage records it."""
    training_digest: str
    """The config's digest that checkpoints carry."""
    dataset: lineage.Dataset
    base: lineage.Base
    """The base's identity as the driver resolved it, perhaps before anybody has read its weights; each worker finds the
    files on its own machine."""
    pad: int
    """Id of the padding token."""
    dense_base: bool = False
    """Whether the plan has workers hold the base dense, provided that memory is free for it when they start."""
    start: Version | None = None
    """The version that the training starts from; None for the base alone."""
    stands_on_sha256: str = ""
    """The manifest's sha256 of the base of its own that `start` was trained on, if it has one."""
    flops_per_token: float | None = None
    """Training FLOPs per token by the plan; None for a base that cannot be planned for."""
    flops_before: float | None = 0.0
    """FLOPs of training the version `start` and all that it builds on; None where one of them is unknown."""
    started: lineage.Started = lineage.UNKNOWN_STARTER

    @classmethod
    def of(cls, config: RunConfig, **resolved: Any) -> "TrainSpec":
        """The spec of a training by this config; `resolved` are the fields that the config does not have."""
        sections = {name: getattr(config, name) for name in ("adapter", "model", "method", "ray", "registry", "track")}
        return cls(
            **sections,
            train=config.train.model_copy(update={"learning_rate": config.learning_rate}),
            asked=lineage.Asked.of(config),
            training_digest=config.training_digest,
            **resolved,
        )

    @property
    def learning_rate(self) -> float:
        assert self.train.learning_rate is not None
        return self.train.learning_rate

    def on(self, num_workers: int) -> "TrainSpec":
        return self.model_copy(update={"ray": self.ray.model_copy(update={"num_workers": num_workers})})
