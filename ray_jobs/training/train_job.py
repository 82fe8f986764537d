"""What each worker of a training is given."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from components.records.steps import Took
from components.registry import lineage
from components.registry.versions import Version


@dataclass
class Stopwatch:
    """What passes before the first step, one part after the other, in whichever process each of them passes."""

    began: float = field(default_factory=time.time)
    """Seconds since the epoch, which processes and machines agree on."""
    parts: list[Took] = field(default_factory=list)

    def lap(self, part: str) -> None:
        """The part that ends now."""
        passed = sum(each.seconds for each in self.parts)
        self.parts.append(Took(part=part, seconds=round(time.time() - self.began - passed, 3)))

    @property
    def began_at(self) -> str:
        """ISO 8601, in UTC."""
        return datetime.fromtimestamp(self.began, UTC).isoformat()


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs, small enough to travel to each of them."""

    config_toml: str
    run_id: str
    dataset: lineage.Dataset
    base: lineage.Base
    """The identity that the driver resolved, perhaps of a base that nobody has read yet; each worker finds the files on
    its own machine."""
    pad: int
    dense_base: bool = False
    """The plan has workers hold the base dense, where memory is free for it when they start."""
    start: Version | None = None
    """The version that the training goes on from; None begins afresh."""
    flops_per_token: float | None = None
    """By the plan; None of a base that cannot be planned for."""
    flops_before: float | None = 0.0
    """Of the version that the training goes on from, and all before it; None where one does not say."""
    started: lineage.Started = lineage.NOBODY_SAID
    watch: Stopwatch = field(default_factory=Stopwatch)
