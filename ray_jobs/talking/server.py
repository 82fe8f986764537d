"""An endpoint in OpenAI's format on this machine, for trying models out, and a page on it. It is no production server:
one answer at a time, no authentication, no batching.

It listens on loopback alone. A page of another site can neither read from it nor ask it: requests must name this
machine as their host, and bring JSON as its own content type, which browsers send nowhere without asking first.
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
"""Of a request."""


class Server(ThreadingHTTPServer):
    """Answers with `speakers` by their names, one request after the other; `about` is what the page begins with."""

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
        """Where it listens."""
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
        # A body that is not read would be taken for the next request.
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
        except ConnectionError:  # nobody listens any more, which ends the answer
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
        """Whether it was sent to this machine by one of its names: another's may have been made to lead here."""
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
        """Prompts and addresses go into no log."""


def _policy() -> str:
    """The page runs its own script alone, and speaks with its own server alone."""
    scripts = re.findall(r"<script>(.*?)</script>", PAGE, flags=re.DOTALL)
    return (
        f"default-src 'none'; script-src {' '.join(map(script_source, scripts))}; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
