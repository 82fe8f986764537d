"""When a schedule runs."""

from dataclasses import dataclass
from datetime import datetime

from components.shared.errors import UserError
from pipelines.kubeflow import cron
from pipelines.kubeflow.run import stamp

MAX_CONCURRENCY = 10


@dataclass(frozen=True)
class Timing:
    """`cron` has five parsed fields, in UTC.

    With one run at once, of the times that fall into a run the last one comes when that run ends; a run that the
    schedule started before it was updated does not count (kubeflow/pipelines 2.16, scheduled_workflow.go,
    GetNextScheduledEpoch: of one ScheduledWorkflow, and an update makes another).
    """

    cron: str
    max_concurrency: int = 1
    start: datetime | None = None
    end: datetime | None = None

    def next_times(self, now: datetime) -> list[datetime]:
        """The next five."""
        return cron.next_times(self.cron, now=now, start=self.start, end=self.end)

    def checked(self, now: datetime) -> "Timing":
        """This timing, which will start a run.

        Raises:
            UserError: it will not, or Kubeflow does not take it.
        """
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            raise UserError(f"--max-concurrency {self.max_concurrency}: Kubeflow takes 1 to {MAX_CONCURRENCY}")
        if not self.cron:
            raise UserError("this schedule was made elsewhere and has no cron of five fields: give one with --cron")
        if not self.next_times(now):
            raise UserError(f"--end {stamp(self.end)}: no time of {self.cron!r} comes before it")
        return self
