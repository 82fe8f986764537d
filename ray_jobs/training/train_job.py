"""The arguments that each worker of a training receives."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

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
        passed = sum(each.seconds for each in self.parts)
        self.parts.append(Took(part=part, seconds=round(time.time() - self.began - passed, 3)))

    @property
    def began_at(self) -> str:
        """Start time, ISO 8601 in UTC."""
        return datetime.fromtimestamp(self.began, UTC).isoformat()


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs, small enough to send to each of them."""

    config_toml: str
    run_id: str
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
    flops_per_token: float | None = None
    """Training FLOPs per token by the plan; None for a base that cannot be planned for."""
    flops_before: float | None = 0.0
    """FLOPs of training the version `start` and all that it builds on; None where one of them is unknown."""
    started: lineage.Started = lineage.NOBODY_SAID
    watch: Stopwatch = field(default_factory=Stopwatch)
