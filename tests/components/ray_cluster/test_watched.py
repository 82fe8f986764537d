"""A watch on one object while the API server is away."""

from types import SimpleNamespace
from typing import Any

import pytest

from components.ray_cluster import kubernetes_api
from components.ray_cluster.kubernetes_api import Watched
from components.shared.errors import JobError


def test_an_api_server_that_is_away_for_minutes_is_waited_for(monkeypatch, caplog):
    """The job goes on without it; the step that follows it is not lost with the run. The clock is the test's."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, sleep=lambda _: None)
    monkeypatch.setattr(kubernetes_api, "time", clock)

    class Away:
        def list(self, *_: object, **__: object) -> Any:
            return [{"metadata": {"name": "job"}}], "1"

        def events(self, *_: object, **__: object) -> Any:
            raise ConnectionResetError

        def refusal(self, what: str, _error: Exception) -> JobError:
            return JobError(what)

    watched = Watched(Away(), "job")  # type: ignore[arg-type] - a double of the API
    watched.wait(0)
    for clock.now in (1.0, 60.0, 300.0, 590.0):
        assert watched.wait(0) is not None
    assert [message.partition(":")[0] for message in caplog.messages] == ["the Kubernetes API is away"]
    clock.now = 700.0
    with pytest.raises(JobError, match="watch rayjobs"):
        watched.wait(0)
