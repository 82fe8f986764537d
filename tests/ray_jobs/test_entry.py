"""As what a job was started, by what Ray's Jobs API hands an entry point."""

import json
import logging
import os
import pwd

import pytest

from components.registry.lineage import Started
from ray_jobs import entry

# As ray/dashboard/modules/job/job_supervisor.py makes it of a submission with the metadata that a step gives it.
SUBMITTED = {
    "runtime_env": {},
    "metadata": {
        "job_submission_id": "r1-candidate-1",
        "job_name": "r1-candidate-1",
        "fineloop_run_id": "r1",
        "fineloop_kfp_run_id": "7506d98d",
        "fineloop_user": "ann",
    },
}


def test_a_submitted_job_names_who_asked_for_it_and_what_it_belongs_to() -> None:
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(SUBMITTED), "USER": "ray"}
    assert entry.started(environment, "02000000") == Started("ann", "7506d98d", "r1-candidate-1", "02000000")


def test_a_job_that_a_person_starts_by_hand_is_that_person_s() -> None:
    assert entry.started({"USER": "bob"}, "03000000") == Started(user="bob", ray_job_id="03000000")
    assert entry.started({"USER": "bob", "FINELOOP_USER": "ann"}, "") == Started(user="ann")
    assert entry.started({}, "") == Started(user=pwd.getpwuid(os.getuid()).pw_name)


def test_of_a_second_worker_only_what_goes_wrong_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    """The handler takes all levels, as the one that Ray Train sets on a worker's root logger does."""
    caplog.set_level(logging.DEBUG)
    ours = [logging.getLogger(name) for name in (*entry.OURS, "ray_jobs.training.step_zero")]
    levels = [logger.level for logger in ours]
    try:
        entry.log_as("finetune", rank=1)
        for logger in ours:
            logger.info("loss before the first step")
            logger.warning("older checkpoints are deleted later")
    finally:
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
    assert [record.message for record in caplog.records] == ["older checkpoints are deleted later"] * 3
