"""Notify Kubeflow's Model Registry, MLflow and a webhook of a moved alias.

The move has happened, and a failed notification does not undo it. A warning names the server, and the command that
notifies it again. Each notification creates what is missing, and repeating it changes nothing.
"""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import datetime
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from components.config.schema import AnnounceConfig
from components.config.track import SECRETS
from components.records.steps import StepRecord, finite
from components.registry import versions
from components.shared.errors import AnnounceError, FineloopError

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

    from components.registry.event_log import Event, EventKind
    from components.store.store import Store

logger = logging.getLogger(__name__)


# A move of an alias, with facts about the version that it moved to.


@dataclass(frozen=True)
class Announcement:
    """The content of a notification. A text that was not recorded is empty."""

    event_id: str
    """The id of the event; the same whenever the notification is repeated."""
    kind: "EventKind"
    time: str
    """ISO 8601, in UTC."""
    adapter: str
    alias: str
    version: str
    previous: str | None
    """The version that held the alias before; None when there was none."""
    actor: str
    reason: str
    run_id: str
    """The run that moved the alias; empty for a person."""
    version_uri: str
    manifest_sha256: str
    event_uri: str
    trained_by: str
    """The run that published the version."""
    method: str
    base: str
    dataset_uri: str
    metrics: Mapping[str, float]
    """The version's metrics as its run measured them, without those that are not finite."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def announcement_of(store: "Store", name: str, event: "Event") -> Announcement:
    """The notification of a moved alias.

    Raises:
        StoreError: the version cannot be read.
    """
    body = event.body
    version = versions.evaluated(store, versions.resolve(store, f"{name}@{body['to']}"))
    lineage = versions.read_lineage(store, version)
    return Announcement(
        event_id=event.id,
        kind=event.kind,
        time=event.time,
        adapter=name,
        alias=body["alias"],
        version=version.version,
        previous=body["from"],
        actor=body.get("actor", ""),
        reason=body.get("reason", ""),
        run_id=body.get("run_id", ""),
        version_uri=version.uri,
        manifest_sha256=version.manifest_sha256,
        event_uri=event.uri,
        trained_by=version.run_id,
        method=lineage.get("recipe", {}).get("method", ""),
        base=lineage.get("base", {}).get("reference", ""),
        dataset_uri=lineage.get("dataset", {}).get("uri", ""),
        metrics={key: number for key, value in version.metrics.items() if (number := finite(value)) is not None},
    )


# JSON over HTTP for notifications, with few tries and short waits, so that nothing holds up a run.

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


# Notifies an MLflow server of a moved alias, over its REST API (mlflow.org/docs/latest/rest-api.html, 2.0).
#
# MLflow's own client would add a dozen packages to the image of a step for these few calls.

MLFLOW_API = "/api/2.0/mlflow"
VERSION_TAG = "fineloop.version"
"""The tag by which a version's run is found again."""


def notify_mlflow(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Record the version's run and the version, each once, and set the alias.

    Raises:
        AnnounceError: the server cannot be reached, or refuses.
    """
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    api = HttpApi(f"{url.rstrip('/')}{MLFLOW_API}", token=token, login=(user, password) if user else None)
    if api.find("/registered-models/get", name=announcement.adapter) is None:
        api.send("POST", "/registered-models/create", {"name": announcement.adapter})
    number = _find_version(api, announcement) or _create_version(api, announcement)
    alias = {"name": announcement.adapter, "alias": announcement.alias, "version": number}
    api.send("POST", "/registered-models/alias", alias)


def _find_version(api: HttpApi, announcement: Announcement) -> str | None:
    """MLflow's number of the version, found by the version's address."""
    query = f"name = '{announcement.adapter}' and source_path = '{announcement.version_uri}'"
    found = api.get("/model-versions/search", filter=query).get("model_versions", [])
    return str(found[0]["version"]) if found else None


def _create_version(api: HttpApi, announcement: Announcement) -> str:
    version = {
        "name": announcement.adapter,
        "source": announcement.version_uri,
        "run_id": _run_of(api, announcement),
        "tags": _mlflow_tags(announcement),
    }
    return str(api.send("POST", "/model-versions/create", version)["model_version"]["version"])


def _run_of(api: HttpApi, announcement: Announcement) -> str:
    """The id of the version's run, in the experiment with the adapter's name. The run is created or completed; nothing
    that it has is removed."""
    name = announcement.adapter
    found = api.find("/experiments/get-by-name", experiment_name=name)
    experiment = found["experiment"] if found else api.send("POST", "/experiments/create", {"name": name})
    query = {
        "experiment_ids": [experiment["experiment_id"]],
        "filter": f"tags.`{VERSION_TAG}` = '{announcement.version}'",
    }
    runs = api.send("POST", "/runs/search", query).get("runs", [])
    time_ms = int(datetime.fromisoformat(announcement.time).timestamp() * 1000)
    begun = {
        "experiment_id": experiment["experiment_id"],
        "run_name": announcement.trained_by or announcement.version,
        "start_time": time_ms,
        "tags": _mlflow_tags(announcement),
    }
    run = runs[0] if runs else api.send("POST", "/runs/create", begun)["run"]
    run_id = str(run["info"]["run_id"])
    metrics = [
        {"key": key, "value": value, "timestamp": time_ms, "step": 0} for key, value in announcement.metrics.items()
    ]
    params = [{"key": key, "value": getattr(announcement, key)} for key in ("method", "base", "dataset_uri")]
    api.send("POST", "/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params})
    api.send("POST", "/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": time_ms})
    return run_id


def _mlflow_tags(announcement: Announcement) -> list[dict[str, Any]]:
    tags = {
        VERSION_TAG: announcement.version,
        "fineloop.run_id": announcement.trained_by,
        "fineloop.manifest_sha256": announcement.manifest_sha256,
    }
    return [{"key": key, "value": value} for key, value in tags.items()]


# Notifies a Kubeflow Model Registry of a moved alias, over its REST API (kubeflow/hub, api/openapi).
#
# The registry's own Python client is not used: it configures logging and patches asyncio for the whole process, and has
# no timeouts. The registry has no aliases: each is a property of the registered model, with the version as its value.

REGISTRY_TOKEN = "FINELOOP_MODEL_REGISTRY_TOKEN"
REGISTRY_API = "/api/model_registry/{version}"
NEWEST, OLDER = "v1", "v1alpha3"
"""Versions of the API, with the same requests. Servers from before 2026 know only the older one, which is to end with
April 2027."""
AUTHOR = "fineloop"


def notify_model_registry(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Register the adapter, the version and its address, each once, and point the alias at the version.

    Raises:
        AnnounceError: the registry cannot be reached, or refuses.
    """
    api = _newest_api(url.rstrip("/"), environment.get(REGISTRY_TOKEN, ""))
    model = api.find("/registered_model", name=announcement.adapter) or api.send(
        "POST", "/registered_models", {"name": announcement.adapter, "owner": AUTHOR}
    )
    version = api.find("/model_version", name=announcement.version, parentResourceId=model["id"]) or api.send(
        "POST",
        "/model_versions",
        {
            "name": announcement.version,
            "registeredModelId": model["id"],
            "author": AUTHOR,
            "customProperties": _properties(announcement),
        },
    )
    artifacts = f"/model_versions/{version['id']}/artifacts"
    if not api.get(artifacts).get("items"):
        # Named like the model, because the registry's client looks for it by that name: get_model_artifact.
        artifact = {
            "artifactType": "model-artifact",
            "name": announcement.adapter,
            "uri": announcement.version_uri,
            "state": "LIVE",
        }
        api.send("POST", artifacts, {**artifact, "modelFormatName": "peft", "modelFormatVersion": "1"})
    properties = {**model.get("customProperties", {}), announcement.alias: _text_property(announcement.version)}
    api.send("PATCH", f"/registered_models/{model['id']}", {"customProperties": properties})


def _newest_api(url: str, token: str) -> HttpApi:
    newest, older = (HttpApi(url + REGISTRY_API.format(version=version), token=token) for version in (NEWEST, OLDER))
    return older if newest.find("/registered_models", pageSize="1") is None else newest


def _properties(announcement: Announcement) -> dict[str, Any]:
    same = ("manifest_sha256", "method", "base", "dataset_uri")
    texts = {"run_id": announcement.trained_by, **{key: getattr(announcement, key) for key in same}}
    numbers = {
        key: {"metadataType": "MetadataDoubleValue", "double_value": value}
        for key, value in announcement.metrics.items()
    }
    return {**{key: _text_property(value) for key, value in texts.items()}, **numbers}


def _text_property(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}


# Posts a move of an alias as JSON, signed as GitHub signs its webhooks, so that existing receivers can check it.
#
# https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries

WEBHOOK_SECRET = "FINELOOP_WEBHOOK_SECRET"


def notify_webhook(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Post the announcement, signed if the environment holds a secret.

    A receiver recognises a repeated notification by X-Fineloop-Delivery, the event's id.

    Raises:
        AnnounceError: the receiver cannot be reached, or did not accept it.
    """
    body = json.dumps(announcement.as_json(), sort_keys=True).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Fineloop-Event": announcement.kind,
        "X-Fineloop-Delivery": announcement.event_id,
    }
    if secret := environment.get(WEBHOOK_SECRET):
        headers["X-Hub-Signature-256"] = signature(body, secret)
    HttpApi(url).deliver(body, headers)


def signature(body: bytes, secret: str) -> str:
    """The HMAC-SHA256 of the body in hex, in the header's form."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


NOTIFIED = "told"
"""The outcome of a notification that arrived; any other outcome is the reason why it failed."""


class Notifier(NamedTuple):
    """How one kind of server is notified."""

    notify: Callable[[str, Announcement, Mapping[str, str]], None]
    """Takes the address, the announcement, and those of `secrets` that are set."""
    secrets: tuple[str, ...]
    """Names of environment variables. Only what moves an alias is given them: the step, on a cluster and here, and
    the commands."""


NOTIFIERS: dict[str, Notifier] = {
    "model_registry": Notifier(notify_model_registry, (REGISTRY_TOKEN,)),
    "mlflow": Notifier(notify_mlflow, SECRETS["mlflow"]),
    "webhook": Notifier(notify_webhook, (WEBHOOK_SECRET,)),
}
"""The notifiers by the key of the config that holds the address."""


def secrets() -> tuple[str, ...]:
    """The secrets of all notifiers."""
    return tuple(name for notifier in NOTIFIERS.values() for name in notifier.secrets)


def announce(
    config: AnnounceConfig, store: "Store", name: str, event: "Event", environment: Mapping[str, str]
) -> dict[str, str]:
    """Notify the servers that the config names; returns by their keys `NOTIFIED` or the reason for a failure."""
    addresses = {key: address for key, address in config if address}
    outcomes: dict[str, str] = {}
    for key, address in addresses.items():
        send, names = NOTIFIERS[key]
        try:
            send(
                address,
                announcement_of(store, name, event),
                {each: environment[each] for each in names if each in environment},
            )
            outcomes[key] = NOTIFIED
        except (FineloopError, LookupError, TypeError) as exc:  # the last two: not an answer of the API
            outcomes[key] = str(exc) if isinstance(exc, FineloopError) else f"{address} answers strangely: {exc!r}"
            logger.warning("%s", warning(key, name, event.body["alias"], outcomes[key]))
    return outcomes


def failed_notifications(steps: Iterable[StepRecord]) -> dict[str, str]:
    """The reasons of the notifications of a run's promotion that failed, by the key of the config."""
    announced = {key: why for step in steps for key, why in step.result.get("announced", {}).items()}
    return {key: why for key, why in announced.items() if why != NOTIFIED}


def warning(key: str, name: str, alias: str, why: str) -> str:
    """The warning that a server could not be notified of a move."""
    again = f"`fineloop adapters announce {name}@{alias}` notifies it again"
    return f"announce.{key} was not notified of {name}@{alias}: {why}; {again}"
