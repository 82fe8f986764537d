"""A way to the API server that can be cut, for one process alone."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from infra.checks.manifests import KUBECTL
from pipelines.local.server import choose_ports
from tests.cluster.kube import Kube
from tests.doubles.kubernetes import kubeconfig


@contextlib.contextmanager
def proxied(kube: Kube) -> Iterator[tuple[Path, Callable[[], AbstractContextManager[None]]]]:
    """A kubeconfig that leads through `kubectl proxy`; within `cut()` nothing passes, and what is connected is lost."""
    (port,) = choose_ports(1, earlier=[])

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([KUBECTL, "proxy", "--port", str(port)], stdout=subprocess.DEVNULL)

    def end() -> None:
        processes[-1].terminate()
        processes[-1].wait()

    @contextlib.contextmanager
    def cut() -> Iterator[None]:
        end()
        try:
            yield
        finally:
            processes.append(start())

    processes = [start()]
    try:
        path = kube.scratch / "through-the-proxy"
        yield kubeconfig.write(path, {"server": f"http://127.0.0.1:{port}"}, namespace=kube.namespace), cut
    finally:
        end()
