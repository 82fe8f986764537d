"""What a job in Kueue's queue waits for, in Kueue's own words: https://kueue.sigs.k8s.io/docs/concepts/workload/."""

import logging
from collections.abc import Sequence

from components.ray_cluster.kubernetes_api import KubernetesApi, Resource
from components.shared.errors import JobError

logger = logging.getLogger(__name__)

QUOTA = "waiting for quota"
"""Before Kueue has looked at it, or where it may not be asked."""


class KueueQueue:
    """Asks for the Workload that Kueue makes of a job; where that is refused, says so once and does not ask again."""

    def __init__(self, api: KubernetesApi) -> None:
        self._api = api
        self._is_refused = False

    def why(self, job_uid: str) -> str:
        """What the job waits for."""
        if self._is_refused:
            return QUOTA
        try:
            return waits_for(self._api.workloads(job_uid))
        except JobError as exc:
            self._is_refused = True
            logger.warning("what the job waits for is not known: %s", exc)
            return QUOTA


def waits_for(workloads: Sequence[Resource]) -> str:
    """What the newest workload of a job says: why it was requeued, and why it is not admitted.

    A request that never fits reads "request > maximum capacity"; a preempted one names what took its place.
    """
    if not workloads:
        return QUOTA
    newest = max(workloads, key=lambda found: str(found["metadata"].get("creationTimestamp", "")))
    if newest["spec"].get("active") is False:
        return "Kueue gave it up: set spec.active of its workload to true, or stop the run"
    conditions = {each["type"]: each for each in (newest.get("status") or {}).get("conditions") or []}
    evicted, quota = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    reasons = [
        *([evicted["message"]] if evicted.get("status") == "True" and evicted.get("message") else []),
        *([quota["message"]] if quota.get("status") == "False" and quota.get("message") else []),
    ]
    return "; ".join(dict.fromkeys(reasons)) or QUOTA
