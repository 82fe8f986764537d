"""An OpenAI-compatible endpoint on this machine, for trying models out, and a web page for it. It is no production
server: one answer at a time, no authentication, no batching.

It listens on the loopback interface only. Pages of other sites can neither read from it nor send requests to it: the
Host header must name this machine, and the content type must be JSON, for which browsers send a CORS preflight first.
"""

import json
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

from components.shared.content_policy import script_source
from components.shared.errors import FineloopError, UserError
from ray_jobs.talking import openai_api
from ray_jobs.talking.speaker import Speaker

LOOPBACK = "127.0.0.1"
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
MOST_BYTES = 2**20
"""Maximum size of a request's body, in bytes."""


class Server(ThreadingHTTPServer):
    """HTTP server that answers with `speakers`, by their names, one request at a time; the page loads `about`."""

    daemon_threads = True

    def __init__(self, port: int, speakers: Mapping[str, Speaker], about: Mapping[str, Any]) -> None:
        """Raises UserError where something else listens at the port."""
        self.speakers, self.about = speakers, about
        self.since, self.numbers, self.turn = int(time.time()), count(1), threading.Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as exc:
            raise UserError(f"--port {port} cannot be had on {LOOPBACK}: {exc.strerror}") from exc

    @property
    def url(self) -> str:
        """URL that the server listens at."""
        return f"http://{LOOPBACK}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        match self.path:
            case "/":
                self._send(200, PAGE.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": _policy()})
            case "/about":
                self._json(200, dict(self.server.about))
            case "/v1/models":
                self._json(200, openai_api.models([*self.server.speakers], since=self.server.since))
            case _:
                self._wrong(404, f"there is no {self.path}: GET /v1/models, POST /v1/chat/completions")

    def do_POST(self) -> None:
        # An unread body would be parsed as the next request.
        self.close_connection = True
        if not self._is_for_us():
            return
        if self.path != "/v1/chat/completions":
            return self._wrong(404, f"there is no {self.path}: POST /v1/chat/completions")
        if self.headers.get_content_type() != "application/json":
            return self._wrong(415, "expected Content-Type: application/json")
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= MOST_BYTES:
                return self._wrong(413, f"a request has at most {MOST_BYTES} bytes")
            asked = openai_api.request(json.loads(self.rfile.read(length)))
        except UserError as exc:
            return self._wrong(400, str(exc))
        except ValueError as exc:
            return self._wrong(400, f"no JSON with its length: {exc}")
        speaker = self.server.speakers.get(asked.model)
        if speaker is None:
            return self._wrong(404, f"there is no model {asked.model!r}: there is {', '.join(self.server.speakers)}")
        try:
            with self.server.turn:
                self._answer(speaker, asked)
        except ConnectionError:  # the client has closed the connection
            pass
        return None

    def _answer(self, speaker: Speaker, asked: openai_api.Request) -> None:
        number = next(self.server.numbers)
        how: dict[str, Any] = {"max_tokens": asked.max_tokens, "temperature": asked.temperature}
        if not asked.stream:
            try:
                said = speaker.answer(asked.turns, on_text=lambda _: None, **how)
            except FineloopError as exc:
                return self._wrong(400, str(exc))
            return self._json(200, openai_api.completion(asked.model, said, number=number))
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

        def event(body: Mapping[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
            self.wfile.flush()

        event(openai_api.chunk(asked.model, {"role": "assistant", "content": ""}, number=number))
        try:
            said = speaker.answer(
                asked.turns,
                on_text=lambda text: event(openai_api.chunk(asked.model, {"content": text}, number=number)),
                **how,
            )
        except FineloopError as exc:
            return event(openai_api.error(str(exc), kind="invalid_request_error"))
        event(openai_api.chunk(asked.model, {}, number=number, said=said))
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _is_for_us(self) -> bool:
        """Whether the Host header names this machine; otherwise send an error. It protects against DNS rebinding."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host in (LOOPBACK, "localhost"):
            return True
        self._wrong(403, f"Host {host!r}: expected {LOOPBACK} or localhost")
        return False

    def _wrong(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status != 404 else "not_found_error"
        self._json(status, openai_api.error(message, kind=kind))

    def _json(self, status: int, body: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", {})

    def _send(self, status: int, body: bytes, content_type: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, since requests contain prompts and addresses."""


def _policy() -> str:
    """The page's Content-Security-Policy: only its own script runs, and only its own server can be reached."""
    scripts = re.findall(r"<script>(.*?)</script>", PAGE, flags=re.DOTALL)
    return (
        f"default-src 'none'; script-src {' '.join(map(script_source, scripts))}; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
