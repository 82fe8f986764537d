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
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config

from components.shared.errors import GroundError, StoreError
from pipelines.local.local_services import client_environment, down, local_services, store_service, up
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
    code = "import sys; from pathlib import Path; from pipelines.local.local_services import local_services\n"
    code += "with local_services(Path(sys.argv[1]), bucket='bucket-one', ray=False) as e: print(e['AWS_ENDPOINT_URL'])"
    store_service(machine.home).pin()  # so that none of them is gone before another has come
    starting = [
        subprocess.Popen([sys.executable, "-c", code, str(machine.home)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=PATIENCE_S)[0].strip() for process in starting}
    assert answers == {client_environment("store", machine.home)["AWS_ENDPOINT_URL"]}
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
    for path in ("/", "/bucket-one/", "/bucket-one/key"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + path, timeout=5)
        assert refused.value.code == 403
        refused.value.close()


def test_the_server_listens_on_loopback_only(shared):
    machine = Machine(shared[0])
    listeners = machine.listeners(machine.processes(store_service(machine.home)))
    assert len(listeners) >= 5
    assert set(listeners.values()) == {"127.0.0.1"}


def test_the_files_that_hold_the_keys_are_readable_by_their_owner_only(shared):
    for name in ("endpoint.json", "credentials"):
        assert (shared[0] / "store" / name).stat().st_mode & 0o777 == 0o600


def test_a_configured_store_wins_and_nothing_starts(machine, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "theirs")
    with local_services(machine.home, bucket="bucket-one", ray=False) as environment:
        assert environment["AWS_ENDPOINT_URL"] == "https://s3.example.com"
        assert environment["AWS_ACCESS_KEY_ID"] == "theirs"
        assert environment["FINELOOP_CACHE"] == str(machine.home / "cache")
    assert not (machine.home / "store").exists()


def test_a_bucket_name_that_the_server_refuses_is_said_at_once(machine):
    with pytest.raises(GroundError, match=r"refuses the bucket 'B'.*registry\.bucket"):
        up("store", machine.home, "B")


@pytest.mark.slow
def test_a_proxy_and_a_foreign_session_token_do_not_reach_the_embedded_store(machine):
    user = machine.user(http_proxy="http://proxy.example.com:3128", no_proxy="internal", AWS_SESSION_TOKEN="foreign")
    assert user.environment["no_proxy"] == "internal,127.0.0.1,localhost"
    assert user.environment["AWS_SESSION_TOKEN"] == ""
