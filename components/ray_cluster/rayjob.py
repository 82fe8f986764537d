"""Jobs as RayJobs: KubeRay makes a cluster for each, Kueue admits it when there is room, and it ends with the job.

What can be seen of a RayJob is its status, which KubeRay writes, and `spec.suspend`, which Kueue owns. A RayJob is
stopped by deleting it: suspended, Kueue would start it again.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from components.config.ray import PRE_RUNNING_TIMEOUT_S, QUEUE_TIMEOUT_S, RayConfig, RayJobCluster
from components.ray_cluster import rayjob_manifest as manifest
from components.ray_cluster.backend import STOP_S, Job, JobEnd, LiveJob, LogCopy, State, rest_s
from components.ray_cluster.kubernetes_api import (
    WORKLOADS,
    KubernetesApi,
    Resource,
    Watched,
    Workflow,
    conditions,
    own_namespace,
    own_workflow,
)
from components.shared.errors import JobError, WorkersMissing
from components.shared.protocol import find_failure

logger = logging.getLogger(__name__)

IDLE_WINDOW_S = 20.0  # how long one watch lasts while there is no log to copy
KEPT_S = 86_400.0
"""How long a job that has ended keeps its submitter's log, and its place in the namespace's quota of RayJobs."""
QUOTA = "waiting for quota"  # the answer before Kueue has looked at the job, and when Kueue may not be asked


class RayJobs:
    """The RayJobs of one namespace, known by their names."""

    noun = "RayJob"

    def __init__(self, ray: RayConfig) -> None:
        """Connect to the Kubernetes API. Raises UserError: there is no way to an API server, or no namespace."""
        assert isinstance(ray.cluster, RayJobCluster)
        self._ray = ray
        self._api = KubernetesApi(ray.cluster.namespace)

    def job_id(self, job: Job, attempt: int) -> str:
        return manifest.rayjob_name(job, attempt)

    def attempts(self, job: Job) -> dict[int, State]:
        items, _ = self._api.list(manifest.labels(job))
        return {int(rayjob["metadata"]["labels"].get(manifest.ATTEMPT, 1)): state(rayjob) for rayjob in items}

    def start(self, job: Job, attempt: int) -> None:
        """Create the RayJob; if another process of this step has just created it, that one is followed."""
        body = manifest.rayjob(self._ray, job, attempt, namespace=self._api.namespace, owner=self._workflow)
        did = "created" if self._api.create(body) else "following what came to be meanwhile:"
        logger.info("%s RayJob %s/%s", did, self._api.namespace, body["metadata"]["name"])

    def adopt(self, job_id: str) -> None:
        """Make this run's workflow an owner as well, where another run with the same id has started the job."""
        owner = self._workflow
        items, _ = self._api.list({}, name=job_id) if owner else ([], "")
        owners = items[0]["metadata"].get("ownerReferences", []) if items else []
        if owner and items and owner.uid not in [other["uid"] for other in owners]:
            self._api.patch(job_id, {"metadata": {"ownerReferences": [*owners, owner.reference()]}})

    def follow(self, job: Job, job_id: str, log: LogCopy, poll_s: float) -> JobEnd:
        watched, clock, stage = Watched(self._api, job_id), _Clock(job), ""
        job_log, running_on, queue = JobLog(self._api, job_id, log), "", KueueQueue(self._api)
        rayjob = watched.wait(0)
        while True:
            if rayjob is None:
                return JobEnd("STOPPED")
            status = rayjob.get("status") or {}
            if status.get("rayClusterName", running_on) != running_on:
                running_on = status["rayClusterName"]
                job_log.restart()
            waits_for = queue.why(rayjob["metadata"]["uid"]) if is_queued(rayjob) else ""
            if stage != describe(rayjob, waits_for):
                stage = describe(rayjob, waits_for)
                logger.info("RayJob: %s", stage)
            if waits_for and queue.is_hopeless:
                self.stop(job_id)
                less = "raise the quota or ask for less (ray.num_workers, ray.cluster.worker)"
                raise JobError(f"RayJob {job_id} never fits its queue: {less}: {waits_for}")
            ended = state(rayjob) != "live"
            has_log = bool(status.get("dashboardURL"))
            if has_log:
                job_log.read(status, final=ended)
            if log.is_done:
                return JobEnd("SUCCEEDED")
            if ended:
                end = _ended(rayjob, job)
                if end.status == "SUCCEEDED":
                    self._release(job_id)
                return end
            if status.get("jobDeploymentStatus") == "Retrying":
                failure = find_failure(log.text)
                if failure is not None and not isinstance(failure, WorkersMissing):  # another cluster would not help
                    self.stop(job_id)
                    return JobEnd("FAILED")
            if limit := clock.past(is_queued=is_queued(rayjob)):
                self.stop(job_id)
                raise JobError(f"RayJob {job_id} {limit} and was stopped")
            rayjob = watched.wait(min(2 * poll_s if has_log else IDLE_WINDOW_S, clock.left_s))

    def stop_now(self, job_id: str) -> None:
        """Delete it with one call: KubeRay stops the job first, and Kubernetes deletes cluster and pods with it."""
        self._api.delete(job_id)

    def stop(self, job_id: str) -> None:
        """Delete it, for a while, until it is gone or being deleted: one that was being created may appear late."""
        deadline, absent, why = time.monotonic() + STOP_S, 0, ""
        while time.monotonic() < deadline and absent < 3:
            try:
                absent = 0 if self._api.delete(job_id) else absent + 1
                items, _ = self._api.list({}, name=job_id)
                if items and items[0]["metadata"].get("deletionTimestamp"):
                    return
            except JobError as exc:
                why = str(exc)
            time.sleep(0.1)
        if why:
            logger.warning("%s", why)

    def live(self) -> list[LiveJob]:
        items, _ = self._api.list({manifest.PART_OF: "fineloop"})
        return [_live(item) for item in items if state(item) == "live"]

    def spent(self) -> list[LiveJob]:
        """The RayJobs that ended over KEPT_S ago and have no owner to go with: from outside Kubeflow, or by hand."""
        items, _ = self._api.list({manifest.PART_OF: "fineloop"})
        return [
            _live(item)
            for item in items
            if state(item) != "live"
            and not item["metadata"].get("ownerReferences")
            and _age_s((item.get("status") or {}).get("endTime") or item["metadata"]["creationTimestamp"]) > KEPT_S
        ]

    def _release(self, job_id: str) -> None:
        """Delete the cluster of a job that succeeded at once: Kueue has already given its quota to the next job.
        KubeRay looks at the time to live again whenever the RayJob changes, and keeps the submitter with its log
        (rayjob_controller.go, v1.7, JobDeploymentStatusComplete)."""
        try:
            self._api.patch(job_id, {"spec": {"ttlSecondsAfterFinished": 0}})
        except JobError as exc:
            logger.warning("the cluster of RayJob %s stays for %d s: %s", job_id, manifest.TTL_S, exc)

    @cached_property
    def _workflow(self) -> Workflow | None:
        # Kubernetes takes an owner in another namespace as missing, and deletes what it owns at once.
        return own_workflow() if self._api.namespace == own_namespace() else None


class _Clock:
    """How long a job has waited in the queue and run; each has its own limit, and a preempted job does both again."""

    def __init__(self, job: Job) -> None:
        self._limits = {True: float(QUEUE_TIMEOUT_S), False: job.timeout_s}
        self._spent = {True: 0.0, False: 0.0}
        self._is_queued, self._at = False, time.monotonic()

    def past(self, *, is_queued: bool) -> str:
        """Add the time since the last call to the phase that the job was in then; say which limit is passed, if one."""
        now = time.monotonic()
        self._spent[self._is_queued] += now - self._at
        self._is_queued, self._at = is_queued, now
        if self._spent[True] > self._limits[True]:
            return f"waited in the queue for more than {self._limits[True]:.0f} s"
        return (
            f"ran past ray.timeout_s = {self._limits[False]:.0f} s" if self._spent[False] > self._limits[False] else ""
        )

    @property
    def left_s(self) -> float:
        return max(0.0, self._limits[self._is_queued] - self._spent[self._is_queued])


def state(rayjob: Resource) -> State:
    """The state of an attempt; one that is being deleted counts as ended."""
    status = rayjob.get("status") or {}
    if rayjob["metadata"].get("deletionTimestamp"):
        return "ended"
    if status.get("jobDeploymentStatus") not in ("Complete", "Failed", "ValidationFailed"):
        return "live"
    return "succeeded" if status.get("jobStatus") == "SUCCEEDED" else "ended"


def is_queued(rayjob: Resource) -> bool:
    """Whether Kueue holds it back."""
    deployment = (rayjob.get("status") or {}).get("jobDeploymentStatus")
    return bool(rayjob["spec"].get("suspend")) or deployment in ("Suspending", "Suspended")


def describe(rayjob: Resource, waits_for: str = QUOTA) -> str:
    """The stage of a RayJob in words; in the queue with what it waits for there."""
    status = rayjob.get("status") or {}
    deployment, cluster = status.get("jobDeploymentStatus") or "", status.get("rayClusterStatus") or {}
    if is_queued(rayjob):
        queue = rayjob["metadata"].get("labels", {}).get(manifest.QUEUE)
        return f"queued by Kueue in {queue}: {waits_for}" if queue else "suspended"
    if not deployment:
        return "created: waiting for KubeRay to take it up"
    if deployment == "Initializing":
        ready, wanted = cluster.get("readyWorkerReplicas", 0), cluster.get("desiredWorkerReplicas")
        return f"waiting for pods: {ready} of {wanted} workers ready" if wanted else "waiting for pods"
    if deployment == "Running" and status.get("jobStatus") in (None, "", "PENDING"):
        return "the cluster is up: starting the job"
    if deployment == "Retrying":
        why = _said(status)
        return f"failed: KubeRay tries again on a new cluster{f' ({why})' if why else ''}"
    return {"Running": "running", "Complete": "complete"}.get(deployment, deployment)


def _said(status: Resource) -> str:
    """KubeRay's own words: the job's last lines, which follow in its message, are in the log anyway."""
    first_line = (status.get("message") or "").partition("\n")[0].strip()
    return ": ".join(filter(None, (status.get("reason"), first_line)))


def _ended(rayjob: Resource, job: Job) -> JobEnd:
    """How it ended; a JobError in the config's words where a limit of ours was passed."""
    status, name = rayjob.get("status") or {}, rayjob["metadata"]["name"]
    reason, message = status.get("reason") or "", status.get("message") or ""
    if state(rayjob) == "succeeded":
        return JobEnd("SUCCEEDED")
    if rayjob["metadata"].get("deletionTimestamp") or status.get("jobStatus") == "STOPPED":
        return JobEnd("STOPPED")
    if reason == "DeadlineExceeded":
        raise JobError(f"RayJob {name} ran past ray.timeout_s = {job.timeout_s:.0f} s and was stopped by KubeRay")
    if reason == "PreRunningDeadlineExceeded":
        raise JobError(
            f"RayJob {name} had no running cluster after {PRE_RUNNING_TIMEOUT_S} s: no node is free or fits "
            f"(kubectl describe pods), or the image cannot be pulled; {message}"
        )
    exit_code = re.search(r"exit code (-?\d+)", message)
    why = f"with exit code {exit_code[1]}" if exit_code else f"({_said(status) or status['jobDeploymentStatus']})"
    return JobEnd("FAILED", why, message)


def _live(rayjob: Resource) -> LiveJob:
    meta: dict[str, Any] = rayjob["metadata"]
    about = meta.get("annotations") or {}
    return LiveJob(
        meta["name"],
        about.get(manifest.RUN_ID) or meta["labels"].get(manifest.RUN_ID, ""),
        meta["labels"].get(manifest.TASK, ""),
        about.get(manifest.KFP_RUN_ID, ""),
        age_s=_age_s(meta["creationTimestamp"]),
        lifetime_s=float(about.get(manifest.LIFETIME_S, 0)),
    )


def _age_s(time_of: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time_of)).total_seconds()


# What a job in Kueue's queue waits for, in Kueue's words: https://kueue.sigs.k8s.io/docs/concepts/workload/.

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
HOPELESS_S = 180.0  # how long, in seconds, such a reason must last: somebody may be raising the quota


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
            workloads, _ = self._api.list({"kueue.x-k8s.io/job-uid": job_uid}, path=WORKLOADS, patience_s=0)
        except JobError as exc:
            self._is_refused = True
            logger.warning("what the job waits for is not known: %s", exc)
            return QUOTA
        if not never_fits(workloads):
            self._never_since = None
        elif self._never_since is None:
            self._never_since = self._clock()
        return reason_to_wait(workloads)

    @property
    def is_hopeless(self) -> bool:
        """Whether Kueue has said for minutes that the job never fits."""
        return self._never_since is not None and self._clock() - self._never_since > HOPELESS_S


def reason_to_wait(workloads: Sequence[Resource]) -> str:
    """The messages of a job's newest workload: why it was requeued, and why it is not admitted."""
    if not workloads:
        return QUOTA
    newest = _newest(workloads)
    if newest["spec"].get("active") is False:
        return "Kueue gave it up: set spec.active of its workload to true, or stop the run"
    stated = conditions(newest)
    evicted, quota = stated.get("Evicted", {}), stated.get("QuotaReserved", {})
    reasons = [
        condition["message"]
        for condition, status in ((evicted, "True"), (quota, "False"))
        if condition.get("status") == status and condition.get("message")
    ]
    return "; ".join(dict.fromkeys(reasons)) or QUOTA


def never_fits(workloads: Sequence[Resource]) -> bool:
    """Whether Kueue refuses the newest workload for a reason that does not pass by waiting."""
    quota = conditions(_newest(workloads)).get("QuotaReserved", {}) if workloads else {}
    if quota.get("status") != "False":
        return False
    message = quota.get("message") or ""
    by_words = any(words in message for words in NEVER_WORDS) and MAY_FIT_WORDS not in message
    return quota.get("reason") in NEVER_FITS or (quota.get("reason") == "Pending" and by_words)


def _newest(workloads: Sequence[Resource]) -> Resource:
    return max(workloads, key=lambda workload: str(workload["metadata"].get("creationTimestamp", "")))


# A RayJob's log: from its dashboard while that answers, else from the pod that submitted it.

DASHBOARD_S = (2.0, 10.0)  # limits in seconds on connecting to the dashboard and on its answer
AGAIN_S = 30.0  # seconds until a source that did not answer is asked again


class JobLog:
    """Reads the log of one RayJob for a `LogCopy`. A log that cannot be read never fails the job."""

    def __init__(self, api: KubernetesApi, name: str, copy: LogCopy) -> None:
        self._api, self._name, self._copy, self._due = api, name, copy, 0.0
        self._refused: dict[str, float] = {}

    def read(self, status: dict[str, Any], *, final: bool) -> None:
        """Copy new output from the first source that answers; at the end also try those that did not answer before."""
        began = time.monotonic()
        if not final and began < self._due:
            return
        for source, ask in (("dashboard", self._dashboard), ("submitter", self._submitter)):
            if not final and time.monotonic() < self._refused.get(source, 0.0):
                continue
            try:
                text = ask(status)
            except JobError as exc:
                if source not in self._refused:
                    logger.warning("%s", exc)
                self._refused[source] = time.monotonic() + AGAIN_S
                continue
            if text is not None:
                self._copy.take(text, source=source, final=final)
                break
        self._due = time.monotonic() + rest_s(time.monotonic() - began)

    def restart(self) -> None:
        """Start over, because another cluster runs the job from its beginning."""
        self._refused.clear()
        self._copy.restart()

    def _dashboard(self, status: dict[str, Any]) -> str | None:
        import requests

        address = status["dashboardURL"]
        url = address if "://" in address else f"http://{address}"  # KubeRay writes HOST:PORT
        path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
        token = os.environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text(encoding="utf-8").strip() if path else "")
        try:
            answer = requests.get(
                f"{url}/api/jobs/{status.get('jobId') or self._name}/logs",
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=DASHBOARD_S,
            )
        except requests.RequestException as exc:
            raise JobError(f"the dashboard {address} does not answer; reading the submitter's log ({exc})") from exc
        if answer.status_code in (401, 403):
            raise JobError(
                f"the dashboard {address} wants a token: set RAY_AUTH_TOKEN from Secret fineloop-ray; reading the "
                "submitter's log instead"
            )
        if not answer.ok:  # the job has not been submitted yet
            return None
        return str(answer.json().get("logs") or "")

    def _submitter(self, _status: dict[str, Any]) -> str | None:
        return self._api.pod_log({"job-name": self._name})
