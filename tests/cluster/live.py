"""A live cluster as its users see it: by the public command line, the Kubernetes API and the registry."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 3600.0  # how long a short run may take on a cluster whose nodes and images have to come first
SOON_S = 900.0  # how long one thing of it may
MINUTES = ("train.max_steps=240", "train.epochs=100", "train.early_stopping_patience=0")
"""What makes a training so long that something can happen to it: ten minutes on two small CPU workers."""
COMPONENT = "app.kubernetes.io/component"
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """What a command answered; `body` is the JSON that it printed."""

    exit_code: int
    body: dict[str, Any]
    stderr: str


@dataclass
class Live:
    """`settings` are keys that fit the config to the cluster, `adapter` a name that nobody else uses."""

    host: str
    namespace: str
    image: str
    settings: Sequence[str]
    adapter: str
    started: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)  # names of Kubernetes Jobs

    def fineloop(self, *arguments: str) -> Answered:
        done = subprocess.run(
            [Path(sys.executable).parent / "fineloop", *arguments, "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        lines = done.stdout.splitlines()
        return Answered(done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr)

    def submit(self, *arguments: str, settings: Sequence[str] = (), wait: bool = True) -> Answered:
        """Submit the example, shortened and under this adapter's name."""
        answered = self.fineloop("submit", *self._what(settings), *([] if wait else ["--no-wait"]), *arguments)
        self.started += [answered.body["run_id"]] if "run_id" in answered.body else []
        return answered

    def schedule(self, verb: str, *arguments: str, settings: Sequence[str] = ()) -> Answered:
        what = self._what(settings) if verb == "create" else ["--host", self.host]
        self.schedules = [self.adapter]
        answered = self.fineloop("schedule", verb, self.adapter, *what, *arguments)
        assert answered.exit_code == 0, answered.stderr
        return answered

    def run(self, run_id: str) -> dict[str, Any]:
        answered = self.fineloop("runs", "show", run_id, "--host", self.host)
        assert answered.exit_code == 0, answered.stderr
        return answered.body

    def runs(self) -> list[dict[str, Any]]:
        found = self.fineloop("runs", "list", "--adapter", self.adapter, "--host", self.host)
        assert found.exit_code == 0, found.stderr
        listed: list[dict[str, Any]] = found.body["runs"]
        return listed

    def ended(self, run_id: str) -> dict[str, Any]:
        return self.until(
            lambda: run if (run := self.run(run_id))["state"] in OVER else None, f"{run_id} is over", RUN_S
        )

    def production(self) -> str | None:
        where = [each for key in self.settings if key.startswith("registry.") for each in ("--set", key)]
        answered = self.fineloop("adapters", "list", self.adapter, *where)
        if answered.exit_code:
            assert answered.body["error"]["kind"] == "UnknownName", answered.stderr
            return None
        promoted = [each["version"] for each in answered.body["versions"] if "production" in each["aliases"]]
        return promoted[0] if promoted else None

    def rayjobs(self, run_id: str) -> list[dict[str, Any]]:
        found = self._custom.list_namespaced_custom_object(
            "ray.io", "v1", self.namespace, "rayjobs", label_selector=f"fineloop.dev/run-id={run_id}"
        )
        return [each for each in found["items"] if not each["metadata"].get("deletionTimestamp")]

    def training(self, run_id: str) -> dict[str, Any]:
        """The run's RayJob, once the training has recorded a step."""

        def trains() -> bool:
            run = self.fineloop("runs", "show", run_id, "--host", self.host)
            assert run.body["state"] not in OVER, f"{run_id} is over before it has trained:\n{run.stderr}"
            return "step " in run.stderr

        self.until(trains, f"{run_id} trains", RUN_S)
        (rayjob,) = self.rayjobs(run_id)
        return rayjob

    def pods(self, *labels: str) -> list[str]:
        found = self._core.list_namespaced_pod(self.namespace, label_selector=",".join(labels)).items
        return [
            pod.metadata.name for pod in found if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp
        ]

    def ray_pods(self, run_id: str, *kinds: str) -> list[str]:
        """Names of the head and worker pods of its job, also terminating ones, which still hold their GPUs."""
        found = self._core.list_namespaced_pod(self.namespace, label_selector=f"fineloop.dev/run-id={run_id}").items
        kinds = kinds or ("ray-head", "ray-worker")
        return [pod.metadata.name for pod in found if pod.metadata.labels.get(COMPONENT) in kinds]

    def delete_pod(self, name: str) -> None:
        """As a drained node does."""
        self._core.delete_namespaced_pod(name, self.namespace)

    def patch_rayjob(self, name: str, body: dict[str, Any]) -> None:
        self._custom.patch_namespaced_custom_object("ray.io", "v1", self.namespace, "rayjobs", name, body)

    def start_reaper(self, name: str) -> None:
        """The cluster's own CronJob, now."""
        template = self._batch.read_namespaced_cron_job("fineloop-reap", self.namespace).spec.job_template
        body = {"metadata": {"name": name}, "spec": self._batch.api_client.sanitize_for_serialization(template.spec)}
        self.jobs.append(name)
        self._batch.create_namespaced_job(self.namespace, body)

    def until(self, look: Callable[[], T | None], what: str, timeout_s: float = SOON_S) -> T:
        deadline = time.monotonic() + timeout_s
        while not (seen := look()):
            assert time.monotonic() < deadline, f"after {timeout_s:.0f} s not: {what}"
            time.sleep(2)
        return seen

    def clean_up(self) -> None:
        """Leave nothing of a test: schedules go first, for they start runs."""
        from pipelines.kubeflow.client import connect

        kubeflow = connect(os.environ, host=self.host).client
        for name in self.schedules:
            self.fineloop("schedule", "delete", name, "--host", self.host)
        for run_id in {*self.started, *(run["run_id"] for run in self.runs())}:
            self.fineloop("runs", "stop", run_id, "--host", self.host)
            for rayjob in self.rayjobs(run_id):
                where = ("ray.io", "v1", self.namespace, "rayjobs", rayjob["metadata"]["name"])
                _delete(self._custom.delete_namespaced_custom_object, *where)
            kubeflow.delete_run(run_id)
        for name in self.jobs:
            _delete(self._batch.delete_namespaced_job, name, self.namespace, propagation_policy="Background")

    def _what(self, settings: Sequence[str]) -> list[str]:
        keys = (f"adapter.name={self.adapter}", *self.settings, *settings)
        image = ["--image", self.image] if self.image else []
        return ["--host", self.host, *image, *(word for key in keys for word in ("--set", key))]

    @cached_property
    def _client(self) -> Any:
        from kubernetes import config

        return config.new_client_from_config()

    @cached_property
    def _core(self) -> Any:
        from kubernetes import client

        return client.CoreV1Api(self._client)

    @cached_property
    def _batch(self) -> Any:
        from kubernetes import client

        return client.BatchV1Api(self._client)

    @cached_property
    def _custom(self) -> Any:
        from kubernetes import client

        return client.CustomObjectsApi(self._client)


def _delete(delete: Callable[..., Any], *arguments: str, **options: str) -> None:
    from kubernetes.client import ApiException

    try:
        delete(*arguments, **options)
    except ApiException as exc:
        if exc.status != 404:
            raise
