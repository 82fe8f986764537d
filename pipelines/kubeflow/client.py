"""Creates the `kfp.Client`, here only, and turns the server's refusals into messages.

The server is the first of: --host, KFP_ENDPOINT, KF_PIPELINES_ENDPOINT, in a pod the service ml-pipeline of its
namespace or of namespace kubeflow, and the one of namespace kubeflow behind the kubeconfig's API server. Credentials
are the first of: KFP_TOKEN, KFP_TOKEN_FILE, the token that Kubernetes projects, kfp's cookies, the kubeconfig's user.
"""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from components.shared.errors import KubeflowAway, KubeflowError, UserError

TIMEOUTS_S = (5, 60)
"""To connect, and between two bytes of a response; kfp itself waits without limit."""
PAGE_SIZE = 100
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
FORWARD = "kubectl -n fineloop port-forward svc/ml-pipeline-ui 8080:80"
_NAME_ONE = f"give --host URL or set KFP_ENDPOINT; `{FORWARD}` makes one reachable as http://localhost:8080"


@dataclass(frozen=True)
class Kubeflow:
    """A Kubeflow Pipelines server. `namespace` is empty if the server is not multi-user."""

    client: kfp.Client
    host: str
    ui: str
    namespace: str

    def asking(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Wrap requests: suppress what kfp prints, and raise failures as errors that name this host and `what`."""
        return _asking(self.host, what)

    def listed(self, kinds: str, call: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
        """Yield every item of a list, such as `runs`; pages are fetched as they are consumed."""
        token: str | None = ""
        while token is not None:
            with self.asking(f"list {kinds.replace('_', ' ')}"):
                page = call(page_size=PAGE_SIZE, page_token=token, **arguments)
            yield from getattr(page, kinds) or []
            token = page.next_page_token or None

    def id_of(self, kind: str, name: str, call: Callable[..., Any], **arguments: Any) -> str:
        """Return the id of the `kind` with this display name; empty if there is none."""
        objects = self.listed(f"{kind}s", call, filter=one_of("display_name", name), **arguments)
        return next((str(getattr(item, f"{kind}_id")) for item in objects), "")


def connect(environment: Mapping[str, str], *, host: str = "", namespace: str = "") -> Kubeflow:
    """Connect to the server that `host` or the environment names.

    Raises:
        UserError: no server is named, or the server is multi-user and no namespace is given.
        KubeflowError: it is unreachable, refuses the credentials, or is not Kubeflow Pipelines.
    """
    url = _host(host, environment)
    if url is None:
        raise UserError(f"no Kubeflow Pipelines is named: {_NAME_ONE}")
    token = environment.get("KFP_TOKEN", "").strip()
    credentials = None if token else _credentials(environment)
    shown_host = url or "the cluster's Kubeflow Pipelines"
    with _asking(shown_host, "say how it is"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kfp warns that it is for servers 2.0 and later
        client = _Client(host=url or None, existing_token=token or None, credentials=credentials)
        health = client.get_kfp_healthz()
    unlimited = client.runs.api_client.request  # of all services; kfp's methods take no timeout
    client.runs.api_client.request = lambda *args, **more: unlimited(*args, **{**more, "_request_timeout": TIMEOUTS_S})
    if not isinstance(getattr(health, "multi_user", None), bool):
        raise KubeflowError(
            f"{shown_host} answers, but not as Kubeflow Pipelines does: is it another service, or a login page? "
            "Set --host or KFP_ENDPOINT to the API"
        )
    namespace = namespace or environment.get("KFP_NAMESPACE", "") or client.get_user_namespace()
    if health.multi_user and not namespace:
        raise UserError(
            f"{shown_host} has many users, each with a namespace: name yours with --namespace or KFP_NAMESPACE"
        )
    ui = environment.get("KF_PIPELINES_UI_ENDPOINT") or url or "/pipeline"
    return Kubeflow(client, shown_host, ui.rstrip("/"), namespace if health.multi_user else "")


def one_of(key: str, *values: str) -> str:
    """Return a filter for lists, as JSON: `key` is one of the values."""
    return json.dumps({"predicates": [{"operation": "IN", "key": key, "stringValues": {"values": values}}]})


class _Client(kfp.Client):
    """kfp's client that checks the server's health once; kfp checks five times, and prints each refusal in full.

    It also keeps the host if a kubeconfig is used: kfp sets the host to Kubeflow's service behind the Kubernetes API,
    and the kubernetes package resets it whenever it is asked for the user's token (kubernetes 30, kube_config.py).
    """

    _health: Any = None

    def _load_config(self, host: str | None, *others: Any, **named: Any) -> Any:
        config = super()._load_config(host, *others, **named)
        if not host and "/proxy/" not in config.host:  # kfp prints the failure, and falls back to localhost
            raise UserError(f"the kubeconfig names no cluster that can be asked: mend it, or {_NAME_ONE}")
        if not host and config.refresh_api_key_hook:
            service, refresh = config.host, config.refresh_api_key_hook

            def refresh_token_alone(configuration: Any) -> None:
                refresh(configuration)
                configuration.host, configuration.refresh_api_key_hook = service, refresh_token_alone

            config.refresh_api_key_hook = refresh_token_alone
        return config

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        if self._health is None:
            self._health = self.healthzs.healthz_service_get_healthz(_request_timeout=TIMEOUTS_S)
        return self._health

    def set_user_namespace(self, namespace: str) -> None:
        self._context_setting["namespace"] = namespace  # in memory: a pod's home may be read-only


def is_named(environment: Mapping[str, str], *, host: str = "") -> bool:
    """Whether `host` or the environment names a server."""
    return _host(host, environment) is not None


def _host(option: str, environment: Mapping[str, str]) -> str | None:
    """Return the server's URL; empty if kfp should find it through the kubeconfig, None if nothing names one."""
    host = option or environment.get("KFP_ENDPOINT", "") or environment.get("KF_PIPELINES_ENDPOINT", "")
    if host:
        if not host.startswith(("http://", "https://")):
            raise UserError(f"--host (KFP_ENDPOINT) is {host!r}: it starts with http:// or https://")
        return host.rstrip("/")
    if service := environment.get("ML_PIPELINE_SERVICE_HOST"):
        return f"http://{service}:{environment.get('ML_PIPELINE_SERVICE_PORT', '8888')}"
    if "KUBERNETES_SERVICE_HOST" in environment:
        return IN_CLUSTER
    kubeconfigs = environment.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if not any(Path(path).is_file() for path in kubeconfigs.split(os.pathsep)):
        return None
    for variable in ("KFP_TOKEN", "KFP_TOKEN_FILE"):
        if environment.get(variable):
            raise UserError(f"{variable} is set, and would go to the kubeconfig's cluster: unset it, or {_NAME_ONE}")
    return ""


def _credentials(environment: Mapping[str, str]) -> ServiceAccountTokenVolumeCredentials | None:
    """Return credentials that read KFP_TOKEN_FILE or a projected token for each request, as Kubernetes replaces it
    every hour; None if there is neither."""
    if path := environment.get("KFP_TOKEN_FILE"):
        if not os.access(path, os.R_OK):
            raise UserError(f"KFP_TOKEN_FILE is {path}, which cannot be read")
        return ServiceAccountTokenVolumeCredentials(path)
    projected = environment.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH
    return ServiceAccountTokenVolumeCredentials(projected) if Path(projected).is_file() else None


@contextlib.contextmanager
def _asking(host: str, what: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # kfp prints links on stdout, from which scripts read JSON
            yield
    except urllib3.exceptions.HTTPError as exc:
        cause = getattr(exc, "reason", None) or exc
        why = str(cause).rpartition(": ")[2] or type(cause).__name__  # urllib3 puts addresses of objects before it
        raise KubeflowAway(
            f"{host} cannot be reached ({why}): check --host or KFP_ENDPOINT; from outside the cluster "
            f"`{FORWARD}` makes it http://localhost:8080"
        ) from exc
    except kfp_server_api.ApiException as exc:
        raise _refusal(host, what, exc) from exc


def _refusal(host: str, what: str, exc: kfp_server_api.ApiException) -> KubeflowError | UserError:
    try:
        answer = json.loads(exc.body)["message"]
    except (TypeError, ValueError, KeyError):
        answer = exc.reason
    answer = " ".join(str(answer).split())
    if exc.status == 401:
        return KubeflowError(
            f"{host} does not know who asks (401: {answer}): set KFP_TOKEN to a token, or KFP_TOKEN_FILE to its file"
        )
    if exc.status == 403:
        return KubeflowError(
            f"{host} does not let this user {what} (403: {answer}): ask for the rights, or name another --namespace"
        )
    if exc.status in (400, 404):
        return UserError(f"{host} refuses to {what}: {answer}")
    kind = KubeflowAway if exc.status in (0, 502, 503, 504) else KubeflowError
    return kind(f"{host} failed to {what} ({exc.status}: {answer})")
