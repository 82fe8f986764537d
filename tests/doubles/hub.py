"""A model hub on loopback that serves one repository from a folder, and remembers which files it was asked for.

It answers what `huggingface_hub` asks about a model or a data set: the listing, and each file with its headers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Hub:
    """A running hub."""

    url: str
    sent: set[str] = field(default_factory=set)
    """Files whose bytes were asked for."""
    asked: list[str] = field(default_factory=list)
    """Paths of all requests."""
    refusals: list[int] = field(default_factory=list)
    """Statuses that the next requests about the repository are refused with."""


@contextmanager
def serving(name: str, folder: Path, kind: str = "models") -> Iterator[Hub]:
    """Serve `folder` as the repository `name`, of models or datasets."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            hub.asked.append(self.path)
            if hub.refusals and self.path.startswith(f"/api/{kind}/{name}"):
                self.send_error(hub.refusals.pop(0))
                return
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            file = self.path.partition("/resolve/")[2].partition("/")[2]
            if self.path.startswith(f"/api/{kind}/{name}/tree/"):
                body = json.dumps(
                    [
                        {"type": "file", "path": each, "size": path.stat().st_size, "oid": each}
                        for each, path in sorted(files.items())
                    ]
                ).encode()
            elif self.path.startswith(f"/api/{kind}/{name}") and "convert" not in self.path:
                siblings = [
                    {"rfilename": each, "size": path.stat().st_size, "blobId": each} for each, path in files.items()
                ]
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            elif file in files:
                body = files[file].read_bytes()
            else:
                self.send_error(404)
                return
            if with_body and file:
                hub.sent.add(file)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{file or "listing"}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
