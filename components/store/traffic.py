"""Counts requests and bytes of this process's S3 clients, including failed attempts."""

import threading
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Traffic:
    """The counts. Bytes are those of bodies, without headers."""

    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


_so_far = Traffic()
_lock = threading.Lock()


def so_far() -> Traffic:
    """The traffic since the process began."""
    with _lock:
        return replace(_so_far)


def count(client: Any) -> None:
    """Count the requests of a client from now on."""
    client.meta.events.register("before-send.s3", _sent)
    client.meta.events.register("response-received.s3", _received)


def _sent(request: Any, **_: Any) -> None:
    with _lock:
        _so_far.requests += 1
        # If a checksum follows the body, the second header has the body's length.
        lengths = (request.headers.get(name) for name in ("Content-Length", "X-Amz-Decoded-Content-Length"))
        _so_far.written_bytes += int(next(filter(None, lengths), 0))


def _received(event_name: str, response_dict: Any = None, **_: Any) -> None:
    if event_name.endswith(".HeadObject"):  # its length is that of a body that is not sent
        return
    with _lock:
        _so_far.read_bytes += int(((response_dict or {}).get("headers") or {}).get("content-length") or 0)
