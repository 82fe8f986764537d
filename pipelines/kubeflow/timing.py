"""The times at which a schedule starts runs."""

from dataclasses import dataclass
from datetime import datetime

from components.shared.errors import UserError
from pipelines.kubeflow import cron
from pipelines.kubeflow.run import stamp

MAX_CONCURRENCY = 10


@dataclass(frozen=True)
class Timing:
    """When a schedule starts runs. `cron` has five parsed fields, in UTC.

    If `max_concurrency` is 1 and several times pass during a run, only the last of them starts a run, when that run
    ends. Runs that were started before an update of the schedule do not count: Kubeflow counts those of one
    ScheduledWorkflow, and an update makes another (kubeflow/pipelines 2.16, scheduled_workflow.go,
    GetNextScheduledEpoch).
    """

    cron: str
    max_concurrency: int = 1
    start: datetime | None = None
    end: datetime | None = None

    def next_times(self, now: datetime) -> list[datetime]:
        """Return the next five times, or fewer if `end` comes first."""
        return cron.next_times(self.cron, now=now, start=self.start, end=self.end)

    def checked(self, now: datetime) -> "Timing":
        """Return this timing, after a check that it will start a run.

        Raises:
            UserError: it will not start a run, or Kubeflow does not accept it.
        """
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            raise UserError(f"--max-concurrency {self.max_concurrency}: Kubeflow takes 1 to {MAX_CONCURRENCY}")
        if not self.cron:
            raise UserError("this schedule was made elsewhere and has no cron of five fields: give one with --cron")
        if not self.next_times(now):
            raise UserError(f"--end {stamp(self.end)}: no time of {self.cron!r} comes before it")
        return self
