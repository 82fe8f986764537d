"""What a RayJob's status means: where it stands, how it ended, and how old it is."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from components.config.ray import RayJobCluster
from components.ray_cluster import rayjob
from components.ray_cluster.backend import Job, JobEnd
from components.ray_cluster.rayjob import describe, is_queued, state
from components.shared.errors import JobError

CLUSTER = RayJobCluster(kind="rayjob", pre_running_timeout_s=77)
JOB = Job("r", "finetune", ("x",), 3600)


def job(deployment: str = "", job_status: str = "", *, suspend: bool = False, **others: Any) -> dict[str, Any]:
    meta = others.pop("metadata", {})
    status = {"jobDeploymentStatus": deployment, "jobStatus": job_status, **others}
    return {"metadata": {"name": "j", "labels": {}, **meta}, "spec": {"suspend": suspend}, "status": status}


GOING = {"metadata": {"deletionTimestamp": "2026-11-25T02:00:00Z"}}


@pytest.mark.parametrize(
    ("found", "stands"),
    [
        ({"metadata": {}, "spec": {}}, "live"),
        (job("Running", "RUNNING"), "live"),
        (job("Retrying", "FAILED"), "live"),
        (job("Complete", "SUCCEEDED"), "succeeded"),
        (job("Complete", "FAILED"), "ended"),
        (job("Failed"), "ended"),
        (job("ValidationFailed"), "ended"),
        (job("Complete", "SUCCEEDED", **GOING), "ended"),
    ],
)
def test_an_attempt_is_live_until_kuberay_says_otherwise_or_it_is_deleted(found: dict[str, Any], stands: str) -> None:
    assert state(found) == stands


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (job(suspend=True, metadata={"labels": {"kueue.x-k8s.io/queue-name": "q"}}), "queued by Kueue in q: waiting"),
        (job("Suspending"), "suspended"),
        (job("Suspended"), "suspended"),
        (job(), "created: waiting for KubeRay"),
        (job("Initializing"), "waiting for pods"),
        (job("Initializing", rayClusterStatus={"desiredWorkerReplicas": 2}), "waiting for pods: 0 of 2 workers ready"),
        (job("Running"), "the cluster is up: starting the job"),
        (job("Running", "PENDING"), "the cluster is up: starting the job"),
        (job("Running", "RUNNING"), "running"),
        (job("Retrying"), "failed: KubeRay tries again"),
        (
            job("Retrying", reason="JobDeploymentStatusTransitionGracePeriodExceeded", message="The submitter\nlines"),
            "failed: KubeRay tries again on a new cluster (JobDeploymentStatusTransitionGracePeriodExceeded: "
            "The submitter)",
        ),
        (job("Complete"), "complete"),
        (job("Waiting"), "Waiting"),
    ],
)
def test_a_person_is_told_where_it_stands(found: dict[str, Any], text: str) -> None:
    assert describe(found).startswith(text)
    assert is_queued(found) is text.startswith(("queued", "suspended"))
    if text == "waiting for pods":
        assert describe(found) == text


@pytest.mark.parametrize(
    ("found", "ended"),
    [
        (job("Complete", "SUCCEEDED"), JobEnd("SUCCEEDED")),
        (job("Complete", "STOPPED"), JobEnd("STOPPED")),
        (job("Running", **GOING), JobEnd("STOPPED")),
        (
            job("Failed", "FAILED", reason="AppFailed", message="Job failed with exit code -9: x"),
            JobEnd("FAILED", "with exit code -9", "Job failed with exit code -9: x"),
        ),
        (job("Failed", reason="AppFailed"), JobEnd("FAILED", "(AppFailed)")),
        (
            job(
                "Failed", reason="JobDeploymentStatusTransitionGracePeriodExceeded", message="The submitter finished\nx"
            ),
            JobEnd(
                "FAILED",
                "(JobDeploymentStatusTransitionGracePeriodExceeded: The submitter finished)",
                "The submitter finished\nx",
            ),
        ),
        (job("ValidationFailed"), JobEnd("FAILED", "(ValidationFailed)")),
    ],
)
def test_how_it_ended_is_said_in_the_clusters_words(found: dict[str, Any], ended: JobEnd) -> None:
    assert rayjob._ended(found, JOB, CLUSTER) == ended


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("DeadlineExceeded", r"ran past ray\.timeout_s = 3600 s and was stopped by KubeRay"),
        ("PreRunningDeadlineExceeded", r"ray\.cluster\.pre_running_timeout_s = 77 s.*no image"),
    ],
)
def test_a_limit_of_ours_is_told_by_its_key(reason: str, text: str) -> None:
    with pytest.raises(JobError, match=text):
        rayjob._ended(job("Failed", reason=reason, message="no image"), JOB, CLUSTER)


def test_a_live_job_is_known_by_its_whole_run_id_and_its_age() -> None:
    created = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    labels = {"fineloop.dev/run-id": "cut-off", "fineloop.dev/task": "finetune"}
    about = {"fineloop.dev/run-id": "whole", "fineloop.dev/kfp-run-id": "k", "fineloop.dev/lifetime-s": "60"}
    meta = {"labels": labels, "creationTimestamp": created}
    found = rayjob._live(job(metadata={**meta, "annotations": about}))
    assert (found.job_id, found.run_id, found.task, found.kfp_run_id) == ("j", "whole", "finetune", "k")
    assert found.lifetime_s == 60
    assert found.age_s == pytest.approx(100, abs=30)
    by_hand = rayjob._live(job(metadata=meta))
    assert (by_hand.run_id, by_hand.kfp_run_id, by_hand.lifetime_s) == ("cut-off", "", 0)
