"""Access to a Kubernetes cluster for `fineloop doctor`: objects, kinds and rights, as plain JSON."""

import json
import re
from typing import Any

from components.ray_cluster.kubernetes_api import CALL_S, configuration
from components.shared.errors import UserError

Resource = dict[str, Any]
_NO_RIGHT = re.compile(r"cannot \w+ resource")
"""Wording of RBAC's refusals, to tell them from those of pod security and quotas, which are 403 too."""


class NotSeen(Exception):
    """The API server does not permit the request, or cannot be reached; the text says which."""


class Refused(NotSeen):
    """The API server rejected the object that it was asked to create."""


class Cluster:
    """Client of the API server that the pod's service account or the kubeconfig names."""

    def __init__(self, namespace: str = "") -> None:
        """Connect; an empty `namespace` means the kubeconfig context's.

        Raises:
            UserError: no API server is configured, or no namespace.
        """
        from kubernetes import client

        configured, context_namespace = configuration()
        configured.retries = False
        self.address = configured.host
        self.namespace = namespace or context_namespace
        if not self.namespace:
            raise UserError("the kubeconfig's context has no namespace: name the one of your runs with --namespace")
        self._api = client.ApiClient(configured)

    def get(self, path: str) -> Resource | None:
        """Return the object at a path of the API; None if there is none.

        Raises:
            NotSeen: we may not read it, or the server does not answer.
        """
        return self._ask("GET", path)

    def create(self, path: str, body: Resource) -> Resource:
        """Create an object and return the API server's response, such as the result of an access review.

        Raises:
            Refused: the server, or an admission webhook, rejects the object.
            NotSeen: we may not create it, or the server does not answer.
        """
        return self._ask("POST", path, body) or {}

    def delete(self, path: str) -> None:
        """Delete an object if it exists.

        Raises:
            NotSeen: we may not delete it, or the server does not answer.
        """
        self._ask("DELETE", path)

    def log(self, pod: str) -> str:
        """Return the log of a pod's container."""
        found = self._ask("GET", f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log", raw=True)
        return str(found or "")

    def _ask(self, method: str, path: str, body: Resource | None = None, *, raw: bool = False) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "*/*" if raw else "application/json", "Content-Type": "application/json"}
        try:
            response = self._api.call_api(
                path,
                method,
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=CALL_S,
            )
        except ApiException as exc:
            if exc.status == 404:
                return None
            reason = _reason(exc)
            is_ours = exc.status in (401, 403) and (exc.status == 401 or _NO_RIGHT.search(reason))
            raise (Refused if method == "POST" and not is_ours else NotSeen)(reason) from exc
        except (HTTPError, OSError) as exc:
            raise NotSeen(f"{self.address} does not answer: {exc}") from exc
        text = response.data.decode("utf-8", errors="replace")
        return text if raw else json.loads(text)


def _reason(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"refused with {error.status}"
