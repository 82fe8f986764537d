"""What is measured beside the held-out records: each kind is a probe, and measuring knows this protocol alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from components.records.steps import Role
from ray_jobs.text.chat_format import ChatFormat

Findings = dict[Role, Any]
"""What a probe's share found in each model that it had to measure."""
Rows = Callable[[int], Sequence[int]]
"""A worker's rows of so many."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its adapter on it and in evaluation mode."""

    role: Role
    model: Any
    chat: ChatFormat
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """What a probe came to."""

    record: Any
    """Its part of the evaluation."""
    metrics: Mapping[Role, Mapping[str, float | None]] = field(default_factory=dict)
    """What it adds to the metrics of each model, by the keys of METRICS."""
    lines: Sequence[str] = ()
    """For the log."""

    def metrics_of(self, role: Role) -> list[tuple[str, float | None]]:
        """What it adds to those of a model."""
        return list(self.metrics.get(role, {}).items())


class Probe(Protocol):
    """Items to measure, and the models that no earlier run has measured on them. Workers receive it by pickle."""

    def at(self, rows: Rows) -> "Probe":
        """A worker's share: of `count` items those at `rows(count)`."""

    def held_together(self) -> "Probe":
        """The probe for workers that hold the base together, where every forward pass is a collective operation."""

    def run(self, subject: Subject, found: Findings) -> Any | None:
        """Measure a model on this share; None where that is known. `found` is of the models before, the base first."""

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        """What all shares found, in the order in which items were dealt out one by one, and what was known before."""


Probes = Mapping[str, Probe]
"""By the key that each has in evaluation.json."""
NO_PROBES: Probes = {}


def run_all(probes: Probes, subject: Subject, found: Mapping[str, Findings]) -> None:
    """Measure a model by each probe, and add what it says to `found`."""
    for key, probe in probes.items():
        if (said := probe.run(subject, found[key])) is not None:
            found[key][subject.role] = said
