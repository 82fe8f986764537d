"""What `fineloop doctor` reads of a Kubernetes cluster: objects, kinds and rights, as plain JSON."""

import json
import re
from typing import Any

from components.ray_cluster.kubernetes_api import CALL_S, configuration
from components.shared.errors import UserError

Resource = dict[str, Any]
_NO_RIGHT = re.compile(r"cannot \w+ resource")
"""RBAC's words; pod security and quotas answer with 403 as well."""


class NotSeen(Exception):
    """The API server does not let us look, or cannot be reached; the text says which."""


class Refused(NotSeen):
    """The API server has judged what it was asked to create, and does not take it."""


class Cluster:
    """The API server that a pod's account or the kubeconfig leads to."""

    def __init__(self, namespace: str = "") -> None:
        """Connect; an empty `namespace` means the kubeconfig context's.

        Raises:
            UserError: there is no way to an API server, or no namespace.
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
        """The object at a path of the API; None where there is none.

        Raises:
            NotSeen: we may not read it, or no server answers.
        """
        return self._ask("GET", path)

    def create(self, path: str, body: Resource) -> Resource:
        """What the API server makes of a body, such as the answer to an access review.

        Raises:
            Refused: the server, or a webhook of it, does not take this one.
            NotSeen: we may not create it, or no server answers.
        """
        return self._ask("POST", path, body) or {}

    def delete(self, path: str) -> None:
        """Have an object deleted, if it is there.

        Raises:
            NotSeen: we may not, or no server answers.
        """
        self._ask("DELETE", path)

    def log(self, pod: str) -> str:
        """What a pod's container has said."""
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
