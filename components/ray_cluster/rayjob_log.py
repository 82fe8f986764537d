"""A RayJob's log: from its dashboard while that answers, else from the pod that submitted it."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.ray_cluster.backend import LogCopy, Turns
from components.ray_cluster.kubernetes_api import KubernetesApi
from components.shared.errors import JobError

logger = logging.getLogger(__name__)

DASHBOARD_S = (2.0, 10.0)
"""Limits in seconds on connecting to the dashboard and on its answer."""
AGAIN_S = 30.0
"""Seconds until a source that did not answer is asked again."""


class JobLog:
    """Reads the log of one RayJob for a `LogCopy`. A log that cannot be read never fails the job."""

    def __init__(
        self, api: KubernetesApi, name: str, copy: LogCopy, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api, self._name, self._copy, self._turns = api, name, copy, Turns(clock)
        self._refused: dict[str, float] = {}

    def read(self, status: dict[str, Any], *, final: bool) -> None:
        """Copy new output from the first source that answers; at the end also try those that did not answer before."""
        if final or self._turns.is_due:
            with self._turns.reading():
                self._copy_new(status, final=final)

    def _copy_new(self, status: dict[str, Any], *, final: bool) -> None:
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
                return

    def restart(self) -> None:
        """Start over, because another cluster runs the job from its beginning."""
        self._refused.clear()
        self._copy.restart()

    def _dashboard(self, status: dict[str, Any]) -> str | None:
        import requests

        address = status["dashboardURL"]
        url = address if "://" in address else f"http://{address}"  # KubeRay writes HOST:PORT
        token = _token()
        try:
            answer = requests.get(
                f"{url}/api/jobs/{status.get('jobId') or self._name}/logs",
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=DASHBOARD_S,
            )
        except requests.RequestException as exc:
            raise JobError(
                f"the dashboard {address} does not answer; reading the submitter's log instead ({exc})"
            ) from exc
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


def _token() -> str:
    """The token from either of the two variables by which Ray gives one to a client; empty if neither is set."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    return os.environ.get("RAY_AUTH_TOKEN", "") or (Path(path).read_text(encoding="utf-8").strip() if path else "")
