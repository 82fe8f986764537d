"""Servers that the users of a home share: who starts them, who keeps them up, and that they go with the last."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config

from components.shared.errors import GroundError, StoreError
from pipelines.local import ray_head
from pipelines.local.local_services import client_environment, down, local_services, ray_service, store_service, up
from pipelines.local.server import ROOT
from tests.pipelines.local.conftest import Machine
from tests.waiting import PATIENCE_S, wait_until


def client(environment: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def test_two_users_share_one_server_which_survives_the_first_ones_exit_and_goes_with_the_last(machine, tmp_path):
    service = store_service(machine.home)
    (tmp_path / "tmp").mkdir()
    first = machine.user(TMPDIR=str(tmp_path / "tmp"))
    keeper = machine.keeper_pid(service)
    second = machine.user()
    assert second.environment == first.environment
    assert machine.keeper_pid(service) == keeper
    processes = machine.processes(service)
    assert len(processes) == 3  # keeper, guard, server
    first.leave()
    time.sleep(1.0)
    client(second.environment).put_object(Bucket="bucket-one", Key="k", Body=b"v")
    assert machine.alive(processes) == processes
    second.leave()
    machine.wait_gone(processes)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_server_goes_and_its_ports_close_when_its_user_is_killed(machine):
    user = machine.user()
    processes = machine.processes(store_service(machine.home))
    ports = machine.listeners(processes)
    assert int(user.environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]) in ports
    user.kill()
    machine.wait_gone(processes)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert store_service(machine.home).endpoint() is None


@pytest.mark.parametrize("victim", ["keeper", "guard"])
def test_nothing_is_left_when_a_part_is_killed_and_the_next_user_gets_the_same_address_and_data(machine, victim):
    service = store_service(machine.home)
    first = machine.user()
    client(first.environment).put_object(Bucket="bucket-one", Key="kept", Body=b"written before the kill")
    processes = machine.processes(service)
    keeper = machine.keeper_pid(service)
    guard_pid = next(each.pid for each in processes if "guard.py" in " ".join(each.cmdline()) and each.pid != keeper)
    os.kill(keeper if victim == "keeper" else guard_pid, signal.SIGKILL)
    machine.wait_gone(processes)
    second = machine.user()
    assert second.environment == first.environment
    body = client(second.environment).get_object(Bucket="bucket-one", Key="kept")["Body"].read()
    assert body == b"written before the kill"


def test_ctrl_c_while_the_server_starts_ends_once_nothing_of_it_runs(machine):
    """The judge is /proc: no process has the home in its command line."""
    service = store_service(machine.home)
    user = machine.begins()
    wait_until(lambda: _naming(machine.home, " mini "))  # weed, whose endpoint is not published yet
    user.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in user.communicate(timeout=PATIENCE_S)[1]
    assert _naming(machine.home) == []
    assert service.endpoint() is None


def test_what_fails_because_its_server_ended_says_so(machine):
    service = store_service(machine.home)

    @local_services(machine.home, bucket="bucket-one", ray=False)
    def works() -> None:
        next(each for each in machine.processes(service) if "mini" in each.cmdline()).kill()
        wait_until(lambda: service.endpoint() is None)
        raise StoreError("the store cannot be reached")

    with pytest.raises(StoreError, match="cannot be reached") as raised:
        works()
    assert raised.value.__notes__ == [
        f"the local S3 server ended while it was in use: see the logs in {service.directory}"
    ]


def _naming(home: Path, *words: str) -> list[str]:
    lines = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    ours = [line for line in lines if f"{home}/store" in line or f"keeper store {home}" in line]
    return [line for line in ours if all(word in line for word in words)]


def test_a_stale_endpoint_file_fools_nobody(machine):
    service = store_service(machine.home)
    stale = {"url": "http://127.0.0.1:9", "access_key": "a", "secret_key": "b", "bucket": "bucket-one"}
    service.path("endpoint.json").write_text(json.dumps({**stale, "keeper_pid": os.getpid()}))
    with pytest.raises(GroundError, match=r"the local S3 server is not up under .*`fineloop store up`"):
        client_environment("store", machine.home)
    user = machine.user()
    assert user.environment["AWS_ENDPOINT_URL"] != "http://127.0.0.1:9"
    client(user.environment).head_bucket(Bucket="bucket-one")


def test_up_keeps_the_server_without_users_until_down(machine):
    environment = up("store", machine.home, "bucket-one")
    processes = machine.processes(store_service(machine.home))
    time.sleep(1.0)
    assert machine.alive(processes) == processes
    assert client_environment("store", machine.home) == environment
    user = machine.user()
    assert user.environment["AWS_ENDPOINT_URL"] == environment["AWS_ENDPOINT_URL"]
    user.leave()
    time.sleep(1.0)
    assert machine.alive(processes) == processes
    assert down("store", machine.home)
    assert not machine.alive(processes)
    assert not down("store", machine.home)


def test_down_refuses_while_a_run_uses_the_server_which_then_goes_with_the_run(machine):
    up("store", machine.home, "bucket-one")
    user = machine.user()
    processes = machine.processes(store_service(machine.home))
    with pytest.raises(GroundError, match="in use: it is no longer pinned"):
        down("store", machine.home)
    client(user.environment).head_bucket(Bucket="bucket-one")
    user.leave()
    machine.wait_gone(processes)


@pytest.mark.slow
def test_a_pinned_server_goes_when_its_home_is_deleted(machine):
    up("store", machine.home, "bucket-one")
    processes = machine.processes(store_service(machine.home))
    shutil.rmtree(machine.home)
    machine.wait_gone(processes)


@pytest.mark.slow
def test_users_that_start_at_once_get_one_server(machine):
    store_service(machine.home).pin()  # so that none of them is gone before another has come
    starting = [machine.begins() for _ in range(4)]
    answers = [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in starting]
    urls = {environment["AWS_ENDPOINT_URL"] for environment in answers}
    assert urls == {client_environment("store", machine.home)["AWS_ENDPOINT_URL"]}
    log = (machine.home / "store" / "keeper.log").read_text()
    assert log.count("is up at") == 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for the tests that only look at it."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
            environment.delenv(name)
        home = tmp_path_factory.mktemp("shared") / "home"
        with local_services(home, bucket="bucket-one", ray=False) as variables:
            yield home, variables


def test_a_second_bucket_is_created_on_the_server_that_is_up(shared):
    home, environment = shared
    with local_services(home, bucket="bucket-two", ray=False) as other:
        names = {bucket["Name"] for bucket in client(other).list_buckets()["Buckets"]}
    assert {"bucket-one", "bucket-two"} <= names
    assert other == environment


def test_a_request_without_credentials_is_refused(shared):
    url = shared[1]["AWS_ENDPOINT_URL"]
    assert [status_of(url + path) for path in ("/", "/bucket-one/", "/bucket-one/key")] == [403] * 3


def test_the_server_listens_on_loopback_only(shared):
    machine = Machine(shared[0])
    listeners = machine.listeners(machine.processes(store_service(machine.home)))
    assert len(listeners) >= 5
    assert set(listeners.values()) == {"127.0.0.1"}


def test_the_files_that_hold_the_keys_are_readable_by_their_owner_only(shared):
    for name in ("endpoint.json", "credentials"):
        assert (shared[0] / "store" / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("ray", [False, True], ids=["a store", "a store and a cluster"])
def test_what_is_configured_wins_and_nothing_starts(machine, monkeypatch, ray):
    theirs = {"AWS_ENDPOINT_URL": "https://s3.example.com", "AWS_ACCESS_KEY_ID": "theirs"}
    theirs |= {"RAY_ADDRESS": "http://ray.example.com:8265", "RAY_AUTH_TOKEN": "theirs"} if ray else {}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    with local_services(machine.home, bucket="bucket-one", ray=ray) as environment:
        assert environment.items() >= {**theirs, "FINELOOP_CACHE": str(machine.home / "cache")}.items()
    assert not machine.home.exists()


def test_a_bucket_name_that_the_server_refuses_is_said_at_once(machine):
    with pytest.raises(GroundError, match=r"refuses the bucket 'B'.*registry\.bucket"):
        up("store", machine.home, "B")


@pytest.mark.slow
def test_a_proxy_and_a_foreign_session_token_do_not_reach_the_embedded_store(machine):
    user = machine.user(http_proxy="http://proxy.example.com:3128", no_proxy="internal", AWS_SESSION_TOKEN="foreign")
    assert user.environment["no_proxy"] == "internal,127.0.0.1,localhost"
    assert user.environment["AWS_SESSION_TOKEN"] == ""


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
    command, env = [sys.executable, "-c", JOB], {**os.environ, **environment}
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout + done.stderr


@contextmanager
def another_ray() -> Iterator[None]:
    """A process that Ray takes for another cluster's, by its command line (ray/_private/services.py,
    _find_address_from_flag)."""
    argv = ["raylet", "-c", "input()", "--gcs-address=127.0.0.1:1"]
    with subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE) as process:
        yield
        process.communicate(b"\n")


def status_of(url: str, token: str | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


@pytest.mark.e2e
@pytest.mark.slow
def test_a_job_runs_here_with_the_store_in_its_environment_and_everything_goes_with_the_user(machine):
    user = machine.user(ray=True)
    head, shared = ray_service(machine.home), store_service(machine.home)
    processes = machine.processes(head) | machine.processes(shared)
    # Only whoever can read the token gets in, and only from this machine.
    url, token_path = user.environment["RAY_ADDRESS"], Path(user.environment["RAY_AUTH_TOKEN_PATH"])
    token = token_path.read_text()
    assert token_path.stat().st_mode & 0o777 == 0o600
    assert [status_of(f"{url}/api/jobs/", each) for each in (token, None, "0" * 64)] == [200, 401, 403]
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


@pytest.mark.e2e
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


@pytest.mark.e2e
def test_a_long_home_and_a_long_temporary_directory_do_not_break_the_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("t" * 100)))
    made = ray_head._short_temp_dir()
    assert len(str(made)) <= ray_head.LONGEST_TEMP_DIR
    made.rmdir()
