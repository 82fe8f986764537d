"""A run of Kubeflow whose steps each wait to be ended in some way, with the product's retries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes

from components.config.schema import RunConfig
from components.step.step import COMPONENT
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.compile import for_cluster
from tests.cluster.kube import Kube, until
from tests.cluster.live import OVER

SCRATCH = "/scratch"
START_S = 600.0  # by when an attempt runs: Argo waits for 30 s before the second, and 60 s before the third


class Held:
    """Steps side by side, of which each is a pod, and another one for each attempt."""

    def __init__(self, kube: Kube, host: str, image: str, config: RunConfig, number: int) -> None:
        self._kube, self._gone, self._uids = kube, set[str](), dict[str, str]()
        self._client = connect({}, host=host).client
        package = str(_compiled(number, config, image, kube.scratch / "held.yaml"))
        started = self._client.create_run_from_pipeline_package(
            package, run_name=kube.name, enable_caching=False, service_account="fineloop-pipeline"
        )
        self.run_id = str(started.run_id)

    def running(self, number: int) -> list[str]:
        """The pods of so many steps, once those run that nothing was done to."""

        def found() -> list[str] | None:
            return fresh if len(fresh := self._fresh()) == number else None

        return until(found, f"{number} steps of {self.run_id} run", START_S)

    def _fresh(self) -> list[str]:
        selector = f"pipeline/runid={self.run_id},pipelines.kubeflow.org/v2_component=true"
        pods = {each["metadata"]["name"]: each for each in self._kube.get("pods", "-l", selector).get("items", [])}
        # Kubeflow's drivers have the same labels.
        running = {name: pod["metadata"]["uid"] for name, pod in pods.items() if "-impl-" in name and _runs(pod)}
        self._uids |= running
        return sorted(name for name, uid in running.items() if uid not in self._gone)

    def evict(self, pods: Sequence[str]) -> None:
        """By the API, as `kubectl drain` does."""
        for name in pods:
            self._kube.evict(name)
        self._gone |= {self._uids[name] for name in pods}

    def evict_each(self) -> str:
        """Evict what runs, again and again; Kubeflow's word for the run, once it is over."""

        def over() -> str | None:
            self.evict(self._fresh())
            state = str(self._client.get_run(self.run_id).state)
            return state if state in OVER else None

        return until(over, f"{self.run_id} is over", START_S)

    def fill_disk(self, pods: Sequence[str]) -> None:
        """Past the limit of its volume, for which the kubelet evicts."""
        self._in_each(pods, "dd", "if=/dev/zero", f"of={SCRATCH}/full", "bs=1M", "count=30")

    def touch(self, name: str, pods: Sequence[str]) -> None:
        """One of the files that a step looks for: `memory`, of which it then takes too much, `fail` or `end`."""
        self._in_each(pods, "touch", f"/tmp/{name}")

    def _in_each(self, pods: Sequence[str], *command: str) -> None:
        for name in pods:
            self._kube.kubectl("exec", name, "-c", "main", "--", *command)
        self._gone |= {self._uids[name] for name in pods}

    def state(self) -> str:
        return str(self._client.wait_for_run_completion(self.run_id, timeout=START_S, sleep_duration=2).state)

    def attempts(self) -> list[list[str]]:
        """For each step, what Argo says about the end of each attempt, the first one first."""
        (workflow,) = self._kube.get("workflows", "-l", f"pipeline/runid={self.run_id}")["items"]
        nodes = workflow["status"]["nodes"]
        steps = [
            [nodes[child] for child in node["children"]]
            for node in nodes.values()
            if node["type"] == "Retry" and node["templateName"].endswith("-impl")
        ]
        return [[f"{each['phase']}: {each.get('message', '')}" for each in attempts] for attempts in steps]

    def clean_up(self) -> None:
        self._client.delete_run(self.run_id)


def _runs(pod: dict[str, Any]) -> bool:
    """Whether the container of its step does."""
    return any(each["name"] == "main" and each["ready"] for each in pod["status"].get("containerStatuses", []))


def _compiled(number: int, config: RunConfig, image: str, path: Path) -> Path:
    @dsl.component(**{**COMPONENT, "base_image": image})
    def held() -> None:
        """Do what a file is named after, once it is there."""
        import sys
        import time
        from pathlib import Path

        while not Path("/tmp/end").exists():
            if Path("/tmp/memory").exists():
                print(len(b"x" * (1 << 30)))
            if Path("/tmp/fail").exists():
                sys.exit(1)
            time.sleep(0.2)

    @dsl.pipeline(name="fineloop-held-steps")
    def steps() -> None:
        for _ in range(number):
            task = held()
            for_cluster(config)(task)
            task.set_cpu_request("50m").set_memory_request("64Mi").set_memory_limit("512Mi")
            kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit="10Mi")

    compiler.Compiler().compile(steps, str(path))
    return path
