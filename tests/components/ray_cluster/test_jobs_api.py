"""What a busy dashboard does to a submission, and to those who wait for its job."""

import io
from pathlib import Path
from typing import Any

import pytest

from components.ray_cluster import backend, jobs_api
from components.ray_cluster.backend import Job, JobEnd, LogCopy
from components.shared.errors import JobError
from tests.doubles.jobs_api import TOKEN, Drop, JobsApi

JOB = Job("r", "finetune", ("python", "-c", "pass"), 60)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    double = JobsApi(tmp_path, token=TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    yield double
    double.close()


@pytest.mark.parametrize("drops", [["taken"], ["lost"], ["lost", "taken"]])
def test_a_submission_whose_answer_is_lost_starts_one_job(api: JobsApi, drops: list[Drop]) -> None:
    api.drop_submissions = drops
    client = jobs_api.JobsApi(api.address)
    client.start(JOB, 1)
    assert list(api.jobs) == [client.job_id(JOB, 1)]
    assert api.drop_submissions == []


def test_an_id_in_use_is_refused_where_nothing_was_lost(api: JobsApi) -> None:
    client = jobs_api.JobsApi(api.address)
    client.start(JOB, 1)
    with pytest.raises(JobError, match="already exists"):
        client.start(JOB, 1)


class SlowLog:
    """A head that takes a second to give a log; its job succeeds at `ends`. Time passes by nothing else."""

    def __init__(self, ends: float, *, dropped: int = 0) -> None:
        self.now, self.ends, self.dropped, self.read_at = 0.0, ends, dropped, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def get_job_status(self, _job_id: str) -> Any:
        from ray.job_submission import JobStatus  # fixes Ray's authentication for the whole process

        return JobStatus.SUCCEEDED if self.now >= self.ends else JobStatus.RUNNING

    def get_job_logs(self, _job_id: str) -> str:
        if self.dropped:
            self.dropped -= 1
            raise ConnectionError
        self.read_at.append(self.now)
        self.now += 1.0
        return f"read at {self.read_at[-1]:.0f}\n"


@pytest.mark.parametrize(
    ("dropped", "read_at"), [(0, [0, 10, 15]), (6, [6, 15])], ids=["slow", "out of reach for six seconds"]
)
def test_the_end_of_a_job_is_seen_at_once_however_slowly_its_log_is_read(api, monkeypatch, dropped, read_at):
    client, head = jobs_api.JobsApi(api.address), SlowLog(ends=15, dropped=dropped)
    monkeypatch.setattr(client, "_client", head)
    for module in (jobs_api, backend):
        monkeypatch.setattr(module, "time", head)
    assert client.follow(JOB, "j", LogCopy(io.StringIO()), 0.5) == JobEnd("SUCCEEDED")
    assert [round(at) for at in head.read_at] == read_at
