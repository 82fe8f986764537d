"""A proxy before the real S3 server that loses, doubles or withholds answers, answers for a busy server, or holds a
request until it is let go.

It passes the Host header on as it was signed, so that the server behind it accepts the signature.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from tests.doubles.http_server import Quiet, listening
from tests.waiting import PATIENCE_S

Fault = Literal["lost", "doubled", "hung", "busy", "undecided"]


@dataclass
class Hold:
    """The first request of this method whose path holds `about` waits before the server sees it, or for its answer."""

    method: str
    about: str
    is_answered: bool = False
    """The server sees it, and its answer waits."""
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def wait(self, method: str, path: str, *, is_answered: bool) -> None:
        """Wait where this is the request."""
        here = (method, is_answered) == (self.method, self.is_answered)
        if here and self.about in path and not self.reached.is_set():
            self.reached.set()
            self.let_go.wait(PATIENCE_S)


@dataclass
class FaultyProxy:
    """Writes of a key that holds `about` meet `faults`, one each, until none is left."""

    url: str = ""
    about: str = ""
    faults: list[Fault] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request, in the order in which they came."""
    released: threading.Event = field(default_factory=threading.Event)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault of this request."""
        return self.faults.pop(0) if method == "PUT" and self.about in path and self.faults else None


@contextmanager
def faulty_proxy(behind: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at the URL `behind`."""
    proxy, host = FaultyProxy(), urlsplit(behind).netloc

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            with closing(http.client.HTTPConnection(host, timeout=30)) as connection:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "connection"):
                        connection.putheader(name, value)
                connection.endheaders(body or None)
                with connection.getresponse() as answer:
                    return answer.status, answer.getheaders(), answer.read()

        def _body(self) -> bytes:
            """As it came, the marks of its chunks included."""
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int((line := self.rfile.readline()).partition(b";")[0], 16):
                parts += [line, self.rfile.read(size + len(b"\r\n"))]
            parts.append(line)
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                parts.append(line)
            return b"".join([*parts, line])

        def _any(self) -> None:
            body = self._body()
            proxy.asked.append((self.command, self.path))
            for hold in proxy.holds:
                hold.wait(self.command, self.path, is_answered=False)
            fault = proxy.take(self.command, self.path)
            if fault == "busy":
                status, headers, answer = 503, [], b"<Error><Code>SlowDown</Code></Error>"
            elif fault == "undecided":
                status, headers, answer = 409, [], b"<Error><Code>ConditionalRequestConflict</Code></Error>"
            else:
                status, headers, answer = self._forward(body)
            if fault == "doubled":
                status, headers, answer = self._forward(body)
            for hold in proxy.holds:
                hold.wait(self.command, self.path, is_answered=True)
            if fault == "hung":
                proxy.released.wait(30)
            if fault in ("lost", "hung"):
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            # Of what has no body, HEAD's answer among them, it is as the server says it.
            self.send_header("Content-Length", dict(headers).get("Content-Length", str(len(answer))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    with listening(Handler) as proxy.url:
        try:
            yield proxy
        finally:
            proxy.released.set()
