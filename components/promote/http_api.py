"""JSON over HTTP to whoever is told of a promotion: few tries, short waits, nothing that can hold a run up."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.shared.errors import AnnounceError

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

TRIES = 3
PAUSE_S = 1
BUSY = (429, 502, 503, 504)
TIMEOUT_S = (5, 15)
"""To connect, and between two pieces of an answer."""
SHOWN = 200


class HttpApi:
    """One server. A server that is away or busy is asked again; a redirect is not followed, lest a token go along."""

    def __init__(self, url: str, *, token: str = "", login: tuple[str, str] | None = None) -> None:
        """`token` is a bearer's, `login` a user's name and password."""
        from requests import Session
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        # The server's own Retry-After might be hours.
        again = Retry(
            total=TRIES - 1,
            backoff_factor=PAUSE_S,
            status_forcelist=BUSY,
            allowed_methods=None,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        self._url = url.rstrip("/")
        self._session = Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))
        # As a header alone, an entry of ~/.netrc would replace it.
        self._session.auth = _bearer(token) if token else login

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """The answer, as an object.

        Raises:
            AnnounceError: it is no success, or no object.
        """
        return self._object(self._send("GET", path, query=query))

    def find(self, path: str, **query: str) -> dict[str, Any] | None:
        """As `get`; None where there is no such thing (404)."""
        response = self._send("GET", path, query=query)
        return None if response.status_code == 404 else self._object(response)

    def send(self, verb: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object, and return the answer as for `get`."""
        return self._object(self._send(verb, path, body=body))

    def deliver(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Post bytes to the address itself; nobody reads the answer.

        Raises:
            AnnounceError: it is no success.
        """
        self._successful(self._send("POST", "", data=body, headers=headers))

    def _send(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> "Response":
        from requests import RequestException

        url = f"{self._url}{path}"
        try:
            return self._session.request(
                verb, url, params=query, json=body, data=data, headers=headers, timeout=TIMEOUT_S, allow_redirects=False
            )
        except RequestException as exc:
            raise AnnounceError(f"{verb} {url}: {exc}") from exc

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
            told = " ".join(response.text.split())[:SHOWN]
            raise AnnounceError(f"{response.request.method} {response.url} answered {response.status_code}: {told}")
        return response


def _bearer(token: str) -> Any:
    def authorised(request: "PreparedRequest") -> "PreparedRequest":
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorised
