"""JSON over HTTP for notifications, with few tries and short waits, so that nothing holds up a run."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Any

from components.shared.errors import AnnounceError

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

TRIES = 3
PAUSE_S = 1
BUSY = (429, 502, 503, 504)
TIMEOUT_S = (5, 15)
"""Limits in seconds: to connect, and between two pieces of an answer."""
PATIENCE_S = 30
"""Limit in seconds for all requests to one server together."""
MOST_BYTES, MOST_ERROR_BYTES, CHUNK_BYTES = 4 * 2**20, 64 * 2**10, 8 * 2**10
"""The most bytes kept of an answer, and of an error; and the bytes read at a time."""
SHOWN = 200


class HttpApi:
    """A server, which gets PATIENCE_S for all requests together.

    Requests to a server that is away or busy are repeated. Redirects are not followed: that would forward the token.
    """

    def __init__(self, url: str, *, token: str = "", login: tuple[str, str] | None = None) -> None:
        """`token` is a bearer token, `login` a user's name and password."""
        from requests import Session

        self._url = url.rstrip("/")
        self._until = time.monotonic() + PATIENCE_S
        self._session = Session()
        # If it were only a header, an entry of ~/.netrc would replace it.
        self._session.auth = _bearer(token) if token else login

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Get an object.

        Raises:
            AnnounceError: the answer is not a success, or not a JSON object.
        """
        return self._object(self._send("GET", path, query=query))

    def find(self, path: str, **query: str) -> dict[str, Any] | None:
        """Get an object as `get` does; None if there is none (404)."""
        response = self._send("GET", path, query=query)
        return None if response.status_code == 404 else self._object(response)

    def send(self, verb: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object, and return the answer as for `get`."""
        return self._object(self._send(verb, path, json=body))

    def deliver(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Post bytes to the address itself; the answer is not read.

        Raises:
            AnnounceError: the answer is not a success.
        """
        self._successful(self._send("POST", "", data=body, headers=headers))

    def _send(self, verb: str, path: str, *, query: Mapping[str, str] | None = None, **sent: Any) -> "Response":
        """Send in a thread: a server that sends a byte now and then would never exceed a limit on a single wait."""
        url = f"{self._url}{path}"
        found: Future[Response] = Future()

        def ask() -> None:
            try:
                found.set_result(self._ask(verb, url, params=query, **sent))
            except Exception as exc:  # passed to the thread that waits
                found.set_exception(exc)

        Thread(target=ask, daemon=True).start()
        try:
            return found.result(max(0.0, self._until - time.monotonic()))
        except TimeoutError as exc:
            raise AnnounceError(f"{verb} {url}: no whole answer after {PATIENCE_S} s") from exc
        except OSError as exc:  # the base of requests' errors
            raise AnnounceError(f"{verb} {url}: {exc}") from exc

    def _ask(self, verb: str, url: str, **sent: Any) -> "Response":
        from requests import RequestException

        for left in reversed(range(TRIES)):
            try:
                response = self._session.request(
                    verb, url, **sent, timeout=TIMEOUT_S, allow_redirects=False, stream=True
                )
                with response:
                    if not left or response.status_code not in BUSY:
                        _read(response, MOST_BYTES if response.ok else MOST_ERROR_BYTES)
                        return response
            except RequestException:
                if not left:
                    raise
            time.sleep(PAUSE_S)
        raise AssertionError("the last try returns or raises")

    def _object(self, response: "Response") -> dict[str, Any]:
        try:
            value = self._successful(response).json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise AnnounceError(
                f"{response.request.method} {response.url} answered no JSON object: {response.text[:SHOWN]}"
            )
        return value

    def _successful(self, response: "Response") -> "Response":
        if not 200 <= response.status_code < 300:
            excerpt = " ".join(response.text.split())[:SHOWN]
            raise AnnounceError(f"{response.request.method} {response.url} answered {response.status_code}: {excerpt}")
        return response


def _read(response: "Response", most_bytes: int) -> None:
    """Read at most `most_bytes` of the body, and keep them as the whole body."""
    body = bytearray()
    for chunk in response.iter_content(CHUNK_BYTES):
        body += chunk
        if len(body) >= most_bytes:
            break
    response._content = bytes(body[:most_bytes])  # read by `text` and `json`
    response._content_consumed = True


def _bearer(token: str) -> Any:
    def authorised(request: "PreparedRequest") -> "PreparedRequest":
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorised
