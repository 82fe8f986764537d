"""What many tests share: one real S3 server for the test run, and a fresh prefix of it for each test."""

import contextlib
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components.shared import garbage
from components.store.client import client_from_environment
from components.store.store import Store
from pipelines.local import seaweedfs
from pipelines.local.local_services import store_service
from tests import warm

if TYPE_CHECKING:
    from tests.doubles.kubernetes.control_plane import ControlPlane

# A process keeps the mode that it first imports Ray with, and whatever answers as a cluster here wants a token. It is
# imported now, since a test may take the variable away while something else imports it.
os.environ.setdefault("RAY_AUTH_MODE", "token")
importlib.import_module("ray")
# A worker's 15 would wait minutes for a test process that is busy, as in pipelines/local/ray_head.py.
os.environ.setdefault("RAY_worker_niceness", "0")

if not shutil.which("nvidia-smi"):
    # As the product's own jobs are without a GPU, where nothing is compiled: pipelines/local/server.py.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of test processes that wait for each other on the same cores cost three times the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the tests in the background lets them, and every process that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

STARTS_SERVERS = {"machine", "stub_cluster", "server", "cluster", "control_plane"}
"""Fixtures that start a server for a test; what is marked e2e starts Ray."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `pytest -m cluster` runs against."""
    group = parser.getgroup("cluster", "a live cluster, for -m cluster")
    group.addoption("--host", default="", metavar="URL", help="its Kubeflow Pipelines")
    group.addoption("--namespace", default="fineloop", metavar="NAME", help="where its runs are")
    group.addoption("--step-image", default="", metavar="IMAGE", help="image of every step")
    group.addoption("--set", action="append", default=[], metavar="KEY=VALUE", help="fits the example's config to it")


def pytest_configure(config: pytest.Config) -> None:
    """All processes of a run share one Python that forks what takes long to import."""
    if warm.VARIABLE not in os.environ:
        stack = contextlib.ExitStack()
        os.environ[warm.VARIABLE] = stack.enter_context(warm.running())
        stack.callback(os.environ.pop, warm.VARIABLE)
        config.add_cleanup(stack.close)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all files without looking for garbage among them."""
    with garbage.importing():
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a cluster its tests are skipped, and without Kubeflow those that need it. One that starts servers, or
    ranks that meet on ports, is tried once more, as any process may take a port between the choice and the bind; the
    closing lines name it. Of processes that share the files, none takes a long one at the end: first come those that
    start Ray, then those with servers or ranks, and files of a test or two, which have no more because they are long.
    """
    for item in items:
        meets_on_ports = "tests.models.train_group" in {
            getattr(each, "__module__", "") for each in vars(item.module).values()
        }
        if meets_on_ports or item.get_closest_marker("e2e") or STARTS_SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.flaky(reruns=1))
    for item in items:
        if item.get_closest_marker("cluster"):
            needs_kubeflow = "live" in getattr(item, "fixturenames", ())
            if needs_kubeflow and not config.getoption("--host"):
                item.add_marker(pytest.mark.skip(reason="on a live cluster with Kubeflow alone: --host URL"))
            elif not re.search(r"\bcluster\b", config.option.markexpr.replace("not cluster", "")):
                item.add_marker(pytest.mark.skip(reason="on a live cluster alone: -m cluster"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        long = {path for path, count in tests.items() if count <= 2}
        long |= {item.path for item in items if item.get_closest_marker("flaky")}
        items.sort(key=lambda item: (item.get_closest_marker("e2e") is None, item.path not in long, -tests[item.path]))


@pytest.fixture(scope="module", autouse=True)
def _leaks_are_found_where_they_were_made() -> Iterator[None]:
    """A socket that nobody closed is an error of whichever test runs when Python collects it: so, of the same file.

    What lived before the file is looked at no more: with PyTorch, Ray and kfp that is half a million objects.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(scope="session")
def s3_home(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the S3 server is that all processes of a test run share, each with prefixes of its own."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if hasattr(pytestconfig, "workerinput") else own) / "home"


@pytest.fixture(scope="session")
def s3_server(s3_home: Path) -> Iterator[seaweedfs.Endpoint]:
    """The test run's own SeaweedFS, which the environment then points every client at."""
    with (
        store_service(s3_home).use(bucket="fineloop-tests", environment=os.environ) as record,
        pytest.MonkeyPatch.context() as environment,
    ):
        endpoint = seaweedfs.Endpoint.read(record)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        for name, value in endpoint.environment().items():
            environment.setenv(name, value)
        yield endpoint


@pytest.fixture(scope="session")
def s3_client(s3_server: seaweedfs.Endpoint) -> Iterator[Any]:
    """One for all tests: making it takes longer than most of them."""
    client = client_from_environment()
    yield client
    client.close()


@pytest.fixture
def store(s3_server: seaweedfs.Endpoint, s3_client: Any) -> Store:
    """A registry that nobody else uses."""
    return Store(s3_client, s3_server.bucket, f"tests/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """The Python that the file's tests and their processes start is that of tests/warm.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", os.environ[warm.VARIABLE])
        yield


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ControlPlane"]:
    """A Kubernetes control plane with the laptop's overlay applied."""
    from infra.checks.manifests import render
    from tests.doubles.kubernetes import control_plane

    with control_plane.running(tmp_path_factory.mktemp("kubernetes")) as plane:
        plane.apply(render("infra/overlays/kind"))
        yield plane
