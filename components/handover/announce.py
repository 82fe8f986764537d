"""Notify Kubeflow's Model Registry, MLflow and a webhook of a moved alias, and a webhook of a night without a move.

What is told has happened, and a failed notification does not undo it. A warning names the server, and for a move the
command that notifies it again. Each notification creates what is missing, and repeating it changes nothing.
"""

import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from components.config.schema import TRACKER_SECRETS, AnnounceConfig, NightKind
from components.records.steps import StepRecord, finite
from components.registry import versions
from components.shared.errors import AnnounceError, FineloopError

if TYPE_CHECKING:
    from requests import PreparedRequest

    from components.registry.event_log import Event, EventKind
    from components.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Announcement:
    """A move of an alias, with facts about the version that it moved to. A text that was not recorded is empty."""

    event_id: str
    """The same whenever the notification is repeated."""
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
    """As the version's run measured them, without those that are not finite."""


def announcement_of(store: "Store", name: str, event: "Event") -> Announcement:
    """The notification of a moved alias. Raises StoreError: the version cannot be read."""
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
        **{key: body.get(key, "") for key in ("actor", "reason", "run_id")},
        version_uri=version.uri,
        manifest_sha256=version.manifest_sha256,
        event_uri=event.uri,
        trained_by=version.run_id,
        method=lineage.get("recipe", {}).get("method", ""),
        base=lineage.get("base", {}).get("reference", ""),
        dataset_uri=lineage.get("dataset", {}).get("uri", ""),
        metrics={key: number for key, value in version.metrics.items() if (number := finite(value)) is not None},
    )


@dataclass(frozen=True)
class Night:
    """A run that moved no alias. Texts may come from a training: they are text, for the receiver to escape."""

    event_id: str
    """The same whenever the notification is repeated, another where the same run ends in another way."""
    kind: NightKind
    time: str
    """ISO 8601, in UTC."""
    adapter: str
    alias: str
    run_id: str
    candidate: str | None
    """The version that was held or left over. It is not called `version`, which receivers of moves deploy."""
    title: str
    reason: str
    commands: list[dict[str, str]]
    """What may help, the likeliest first: `command`, and `why` one would run it."""
    report_uri: str


PAUSE_S = 0.5
"""Half of the pause before the third try; the second comes at once."""
PATIENCE_S = 30
"""Limit in seconds for all requests of one notification together."""


class HttpApi:
    """JSON over HTTP for notifications, with few tries and short waits, so that nothing holds up a run.

    Redirects are not followed: that would forward the token.
    """

    def __init__(self, url: str, *, token: str = "", login: tuple[str, str] | None = None) -> None:
        """`token` is a bearer token, `login` a user's name and password."""
        from requests import Session
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry

        again = Retry(
            2,
            backoff_factor=PAUSE_S,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
            respect_retry_after_header=False,  # which may ask for hours
        )
        self._url, self._session = url.rstrip("/"), Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))

        def bearing(request: "PreparedRequest") -> "PreparedRequest":
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        # If it were only a header, an entry of ~/.netrc would replace it.
        self._session.auth = bearing if token else login

    def get(self, path: str, *, may_lack: bool = False, **query: str) -> dict[str, Any]:
        """Get an object; empty if there is none (404) and it `may_lack`. Raises AnnounceError: the server is away, or
        its answer is not a success, or not a JSON object."""
        return self._object("GET", path, may_lack=may_lack, params=query)

    def post(self, path: str, body: Mapping[str, Any], *, verb: str = "POST") -> dict[str, Any]:
        """Send an object, and return the answer as for `get`."""
        return self._object(verb, path, json=body)

    def _object(self, verb: str, path: str, **request: Any) -> dict[str, Any]:
        body = self.send(verb, path, **request)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise AnnounceError(f"{verb} {self._url}{path} answered no JSON object: {body[:200]!r}")
        return value

    def send(self, verb: str, path: str = "", *, may_lack: bool = False, **request: Any) -> bytes:
        """Send what `requests` takes, and return the answer's body; `{}` for a 404 where that is allowed."""
        from urllib3.exceptions import HTTPError

        url, timeouts_s = f"{self._url}{path}", (5, 15)  # to connect, and between two pieces of an answer
        try:
            with self._session.request(
                verb, url, timeout=timeouts_s, allow_redirects=False, stream=True, **request
            ) as response:
                body = bytes(response.raw.read(4 * 2**20, decode_content=True))
        except (OSError, HTTPError) as exc:  # requests' errors are OSErrors
            raise AnnounceError(f"{verb} {url}: {exc}") from exc
        if may_lack and response.status_code == 404:
            return b"{}"
        if not 200 <= response.status_code < 300:
            text = " ".join(body[:200].decode(errors="replace").split())
            raise AnnounceError(f"{verb} {response.url} answered {response.status_code}: {text}")
        return body


# MLflow, by its REST API (mlflow.org/docs/latest/rest-api.html, 2.0): its own client would add a dozen packages to the
# image of a step for these few calls.

VERSION_TAG = "fineloop.version"
"""The tag by which a version's run is found again."""


def notify_mlflow(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Record the version's run and the version, each once, and set the alias. Raises AnnounceError: the server cannot
    be reached, or refuses."""
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    api = HttpApi(f"{url.rstrip('/')}/api/2.0/mlflow", token=token, login=(user, password) if user else None)
    name = announcement.adapter
    if not api.get("/registered-models/get", may_lack=True, name=name):
        api.post("/registered-models/create", {"name": name})
    query = f"name = '{name}' and source_path = '{announcement.version_uri}'"
    if not (numbered := api.get("/model-versions/search", filter=query).get("model_versions")):
        tags = {
            VERSION_TAG: announcement.version,
            "fineloop.run_id": announcement.trained_by,
            "fineloop.manifest_sha256": announcement.manifest_sha256,
        }
        tagged = [{"key": key, "value": value} for key, value in tags.items()]
        run_id = _mlflow_run(api, announcement, tagged)
        version = {"name": name, "source": announcement.version_uri, "run_id": run_id, "tags": tagged}
        numbered = [api.post("/model-versions/create", version)["model_version"]]
    alias = {"name": name, "alias": announcement.alias, "version": str(numbered[0]["version"])}
    api.post("/registered-models/alias", alias)


def _mlflow_run(api: HttpApi, announcement: Announcement, tags: list[dict[str, str]]) -> str:
    """The id of the version's run, in the experiment with the adapter's name. The run is created or completed; nothing
    that it has is removed."""
    name = announcement.adapter
    if known := api.get("/experiments/get-by-name", may_lack=True, experiment_name=name):
        experiment_id = known["experiment"]["experiment_id"]
    else:
        experiment_id = api.post("/experiments/create", {"name": name})["experiment_id"]
    query = {"experiment_ids": [experiment_id], "filter": f"tags.`{VERSION_TAG}` = '{announcement.version}'"}
    time_ms = int(datetime.fromisoformat(announcement.time).timestamp() * 1000)
    begun = {
        "experiment_id": experiment_id,
        "run_name": announcement.trained_by or announcement.version,
        "start_time": time_ms,
        "tags": tags,
    }
    runs = api.post("/runs/search", query).get("runs") or [api.post("/runs/create", begun)["run"]]
    run_id = str(runs[0]["info"]["run_id"])
    metrics = [
        {"key": key, "value": value, "timestamp": time_ms, "step": 0} for key, value in announcement.metrics.items()
    ]
    params = [{"key": key, "value": getattr(announcement, key)} for key in ("method", "base", "dataset_uri")]
    api.post("/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params})
    api.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": time_ms})
    return run_id


# Kubeflow's Model Registry, by its REST API (kubeflow/hub, api/openapi): its own Python client configures logging and
# patches asyncio for the whole process, and has no timeouts. The registry has no aliases: each is a property of the
# registered model, with the version as its value.

REGISTRY_TOKEN = "FINELOOP_MODEL_REGISTRY_TOKEN"


def notify_model_registry(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Register the adapter, the version and its address, each once, and point the alias at the version. Raises
    AnnounceError: the registry cannot be reached, or refuses."""
    # The same requests. Servers from before 2026 know only the older API, which is to end with April 2027.
    newest, older = (
        HttpApi(f"{url.rstrip('/')}/api/model_registry/{version}", token=environment.get(REGISTRY_TOKEN, ""))
        for version in ("v1", "v1alpha3")
    )
    api = newest if newest.get("/registered_models", may_lack=True, pageSize="1") else older
    name, author = announcement.adapter, "fineloop"
    model = api.get("/registered_model", may_lack=True, name=name)
    model = model or api.post("/registered_models", {"name": name, "owner": author})
    version = api.get("/model_version", may_lack=True, name=announcement.version, parentResourceId=model["id"])
    if not version:
        keys = ("manifest_sha256", "method", "base", "dataset_uri")
        texts = {"run_id": announcement.trained_by, **{key: getattr(announcement, key) for key in keys}}
        properties: dict[str, Any] = {key: _text_property(value) for key, value in texts.items()}
        for key, value in announcement.metrics.items():
            properties[key] = {"metadataType": "MetadataDoubleValue", "double_value": value}
        new = {"name": announcement.version, "registeredModelId": model["id"], "author": author}
        version = api.post("/model_versions", {**new, "customProperties": properties})
    artifacts = f"/model_versions/{version['id']}/artifacts"
    if not api.get(artifacts).get("items"):
        artifact = {
            "artifactType": "model-artifact",
            "name": name,  # the model's, because the registry's client looks for it by that: get_model_artifact
            "uri": announcement.version_uri,
            "state": "LIVE",
            "modelFormatName": "peft",
            "modelFormatVersion": "1",
        }
        api.post(artifacts, artifact)
    properties = {**model.get("customProperties", {}), announcement.alias: _text_property(announcement.version)}
    api.post(f"/registered_models/{model['id']}", {"customProperties": properties}, verb="PATCH")


def _text_property(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}


# A webhook gets a move or a night as JSON, signed as GitHub signs its own, so that existing receivers can check it:
# https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries

WEBHOOK_SECRET = "FINELOOP_WEBHOOK_SECRET"


def notify_webhook(url: str, announcement: Announcement | Night, environment: Mapping[str, str]) -> None:
    """Post the move or the night, signed if the environment holds a secret.

    A receiver recognises a repeated notification by X-Fineloop-Delivery, the event's id.

    Raises:
        AnnounceError: the receiver cannot be reached, or did not accept it.
    """
    body = json.dumps(asdict(announcement), sort_keys=True).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Fineloop-Event": announcement.kind,
        "X-Fineloop-Delivery": announcement.event_id,
    }
    if secret := environment.get(WEBHOOK_SECRET):
        headers["X-Hub-Signature-256"] = signature(body, secret)
    HttpApi(url).send("POST", data=body, headers=headers)


def signature(body: bytes, secret: str) -> str:
    """The HMAC-SHA256 of the body in hex, in the header's form."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


NOTIFIED = "told"
"""The outcome of a notification that arrived; any other outcome is the reason why it failed."""


class Notifier(NamedTuple):
    """How one kind of server is notified."""

    notify: Callable[[str, Any, Mapping[str, str]], None]
    """Takes the address, the announcement or the night, and those of `secrets` that are set."""
    secrets: tuple[str, ...]
    """Names of environment variables. Only what moves an alias is given them, the step, on a cluster and here, and the
    commands; and the step that reports, if the server is told of nights."""
    of_nights: bool = False
    """Whether it is told of nights; a server that keeps versions and aliases has nothing to do then."""


NOTIFIERS: dict[str, Notifier] = {
    "model_registry": Notifier(notify_model_registry, (REGISTRY_TOKEN,)),
    "mlflow": Notifier(notify_mlflow, TRACKER_SECRETS["mlflow"]),
    "webhook": Notifier(notify_webhook, (WEBHOOK_SECRET,), of_nights=True),
}
"""The notifiers by the key of the config that holds the address."""


def secrets(*, of_nights: bool = False) -> tuple[str, ...]:
    """The secrets of all notifiers, or of those that are told of nights."""
    return tuple(name for each in NOTIFIERS.values() if each.of_nights or not of_nights for name in each.secrets)


def announce(
    config: AnnounceConfig, store: "Store", name: str, event: "Event", environment: Mapping[str, str]
) -> dict[str, str]:
    """Notify the servers that the config names; returns by their keys `NOTIFIED` or the reason for a failure."""
    outcomes = _notify(config, NOTIFIERS, lambda: announcement_of(store, name, event), environment)
    for key, why in _failed(outcomes).items():
        logger.warning("%s", warning(key, name, event.body["alias"], why))
    return outcomes


def announce_night(
    config: AnnounceConfig, night: Night, environment: Mapping[str, str], *, notified: Iterable[str] = ()
) -> dict[str, str]:
    """Notify the servers that are told of nights, but those that are `notified` already; returns as `announce`."""
    before = dict.fromkeys(notified, NOTIFIED)
    keys = [key for key, each in NOTIFIERS.items() if each.of_nights and key not in before]
    outcomes = _notify(config, keys if night.kind in config.nights else (), lambda: night, environment)
    for key, why in _failed(outcomes).items():
        logger.warning("%s", night_warning(key, why))
    return before | outcomes


def _notify(
    config: AnnounceConfig,
    keys: Iterable[str],
    told: Callable[[], Announcement | Night],
    environment: Mapping[str, str],
) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    for key in keys:
        if address := config.servers.get(key):
            own = {secret: environment[secret] for secret in NOTIFIERS[key].secrets if secret in environment}
            try:
                _in_time(address, partial(NOTIFIERS[key].notify, address, told(), own))
                outcomes[key] = NOTIFIED
            except (FineloopError, LookupError, TypeError) as exc:  # the last two: not an answer of the API
                outcomes[key] = str(exc) if isinstance(exc, FineloopError) else f"{address} answers strangely: {exc!r}"
    return outcomes


def _in_time(address: str, notify: Callable[[], None]) -> None:
    """Notify in a thread: a server that sends a byte now and then would never exceed a limit on a single wait."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            notify()
            outcome.set_result(None)
        except Exception as exc:  # passed to the thread that waits
            outcome.set_exception(exc)

    Thread(target=run, daemon=True).start()
    try:
        outcome.result(PATIENCE_S)
    except TimeoutError as exc:
        raise AnnounceError(f"{address}: no whole answer after {PATIENCE_S} s") from exc


def failed_notifications(steps: Iterable[StepRecord]) -> dict[str, str]:
    """The reasons of a run's notifications that failed, by the key of the config."""
    return _failed({key: why for step in steps for key, why in step.result.get("announced", {}).items()})


def _failed(outcomes: Mapping[str, str]) -> dict[str, str]:
    return {key: why for key, why in outcomes.items() if why != NOTIFIED}


def warning(key: str, name: str, alias: str, why: str) -> str:
    """The warning that a server could not be notified of a move."""
    again = f"`fineloop adapters announce {name}@{alias}` notifies it again"
    return f"announce.{key} was not notified of {name}@{alias}: {why}; {again}"


def night_warning(key: str, why: str) -> str:
    """The warning that a server could not be notified of a run that moved no alias."""
    return f"announce.{key} was not notified of how this run ended: {why}"
