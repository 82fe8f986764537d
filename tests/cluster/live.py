"""Kubeflow on a live cluster as its users see it: by the public command line and the registry."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.kube import ROOT, Kube, until

RUN_S = 3600.0  # how long a short run may take on a cluster whose nodes and images have to come first
MINUTES = ("train.max_steps=240", "train.epochs=100", "train.early_stopping_patience=0")
"""What makes a training so long that something can happen to it: ten minutes on two small CPU workers."""
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


@dataclass(frozen=True)
class Answered:
    """What a command answered; `body` is the JSON that it printed."""

    exit_code: int
    body: dict[str, Any]
    stderr: str


@dataclass
class Live:
    """Runs of an adapter of the test's own."""

    host: str
    image: str
    kube: Kube
    started: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> str:
        return self.kube.name

    @property
    def settings(self) -> list[str]:
        return [*self.kube.settings, f"registry.prefix={self.kube.prefix}"]

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
        answered = self.fineloop("runs", "list", "--adapter", self.adapter, "--host", self.host)
        assert answered.exit_code == 0, answered.stderr
        return list(answered.body["runs"])

    def ended(self, run_id: str) -> dict[str, Any]:
        return until(lambda: run if (run := self.run(run_id))["state"] in OVER else None, f"{run_id} is over", RUN_S)

    def production(self) -> str | None:
        where = [word for key in self.settings if key.startswith("registry.") for word in ("--set", key)]
        answered = self.fineloop("adapters", "list", self.adapter, *where)
        if answered.exit_code:
            assert answered.body["error"]["kind"] == "UnknownName", answered.stderr
            return None
        promoted = [each["version"] for each in answered.body["versions"] if "production" in each["aliases"]]
        return promoted[0] if promoted else None

    def training(self, run_id: str) -> dict[str, Any]:
        """The run's RayJob, once the training has recorded a step."""

        def trains() -> bool:
            run = self.fineloop("runs", "show", run_id, "--host", self.host)
            assert run.body["state"] not in OVER, f"{run_id} is over before it has trained:\n{run.stderr}"
            return "step " in run.stderr

        until(trains, f"{run_id} trains", RUN_S)
        (rayjob,) = self.kube.rayjobs(run_id)
        return rayjob

    def clean_up(self) -> None:
        """Leave nothing of a test: schedules go first, for they start runs."""
        from pipelines.kubeflow.client import connect

        self.kube.has_trained = True
        kubeflow = connect(os.environ, host=self.host).client
        for name in self.schedules:
            self.fineloop("schedule", "delete", name, "--host", self.host)
        for run_id in {*self.started, *(run["run_id"] for run in self.runs())}:
            self.fineloop("runs", "stop", run_id, "--host", self.host)
            self.kube.delete_rayjobs(run_id)
            kubeflow.delete_run(run_id)

    def _what(self, settings: Sequence[str]) -> list[str]:
        keys = (f"adapter.name={self.adapter}", *self.settings, *settings)
        image = ["--image", self.image] if self.image else []
        return ["--host", self.host, *image, *(word for key in keys for word in ("--set", key))]
