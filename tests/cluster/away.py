"""A way to the API server that can be cut, for one process alone."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import yaml

from tests.cluster.kube import Kube


class Proxy:
    """Hands bytes on between a port here and the API server of the kubeconfig's context."""

    def __init__(self, kube: Kube) -> None:
        view = yaml.safe_load(kube.kubectl("config", "view", "--minify", "--raw", "--flatten"))
        cluster = view["clusters"][0]["cluster"]
        there = urlsplit(cluster["server"])
        self._there = (there.hostname or "", there.port or 443)
        self._listener = socket.create_server(("127.0.0.1", 0))
        cluster["server"] = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        cluster["tls-server-name"] = "kubernetes"
        self.kubeconfig: Path = kube.scratch / "through-the-proxy"
        self.kubeconfig.write_text(yaml.safe_dump(view), encoding="utf-8")
        self._is_cut, self._closed = threading.Event(), threading.Event()
        self._open: set[socket.socket] = set()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._listener.close()
        self._drop()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing passes meanwhile, and what is connected loses its connection."""
        self._is_cut.set()
        self._drop()
        try:
            yield
        finally:
            self._is_cut.clear()

    def _drop(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut.is_set():
                near.close()
                continue
            threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._there) as far, selectors.DefaultSelector() as ready:
            other = {near: far, far: near}
            self._open |= other.keys()
            for each in other:
                ready.register(each, selectors.EVENT_READ)
            with contextlib.suppress(OSError):
                while True:
                    for key, _ in ready.select():
                        source = key.fileobj
                        assert isinstance(source, socket.socket)
                        if not (found := source.recv(65536)):
                            return
                        other[source].sendall(found)
        self._open -= other.keys()
