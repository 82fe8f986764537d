"""Tells what a job in Kueue's queue waits for, in Kueue's words: https://kueue.sigs.k8s.io/docs/concepts/workload/."""

import logging
import time
from collections.abc import Callable, Sequence

from components.ray_cluster.kubernetes_api import KubernetesApi, Resource
from components.shared.errors import JobError

logger = logging.getLogger(__name__)

QUOTA = "waiting for quota"
"""The answer before Kueue has looked at the job, and when Kueue may not be asked."""
NEVER_FITS = ("ExceedsMaxQuota", "NoMatchingFlavor")
"""Reasons of the condition QuotaReserved that no waiting ends (Kueue 0.19, apis/kueue/v1beta2/workload_types.go).
Without the feature gate UnadmittedWorkloadsObservability, which is off by itself, the reason is always Pending."""
NEVER_WORDS = (
    "> maximum capacity (",
    "unavailable in ClusterQueue",
    "untolerated taint",
    "doesn't match node affinity",
)
"""Parts of the condition's message in such a case (pkg/scheduler/flavorassigner/flavorassigner.go)."""
MAY_FIT_WORDS = "insufficient unused quota"
"""The part of the same message about a flavor, perhaps one of several, that has room once other jobs have ended."""
HOPELESS_S = 180.0
"""How long, in seconds, such a reason must last: somebody may be raising the quota."""


class KueueQueue:
    """Asks for the Workload that Kueue makes for a job. If that is refused, it warns once and does not ask again."""

    def __init__(self, api: KubernetesApi, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._is_refused = False
        self._never_since: float | None = None

    def why(self, job_uid: str) -> str:
        """Return what the job waits for, in Kueue's words or as QUOTA."""
        if self._is_refused:
            return QUOTA
        try:
            workloads = self._api.workloads(job_uid)
        except JobError as exc:
            self._is_refused = True
            logger.warning("what the job waits for is not known: %s", exc)
            return QUOTA
        if not never_fits(workloads):
            self._never_since = None
        elif self._never_since is None:
            self._never_since = self._clock()
        return waits_for(workloads)

    @property
    def is_hopeless(self) -> bool:
        """Whether Kueue has said for minutes that the job never fits."""
        return self._never_since is not None and self._clock() - self._never_since > HOPELESS_S


def waits_for(workloads: Sequence[Resource]) -> str:
    """The messages of a job's newest workload: why it was requeued, and why it is not admitted.

    A job that never fits reads "insufficient quota for ... > maximum capacity"; a preempted one names the workload that
    took its place.
    """
    if not workloads:
        return QUOTA
    newest = _newest(workloads)
    if newest["spec"].get("active") is False:
        return "Kueue gave it up: set spec.active of its workload to true, or stop the run"
    conditions = _conditions(newest)
    evicted, quota = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    reasons = [
        *([evicted["message"]] if evicted.get("status") == "True" and evicted.get("message") else []),
        *([quota["message"]] if quota.get("status") == "False" and quota.get("message") else []),
    ]
    return "; ".join(dict.fromkeys(reasons)) or QUOTA


def never_fits(workloads: Sequence[Resource]) -> bool:
    """Whether Kueue refuses the newest workload for a reason that does not pass by waiting."""
    quota = _conditions(_newest(workloads)).get("QuotaReserved", {}) if workloads else {}
    if quota.get("status") != "False":
        return False
    said = quota.get("message") or ""
    by_words = any(words in said for words in NEVER_WORDS) and MAY_FIT_WORDS not in said
    return quota.get("reason") in NEVER_FITS or (quota.get("reason") == "Pending" and by_words)


def _newest(workloads: Sequence[Resource]) -> Resource:
    return max(workloads, key=lambda found: str(found["metadata"].get("creationTimestamp", "")))


def _conditions(workload: Resource) -> dict[str, Resource]:
    return {each["type"]: each for each in (workload.get("status") or {}).get("conditions") or []}
