"""Loopback ports: the earlier ones where they are still free, others where not."""

import contextlib
import socket
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"


def choose_ports(count: int, *, earlier: Sequence[int] = ()) -> list[int]:
    """`count` different ports that nobody listens on now, `earlier` ones first and in their order.

    Another process may take one before its server binds it: whoever starts a server tries again with other ports.
    """
    with contextlib.ExitStack() as stack:  # all held at once, so that all differ
        ports = []
        for wanted in [*earlier[:count], *[0] * (count - len(earlier[:count]))]:
            held = stack.enter_context(socket.socket())
            # A port whose last connections are still in TIME_WAIT counts as free, as it does for a server.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((LOOPBACK, wanted))
            except (OSError, OverflowError):
                held.bind((LOOPBACK, 0))
            held.listen()  # with SO_REUSEADDR two sockets may bind one port, but only one may listen
            ports.append(held.getsockname()[1])
        return ports
