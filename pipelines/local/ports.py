"""Loopback ports: the earlier ones where they are still free, others where not."""

import contextlib
import itertools
import random
import socket
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"
NEW = range(20_000, 32_768)
"""Ports to choose from, below Linux's ephemeral ports: a connection might take one of those before the server does."""


def choose_ports(count: int, *, earlier: Sequence[int] = ()) -> list[int]:
    """`count` different ports that no process listens on now, `earlier` ones first and in their order.

    Another process may take one before its server binds it: a caller that starts a server tries again with other ports.
    """
    start = random.randrange(len(NEW))
    # Side by side: servers that start at once then choose the same port a fifth as often as with each drawn by itself.
    new = itertools.chain(NEW[start:], NEW[:start], itertools.repeat(0, count))
    with contextlib.ExitStack() as stack:  # all held at once, so that all differ
        ports = []
        for place in range(count):
            candidates = itertools.chain(earlier[place : place + 1], new)
            held = stack.enter_context(next(held for port in candidates if (held := _listening(port)) is not None))
            ports.append(held.getsockname()[1])
        return ports


def _listening(port: int) -> socket.socket | None:
    """A socket that listens there, if one can."""
    found = socket.socket()
    # A port whose last connections are still in TIME_WAIT counts as free, as it does for a server.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((LOOPBACK, port))
        found.listen()  # with SO_REUSEADDR two sockets may bind one port, but only one may listen
    except (OSError, OverflowError):
        found.close()
        return None
    return found
