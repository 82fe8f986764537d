"""A stand-in for the KubeRay operator: takes RayJobs, of the API double or of a real API server, through KubeRay's
states, and runs each entry point as a real process on a double of the dashboard (rayjob_controller.go, v1.7)."""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.checks.policies import ray
from tests.doubles.jobs_api import TOKEN, FakeJob, JobsApi
from tests.doubles.kubernetes.api import KubernetesDouble, Resource, now

if TYPE_CHECKING:
    from tests.doubles.kubernetes.control_plane import RayJobsOfCluster

FINALIZER = "ray.io/rayjob-finalizer"
TICK_S = 0.03


class Operator:
    """Reconciles from construction to `close`."""

    def __init__(
        self, api: "KubernetesDouble | RayJobsOfCluster", directory: Path, environment: Mapping[str, str]
    ) -> None:
        self.api = api
        self.dashboard = JobsApi(directory, environment, token=TOKEN)
        self.dashboard_url = self.dashboard.address.removeprefix("http://")
        """What status.dashboardURL says, without a scheme as KubeRay writes it."""
        self.pods_ready = True
        self.history: list[tuple[str, str]] = []
        """(name, jobDeploymentStatus) of each step, in order."""
        self.past: dict[str, FakeJob] = {}
        """The last job of each cluster that is gone, by name."""
        self.error: BaseException | None = None
        self._started: dict[str, float] = {}
        self._reconciling = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.dashboard.close()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stopping.wait(TICK_S):
                with self.api.changed:
                    found = list(self.api.rayjobs.values())
                for rayjob in found:
                    with self._reconciling:
                        self._reconcile(rayjob)
        except BaseException as exc:  # raised in the test by close
            self.error = exc

    def _reconcile(self, rayjob: Resource) -> None:
        name, spec, status = rayjob["metadata"]["name"], rayjob["spec"], rayjob.get("status") or {}
        state = status.get("jobDeploymentStatus") or ""
        if rayjob["metadata"].get("deletionTimestamp"):
            self._clear(name)
            self.api.remove_finalizers(name)
            return
        steps = {"": self._new, "Initializing": self._initializing, "Running": self._running}
        steps |= {"Suspending": self._suspending, "Suspended": self._suspended, "Retrying": self._retrying}
        new = steps[state](name, spec, status) if state in steps else None
        if new:
            if new.get("jobDeploymentStatus", state) != state:
                self.history.append((name, new["jobDeploymentStatus"]))
            self.api.patch_status(name, new)

    def _new(self, name: str, spec: Resource, _status: Resource) -> Resource:
        made = [{"kind": "RayJob", "metadata": {"name": name}, "spec": spec}]
        problem = "; ".join([*ray.kuberay_takes_the_jobs(made), *ray.kuberay_takes_the_clusters(made)])
        if problem:
            return {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": problem}
        with self.api.changed, contextlib.suppress(KeyError):
            self.api.write(name, lambda found: found["metadata"].update(finalizers=[FINALIZER]))
        self._started[name] = time.monotonic()
        cluster = f"{name}-{int(time.monotonic() * 1e6) % 100_000:05d}"
        begun = {"jobId": spec["jobId"], "rayClusterName": cluster, "startTime": now()}
        return {"jobDeploymentStatus": "Initializing", **begun}

    def _initializing(self, name: str, spec: Resource, status: Resource) -> Resource | None:
        if spec.get("suspend"):
            return {"jobDeploymentStatus": "Suspending"}
        if late := self._deadline(name, spec, "preRunningDeadlineSeconds", "PreRunningDeadlineExceeded"):
            return late
        wanted = sum(group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"])
        workers = {"desiredWorkerReplicas": wanted, "readyWorkerReplicas": wanted if self.pods_ready else 0}
        if not self.pods_ready:
            return {"rayClusterStatus": workers} if status.get("rayClusterStatus") != workers else None
        self._submit(name, spec)
        ready = {"rayClusterStatus": workers, "dashboardURL": self.dashboard_url}
        return {"jobDeploymentStatus": "Running", **ready}

    def _running(self, name: str, spec: Resource, status: Resource) -> Resource | None:
        if spec.get("suspend"):
            return {"jobDeploymentStatus": "Suspending"}
        if late := self._deadline(name, spec, "activeDeadlineSeconds", "DeadlineExceeded"):
            self._clear(name)
            return late
        job = self.dashboard.jobs[name]
        if job.status == "RUNNING":
            return {"jobStatus": "RUNNING"} if status.get("jobStatus") != "RUNNING" else None
        if job.status == "FAILED":
            return self._after_failure(spec, status, job.process.poll(), job.log_path.read_text())
        return {"jobStatus": job.status, "jobDeploymentStatus": "Complete", "endTime": now()}

    def _after_failure(self, spec: Resource, status: Resource, exit_code: int | None, log: str) -> Resource:
        failed = status.get("failed", 0) + 1
        state = "Retrying" if failed <= spec.get("backoffLimit", 0) else "Failed"
        reply = f"Job entrypoint command failed with exit code {exit_code}, last available logs (truncated):"
        why = {"reason": "AppFailed", "message": f"{reply}\n{log[-20_000:]}"}
        return {"jobStatus": "FAILED", "jobDeploymentStatus": state, **why, "failed": failed, "endTime": now()}

    def _suspending(self, name: str, _spec: Resource, _status: Resource) -> Resource:
        self._clear(name)
        return {"jobDeploymentStatus": "Suspended", **_RESET}

    def _retrying(self, name: str, _spec: Resource, _status: Resource) -> Resource:
        self._clear(name)
        return {"jobDeploymentStatus": "", **_RESET}

    def _suspended(self, _name: str, spec: Resource, _status: Resource) -> Resource | None:
        return None if spec.get("suspend") else {"jobDeploymentStatus": "", "jobStatus": ""}

    def _deadline(self, name: str, spec: Resource, field: str, reason: str) -> Resource | None:
        if time.monotonic() - self._started[name] < spec[field]:
            return None
        return {"jobDeploymentStatus": "Failed", "reason": reason, "message": f"The RayJob has passed the {field}"}

    def _submit(self, name: str, spec: Resource) -> None:
        """What the submitter pod does; its log is the job's, between lines of its own."""
        submitted = {"submission_id": name, "entrypoint": spec["entrypoint"], "metadata": spec["metadata"]}
        code, reply = self.dashboard.answer("POST", "/api/jobs/", submitted, f"Bearer {TOKEN}")
        assert code == 200, reply
        pod = f"{name}-x7k2p"
        log_path = self.dashboard.jobs[name].log_path
        self.api.pod_logs[pod] = lambda: f"Job submission server address: http://head:8265\n{log_path.read_text()}"
        self.api.pods[pod] = {
            "metadata": {"name": pod, "labels": {"job-name": name}, "creationTimestamp": now()},
            "spec": {"containers": [{"name": "ray-job-submitter"}]},
            "status": {"phase": "Running"},
        }

    def replace_head(self, name: str) -> None:
        """What follows the loss of a head: a new one in the same cluster, on which a second submitter starts the job
        anew under its id; the RayJob goes on as Running (KubeRay 1.6 and 1.7, on a real cluster)."""
        with self._reconciling:
            self._clear(name)
            self._submit(name, self.api.rayjobs[name]["spec"])

    def _clear(self, name: str) -> None:
        """Delete the cluster, and with it the job."""
        if name in self.dashboard.jobs:
            self.dashboard.answer("POST", f"/api/jobs/{name}/stop", None, f"Bearer {TOKEN}")
            self.past[name] = self.dashboard.jobs.pop(name)
        self.api.pods.pop(f"{name}-x7k2p", None)


_RESET: dict[str, Any] = {"jobId": None, "rayClusterName": None, "dashboardURL": None, "jobStatus": "", "reason": None}
