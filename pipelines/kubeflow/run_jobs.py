"""The Ray jobs of one run, stopped from where a person is."""

from collections.abc import Mapping

from components.config.ray import RayConfig, RayJobCluster
from components.ray_cluster.submit import stop_run
from components.shared.errors import FineloopError
from pipelines.kubeflow.run import Run

INSTALLED_IN = "fineloop"
"""The namespace of infra/README.md."""


class RunJobs:
    """Stops them as often as it is asked to; a cluster that cannot be reached from here is no error."""

    def __init__(self, run: Run, namespace: str) -> None:
        self._run_id = run.store_run_id
        section = run.config.table.get("ray", {})
        cluster = section.get("cluster", {}) if isinstance(section, Mapping) else {}
        self._ray = RayConfig()
        if cluster.get("kind") == "rayjob":
            where = cluster.get("namespace") or namespace or INSTALLED_IN
            self._ray = RayConfig(cluster=RayJobCluster(kind="rayjob", namespace=where))
        self._why = ""
        self.stopped: list[str] = []

    def stop(self) -> None:
        """Stop the run's jobs that are alive."""
        try:
            self.stopped += [each for each in stop_run(self._run_id, self._ray) if each not in self.stopped]
            self._why = ""
        except FineloopError as exc:
            self._why = str(exc)

    @property
    def lines(self) -> list[str]:
        """What became of them, for people."""
        said = [f"stopped {job_id}" for job_id in self.stopped]
        if self._why:
            said.append(f"its Ray jobs are left to its steps and to the cluster's `fineloop reap`: {self._why}")
        return said
