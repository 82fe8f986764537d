"""What a RayJob's status and Kueue's conditions (as v0.19 writes them) tell of a job, its log, and a watch on it."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from components.ray_cluster import kubernetes_api, rayjob
from components.ray_cluster.backend import Job, JobEnd
from components.ray_cluster.kubernetes_api import Watched
from components.ray_cluster.rayjob import HOPELESS_S, QUOTA, KueueQueue, describe, is_queued, reason_to_wait, state
from components.shared.errors import JobError

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
        (job("Suspended"), "suspended"),
        (job(), "created: waiting for KubeRay"),
        (job("Initializing", rayClusterStatus={"desiredWorkerReplicas": 2}), "waiting for pods: 0 of 2 workers ready"),
        (job("Running", "PENDING"), "the cluster is up: starting the job"),
        (job("Running", "RUNNING"), "running"),
        (job("Retrying", reason="Grace", message="It\nx"), "failed: KubeRay tries again on a new cluster (Grace: It)"),
        (job("Waiting"), "Waiting"),
    ],
)
def test_a_person_is_told_where_it_stands(found: dict[str, Any], text: str) -> None:
    assert describe(found).startswith(text)
    assert is_queued(found) is text.startswith(("queued", "suspended"))


KILLED = "Job failed with exit code -9: x"


@pytest.mark.parametrize(
    ("found", "ended"),
    [
        (job("Complete", "SUCCEEDED"), JobEnd("SUCCEEDED")),
        (job("Complete", "STOPPED"), JobEnd("STOPPED")),
        (job("Running", **GOING), JobEnd("STOPPED")),
        (job("Failed", reason="AppFailed", message=KILLED), JobEnd("FAILED", "with exit code -9", KILLED)),
        (job("Failed", reason="AppFailed"), JobEnd("FAILED", "(AppFailed)")),
        (job("Failed", reason="Grace", message="It\nx"), JobEnd("FAILED", "(Grace: It)", "It\nx")),
        (job("ValidationFailed"), JobEnd("FAILED", "(ValidationFailed)")),
    ],
)
def test_how_it_ended_is_said_in_the_clusters_words(found: dict[str, Any], ended: JobEnd) -> None:
    assert rayjob._ended(found, JOB) == ended


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("DeadlineExceeded", r"ran past ray\.timeout_s = 3600 s and was stopped by KubeRay"),
        ("PreRunningDeadlineExceeded", r"no running cluster after 1800 s.*no image"),
    ],
)
def test_a_limit_of_ours_is_told(reason: str, text: str) -> None:
    with pytest.raises(JobError, match=text):
        rayjob._ended(job("Failed", reason=reason, message="no image"), JOB)


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


NEVER_FITS = (
    "couldn't assign flavors to pod set workers: insufficient quota for nvidia.com/gpu in flavor a10g, previously "
    "considered podsets requests (0) + current podset request (16) > maximum capacity (8)"
)
"""pkg/scheduler/flavorassigner/flavorassigner.go, fitsResourceQuota."""
PREEMPTED = (
    "Preempted to accommodate a workload (UID: 9f5, JobUID: a20) due to prioritization in the ClusterQueue; "
    "preemptor path: /fineloop; preemptee path: /fineloop"
)
"""pkg/scheduler/preemption/preemption.go, preemptionMessage."""
EVICTED = ("Evicted", "True", PREEMPTED)


def workload(*conditions: tuple[str, str, str], at: str = "2026-11-26T02:00:00Z", **spec: Any) -> dict[str, Any]:
    listed = [{"type": kind, "status": status, "message": message} for kind, status, message in conditions]
    return {"metadata": {"creationTimestamp": at}, "spec": spec, "status": {"conditions": listed}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], QUOTA),
        ([workload(("QuotaReserved", "True", "Quota reserved in ClusterQueue fineloop"))], QUOTA),
        ([workload(("QuotaReserved", "False", NEVER_FITS))], NEVER_FITS),
        ([workload(EVICTED, ("QuotaReserved", "False", NEVER_FITS))], f"{PREEMPTED}; {NEVER_FITS}"),
        # The condition that QuotaReserved takes over from an eviction says the same.
        ([workload(EVICTED, ("QuotaReserved", "False", PREEMPTED))], PREEMPTED),
        ([workload(("Evicted", "False", PREEMPTED), ("QuotaReserved", "False", NEVER_FITS))], NEVER_FITS),
        ([workload(("QuotaReserved", "False", "old")), workload(at="2026-11-26T02:00:01Z")], QUOTA),
    ],
)
def test_what_a_job_waits_for_is_said_in_kueues_words(found: list[dict[str, Any]], expected: str) -> None:
    assert reason_to_wait(found) == expected


def test_a_job_that_kueue_gave_up_says_how_it_goes_on() -> None:
    """spec.active is false after too many times without pods, or because a person wants it so (workload_types.go)."""
    assert "spec.active" in reason_to_wait([workload(active=False)])


def waited(*reasons: str, message: str = NEVER_FITS) -> list[bool]:
    """Whether there is no hope after each look, a minute apart, at which Kueue gives these reasons and this message."""
    found: list[dict[str, Any]] = []
    now = 0.0

    class Api:
        def list(self, *_: Any, **__: Any) -> tuple[list[dict[str, Any]], str]:
            return found, "1"

    queue, hopeless = KueueQueue(Api(), clock=lambda: now), []  # type: ignore[arg-type]
    for reason in reasons:
        found[:] = [workload(("QuotaReserved", "False", message))]
        found[0]["status"]["conditions"][0]["reason"] = reason
        assert queue.why("uid") == message
        hopeless.append(queue.is_hopeless)
        now += HOPELESS_S / 3 + 1
    return hopeless


@pytest.mark.parametrize("reason", ["ExceedsMaxQuota", "NoMatchingFlavor"])
def test_a_reason_that_no_waiting_ends_must_stand_for_minutes(reason: str) -> None:
    assert waited(*[reason] * 5) == [False, False, False, True, True]


UNUSED = "couldn't assign flavors to pod set workers: insufficient unused quota for cpu in flavor any, 2 more needed"


@pytest.mark.parametrize(
    ("message", "never"),
    [
        (NEVER_FITS, True),
        ("couldn't assign flavors to pod set workers: resource ephemeral-storage unavailable in ClusterQueue", True),
        (UNUSED, False),
        (f"{NEVER_FITS}, insufficient unused quota for nvidia.com/gpu in flavor a100, 8 more needed", False),
        ("The workload has failed admission checks", False),
    ],
)
def test_a_kueue_that_always_says_pending_is_taken_at_its_words(message: str, never: bool) -> None:
    """As 0.19.2 does by itself: seen on a cluster, with the first of these messages."""
    assert waited(*["Pending"] * 5, message=message) == [False, False, False, never, never]


def test_a_quota_that_is_raised_meanwhile_gives_hope_again() -> None:
    reasons = ("ExceedsMaxQuota", "ExceedsMaxQuota", "WaitingForQuota", "ExceedsMaxQuota", "ExceedsMaxQuota")
    assert waited(*reasons) == [False] * 5


def test_an_api_server_that_is_away_for_minutes_is_waited_for(monkeypatch, caplog):
    """The job goes on without it; the step that follows it is not lost with the run. The clock is the test's."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, sleep=lambda _: None)
    monkeypatch.setattr(kubernetes_api, "time", clock)

    class Away:
        def list(self, *_: object, **__: object) -> Any:
            return [{"metadata": {"name": "job"}}], "1"

        def events(self, *_: object, **__: object) -> Any:
            raise ConnectionResetError

        def refusal(self, what: str, _error: Exception) -> JobError:
            return JobError(what)

    watched = Watched(Away(), "job")  # type: ignore[arg-type] - a double of the API
    watched.wait(0)
    for clock.now in (1.0, 60.0, 300.0, 590.0):
        assert watched.wait(0) is not None
    assert [message.partition(":")[0] for message in caplog.messages] == ["the Kubernetes API is away"]
    clock.now = 700.0
    with pytest.raises(JobError, match="watch rayjobs"):
        watched.wait(0)
