import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from components.shared.errors import GroundError
from pipelines.local import ray_head
from pipelines.local.local_services import client_environment, down, local_services, ray_service, store_service, up
from pipelines.local.server import ROOT
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

JOB = """
import json, requests, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
code = "import json, os, ray, ray_jobs; from ray.util.state import list_nodes; ray.init(); "
code += "found = ray.remote(lambda: dict(os.environ, NODES=str(len(list_nodes())))).remote(); "
code += "print('RESULT', json.dumps(ray.get(found)), flush=True)"
job = client.submit_job(entrypoint=f'python -c "{code}"')
deadline = time.monotonic() + 240
while time.monotonic() < deadline:
    time.sleep(0.25)
    try:
        status, log = client.get_job_status(job), client.get_job_logs(job)
    except requests.ConnectionError:  # a busy dashboard resets one now and then, which `components.shared` survives too
        continue
    if status.is_terminal():
        break
print(status.value, client.get_job_logs(job))
"""


def run_job(environment: dict[str, str]) -> str:
    """Submit from a process of its own, as a pipeline step does."""
    done = subprocess.run(
        [sys.executable, "-c", JOB],
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.stdout + done.stderr


@contextmanager
def another_ray() -> Iterator[None]:
    """A process that Ray takes for another cluster's, by its command line (ray/_private/services.py,
    _find_address_from_flag)."""
    argv = ["raylet", "-c", "input()", "--gcs-address=127.0.0.1:1"]
    with subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE) as process:
        yield
        process.communicate(b"\n")


def status_of(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/api/jobs/", headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


@pytest.mark.slow
def test_a_job_runs_here_with_the_store_in_its_environment_and_everything_goes_with_the_user(machine):
    user = machine.user(ray=True)
    head, shared = ray_service(machine.home), store_service(machine.home)
    processes = machine.processes(head) | machine.processes(shared)
    # Only whoever can read the token gets in, and only from this machine.
    url, token_path = user.environment["RAY_ADDRESS"], Path(user.environment["RAY_AUTH_TOKEN_PATH"])
    token = token_path.read_text()
    assert token_path.stat().st_mode & 0o777 == 0o600
    assert [status_of(url, each) for each in (token, None, "0" * 64)] == [200, 401, 403]
    addresses = set(machine.listeners(machine.processes(head)).values())
    assert addresses == {"127.0.0.1", "::ffff:127.0.0.1"}
    with another_ray():
        answer = run_job(user.environment)
    assert answer.startswith("SUCCEEDED"), answer
    inherited = json.loads(answer.split("RESULT ", 1)[1].splitlines()[0])
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FINELOOP_CACHE"):
        assert inherited[name] == user.environment[name]
    assert inherited["NODES"] == "1"
    assert inherited["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert inherited["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert (machine.home / "ray" / "logs" / "raylet.out").exists()
    temp_dir = Path((machine.home / "ray" / "temp_dir").read_text().splitlines()[0])
    assert (temp_dir / "ray").stat().st_mode & 0o777 == 0o777  # Ray's own doing, for which it lies in a closed folder
    assert temp_dir.stat().st_mode & 0o777 == 0o700
    user.kill()
    machine.wait_gone(processes)
    assert not temp_dir.exists()
    assert (machine.home / "ray" / "logs" / "raylet.out").is_file()  # kept for whoever looks for the reason


@pytest.mark.full
def test_up_keeps_head_and_store_and_a_run_with_another_store_is_refused_until_down(machine, monkeypatch):
    environment = up("ray", machine.home, "bucket-one")
    head = ray_service(machine.home)
    processes, of_store = machine.processes(head), machine.processes(store_service(machine.home))
    time.sleep(1.0)
    assert machine.alive(processes) == processes
    with pytest.raises(GroundError, match="fineloop ray down"):
        down("store", machine.home)  # the head uses it
    assert client_environment("store", machine.home)["AWS_ENDPOINT_URL"] == environment["AWS_ENDPOINT_URL"]
    user = machine.user(ray=True)
    assert psutil.Process(machine.keeper_pid(head)) in processes
    user.leave()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "theirs")
    refused = pytest.raises(GroundError, match=rf"the store {environment['AWS_ENDPOINT_URL']}, .* `fineloop ray down`")
    with refused, local_services(machine.home, bucket="bucket-one"):
        pass
    assert machine.alive(processes) == processes
    assert down("ray", machine.home)
    assert not machine.alive(processes)
    machine.wait_gone(of_store)  # the head was its last user
    with local_services(machine.home, bucket="bucket-one"):
        assert store_service(machine.home).endpoint() is None
        assert psutil.Process(machine.keeper_pid(head)) not in processes


def test_a_configured_cluster_wins_and_nothing_starts(machine, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    monkeypatch.setenv("RAY_ADDRESS", "http://ray.example.com:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    with local_services(machine.home, bucket="bucket-one") as environment:
        assert environment["RAY_ADDRESS"] == "http://ray.example.com:8265"
        assert environment["RAY_AUTH_TOKEN"] == "theirs"
    assert not machine.home.exists()


def test_a_long_home_and_a_long_temporary_directory_do_not_break_the_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("t" * 100)))
    made = ray_head._short_temp_dir()
    assert len(str(made)) <= ray_head.LONGEST_TEMP_DIR
    made.rmdir()
