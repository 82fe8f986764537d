"""An HTTP server on loopback for doubles."""

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Answer = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
Handle = Callable[[str, str, Mapping[str, str], bytes, Mapping[str, str]], Answer | None]
"""From verb, path, query, body and headers to status, JSON value, text or bytes, and headers; None hangs up."""


@contextmanager
def serving(handle: Handle, *, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The server's address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = handle(self.command, parts.path, dict(parse_qsl(parts.query)), body, self.headers)
            if answer is None:
                return
            status, value, *more = answer
            text = value if isinstance(value, str | bytes) else json.dumps(value)
            content = text.encode() if isinstance(text, str) else text
            kind = {} if text is value else {"Content-Type": "application/json"}
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **kind, **(more[0] if more else {})}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # the client has gone
                    self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _do

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
