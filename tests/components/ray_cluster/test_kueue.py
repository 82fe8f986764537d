"""What Kueue's conditions tell of a job: as kueue v0.19 writes them."""

from typing import Any

import pytest

from components.ray_cluster.rayjob import HOPELESS_S, QUOTA, KueueQueue, reason_to_wait

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


def workload(*conditions: tuple[str, str, str], at: str = "2026-11-26T02:00:00Z", **spec: Any) -> dict[str, Any]:
    listed = [{"type": kind, "status": status, "message": message} for kind, status, message in conditions]
    return {"metadata": {"creationTimestamp": at}, "spec": spec, "status": {"conditions": listed}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], QUOTA),
        ([workload()], QUOTA),
        ([workload(("QuotaReserved", "True", "Quota reserved in ClusterQueue fineloop"))], QUOTA),
        ([workload(("QuotaReserved", "False", NEVER_FITS))], NEVER_FITS),
        (
            [workload(("QuotaReserved", "False", "ClusterQueue fineloop is inactive"))],
            "ClusterQueue fineloop is inactive",
        ),
        (
            [workload(("Evicted", "True", PREEMPTED), ("QuotaReserved", "False", NEVER_FITS))],
            f"{PREEMPTED}; {NEVER_FITS}",
        ),
        # The condition that QuotaReserved takes over from an eviction says the same.
        ([workload(("Evicted", "True", PREEMPTED), ("QuotaReserved", "False", PREEMPTED))], PREEMPTED),
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
    found, now = list[dict[str, Any]](), 0.0

    class Api:
        def workloads(self, _job_uid: str) -> list[dict[str, Any]]:
            return found

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
        (
            "couldn't assign flavors to pod set workers: untolerated taint {pool gpu NoSchedule <nil>} in flavor a10g",
            True,
        ),
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
