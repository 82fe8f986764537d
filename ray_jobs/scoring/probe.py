"""The protocol of probes, which measure something other than the held-out records; an evaluation knows only it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from components.records.steps import Role
from ray_jobs.text.chat_format import ChatFormat

Findings = dict[Role, Any]
"""Results of a probe's share, for each model that it had to measure."""
Rows = Callable[[int], Sequence[int]]
"""A function from a number of items to the indices of those that a worker measures."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its adapter on it and in evaluation mode."""

    role: Role
    model: Any
    chat: ChatFormat
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """The result of a probe."""

    record: Any
    """The probe's part of the evaluation record."""
    metrics: Mapping[Role, Mapping[str, float | None]] = field(default_factory=dict)
    """Metrics that the probe adds to each model, by the keys of METRICS."""
    lines: Sequence[str] = ()
    """Lines for the log."""

    def metrics_of(self, role: Role) -> list[tuple[str, float | None]]:
        """The metrics that the probe adds to a model."""
        return list(self.metrics.get(role, {}).items())


class Probe(Protocol):
    """Items to measure, and the models that no earlier run has measured on them. Probes are pickled for the workers."""

    def at(self, rows: Rows) -> "Probe":
        """A worker's share: the items at `rows(count)`."""

    def held_together(self) -> "Probe":
        """The probe for workers that shard the base, where every forward pass is a collective operation."""

    def run(self, subject: Subject, found: Findings) -> Any | None:
        """Measure a model on this share; None if its result is known already.

        `found` holds the results of the models measured before, the base first.
        """

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        """The outcome over all shares, among which the items were dealt in turn, and over what was known before."""


Probes = Mapping[str, Probe]
"""Probes by their keys in evaluation.json."""
NO_PROBES: Probes = {}


def run_all(probes: Probes, subject: Subject, found: Mapping[str, Findings]) -> None:
    """Measure a model with each probe, and add the results to `found`."""
    for key, probe in probes.items():
        if (said := probe.run(subject, found[key])) is not None:
            found[key][subject.role] = said
