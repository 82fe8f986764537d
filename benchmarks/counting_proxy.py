"""A proxy before an S3 server that counts what each process asks of it, by the name that the process gives itself.

botocore adds AWS_SDK_UA_APP_ID of its environment to what it sends; the Host header is passed on as it was signed.
"""

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

APP_ID = "AWS_SDK_UA_APP_ID"
NOBODY = "nobody said"
CHUNK_BYTES = 1 << 20
KEPT = ("content-length", "transfer-encoding", "connection", "date", "server")
"""Headers of an answer that this server writes itself."""


@dataclass
class Asked:
    """What one process has asked for."""

    requests: int = 0
    read_bytes: int = 0


@dataclass
class Counts:
    """By process, in the order in which they came."""

    url: str
    by_process: dict[str, Asked] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, process: str, num_bytes: int) -> None:
        """One request, and the bytes of its answer."""
        with self.lock:
            asked = self.by_process.setdefault(process, Asked())
            asked.requests += 1
            asked.read_bytes += num_bytes


@contextmanager
def counting_proxy(behind: str) -> Iterator[Counts]:
    """The counts of a proxy before the server at the URL `behind`."""
    host = urlsplit(behind).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            self.behind = http.client.HTTPConnection(host, timeout=60)
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True
            finally:
                self.behind.close()

        def any(self) -> None:
            self.behind.close()
            self.behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    self.behind.putheader(name, value)
            self.behind.endheaders(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None)
            counted = 0
            with self.behind.getresponse() as answer:
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in KEPT:
                        self.send_header(name, value)
                length = answer.getheader("Content-Length")
                body = b"" if length or self.command == "HEAD" else answer.read()
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                counted += len(body)
                while chunk := answer.read(CHUNK_BYTES):
                    self.wfile.write(chunk)
                    counted += len(chunk)
            named = re.search(r"\bapp/(\S+)", self.headers.get("User-Agent", ""))
            counts.add(named[1] if named else NOBODY, counted)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = any

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    counts = Counts(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield counts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
