"""HTTP servers on loopback for doubles."""

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Answer = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
Handle = Callable[[str, str, Mapping[str, str], bytes, Mapping[str, str]], Answer | None]
"""From verb, path, query, body and headers to status, JSON value, text or bytes, and headers; None hangs up. What an
iterator of bytes gives is sent in chunks, and cut off where it raises a ConnectionError."""


class Quiet(BaseHTTPRequestHandler):
    """A handler of requests that prints nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def listening(handler: type[Quiet], *, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server with such handlers, while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(handle: Handle, *, tls: ssl.SSLContext | None = None, protocol: str = "HTTP/1.0") -> Iterator[str]:
    """The server's address, while it runs."""

    class Handler(Quiet):
        protocol_version = protocol

        def _do(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = handle(self.command, parts.path, dict(parse_qsl(parts.query)), body, self.headers)
            if answer is None:
                self.close_connection = True
                return
            status, value, *more = answer
            headers = {} if isinstance(value, str | bytes) else {"Content-Type": "application/json"}
            if isinstance(value, Iterator):
                headers["Transfer-Encoding"] = "chunked"
                sent = (b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chain(value, [b""]))
            else:
                text = value if isinstance(value, str | bytes) else json.dumps(value)
                sent = [text.encode() if isinstance(text, str) else text]
                headers["Content-Length"] = str(len(sent[0]))
            self.send_response(status)
            for name, text in {**headers, **(more[0] if more else {})}.items():
                self.send_header(name, text)
            self.end_headers()
            try:
                for part in sent if self.command != "HEAD" else ():
                    self.wfile.write(part)
            except ConnectionError:  # the client has gone, or is to be cut off
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _do

    with listening(Handler, tls=tls) as url:
        yield url
