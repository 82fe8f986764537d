"""What a busy dashboard does to a submission."""

from pathlib import Path

import pytest

from components.ray_cluster import jobs_api
from components.ray_cluster.backend import Job
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
