"""Requests and bytes of this process's S3 clients, attempts that failed included."""

import threading
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Traffic:
    """Bodies alone are counted, without headers."""

    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


_so_far = Traffic()
_lock = threading.Lock()


def so_far() -> Traffic:
    """Since the process began."""
    with _lock:
        return replace(_so_far)


def count(client: Any) -> None:
    """Have a client's requests counted."""
    client.meta.events.register("before-send.s3", _sent)
    client.meta.events.register("response-received.s3", _received)


def _sent(request: Any, **_: Any) -> None:
    with _lock:
        _so_far.requests += 1
        # A body that is sent with its checksum behind it has its length in the second one.
        lengths = (request.headers.get(name) for name in ("Content-Length", "X-Amz-Decoded-Content-Length"))
        _so_far.written_bytes += int(next(filter(None, lengths), 0))


def _received(event_name: str, response_dict: Any = None, **_: Any) -> None:
    if event_name.endswith(".HeadObject"):  # which says how long a body it does not send
        return
    with _lock:
        _so_far.read_bytes += int(((response_dict or {}).get("headers") or {}).get("content-length") or 0)
