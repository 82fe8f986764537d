"""Notify registries, a webhook and people of a moved alias, and the last two of a night without a move.

What is told has happened, and a failed notification does not undo it. A warning names the server, and for a move the
command that notifies it again. A registry gets what is missing there, so that repeating that changes nothing; a message
is sent again only where the server did not take it.
"""

import hashlib
import hmac
import json
import logging
import re
import smtplib
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import datetime
from email.message import EmailMessage
from email.utils import format_datetime
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from components.config.schema import TRACKER_SECRETS, AnnounceConfig, NightKind
from components.records.steps import StepRecord, finite
from components.registry import versions
from components.shared.errors import AnnounceError, FineloopError
from components.shared.protocol import printable

if TYPE_CHECKING:
    from requests import PreparedRequest

    from components.registry.event_log import Event, EventKind
    from components.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Announcement:
    """A move of an alias, with facts about the version that it moved to. A text that was not recorded is empty."""

    event_id: str
    kind: "EventKind"
    time: str
    adapter: str
    alias: str
    version: str
    previous: str | None
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


class NotTaken(AnnounceError):
    """The server took nothing, so that the notification may be sent again, after `wait_s`."""

    def __init__(self, message: str, wait_s: float = 0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class HttpApi:
    """JSON over HTTP for notifications. Redirects are not followed: that would forward the token."""

    def __init__(self, url: str, *, token: str = "", login: tuple[str, str] | None = None, shown: str = "") -> None:
        """`token` is a bearer token, `login` a user's name and password; errors name a secret address as `shown`."""
        from requests import Session

        self._url, self._session = url.rstrip("/"), Session()
        self._shown = shown or self._url

        def bearing(request: "PreparedRequest") -> "PreparedRequest":
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        # If it were only a header, an entry of ~/.netrc would replace it.
        self._session.auth = bearing if token else login

    def ask(self, path: str, body: Any = None, *, may_lack: bool = False, **query: str) -> dict[str, Any]:
        """Get an object, or post one; empty if there is none (404) and it `may_lack`. Raises AnnounceError: the server
        is away, or its answer is not a success, or not a JSON object."""
        verb = "POST" if body else "GET"
        answer = self.send(verb, path, may_lack=may_lack, params=query, json=body)
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise AnnounceError(f"{verb} {self._shown}{path} answered no JSON object: {answer[:200]!r}")
        return value

    def send(self, verb: str, path: str = "", *, may_lack: bool = False, **request: Any) -> bytes:
        """Send what `requests` takes, and return the answer's body; `{}` for a 404 where that is allowed."""
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

        url, timeouts_s = f"{self._url}{path}", (5, 15)  # to connect, and between two pieces of an answer
        try:
            with self._session.request(
                verb, url, timeout=timeouts_s, allow_redirects=False, stream=True, **request
            ) as response:
                body = bytes(response.raw.read(4 * 2**20, decode_content=True))
        except (OSError, HTTPError) as exc:  # requests' errors are OSErrors; urllib3's reason names only the host
            cause = getattr(exc.args[0] if exc.args else exc, "reason", exc)
            unsent = verb == "GET" or isinstance(cause, (NewConnectionError, ConnectTimeoutError))
            raise (NotTaken if unsent else AnnounceError)(f"{verb} {self._shown}{path}: {cause}") from exc
        status = response.status_code
        if may_lack and status == 404:
            return b"{}"
        if not 200 <= status < 300:
            text = " ".join(body[:200].decode(errors="replace").split())
            message = f"{verb} {self._shown}{path} answered {status}: {text}"
            if status in (429, 503) or (verb == "GET" and status in (502, 504)):
                wait = response.headers.get("Retry-After", "")
                raise NotTaken(message, float(wait) if wait.isdecimal() else 0)
            raise AnnounceError(message)
        return body


# MLflow, by its REST API (mlflow.org/docs/latest/rest-api.html, 2.0): its own client would add a dozen packages to the
# image of a step for these few calls.

VERSION_TAG = "fineloop.version"
"""The tag by which a version's run is found again."""


def notify_mlflow(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Record the version's run and the version, each once, and set the alias."""
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    api = HttpApi(f"{url.rstrip('/')}/api/2.0/mlflow", token=token, login=(user, password) if user else None)
    name, time_ms = announcement.adapter, int(datetime.fromisoformat(announcement.time).timestamp() * 1000)
    if not api.ask("/registered-models/get", may_lack=True, name=name):
        api.ask("/registered-models/create", {"name": name})
    query = f"name = '{name}' and source_path = '{announcement.version_uri}'"
    if not (numbered := api.ask("/model-versions/search", filter=query).get("model_versions")):
        tags = {
            VERSION_TAG: announcement.version,
            "fineloop.run_id": announcement.trained_by,
            "fineloop.manifest_sha256": announcement.manifest_sha256,
        }
        tagged = [{"key": key, "value": value} for key, value in tags.items()]
        if answer := api.ask("/experiments/get-by-name", may_lack=True, experiment_name=name):
            experiment_id = answer["experiment"]["experiment_id"]
        else:
            experiment_id = api.ask("/experiments/create", {"name": name})["experiment_id"]
        same = {"experiment_ids": [experiment_id], "filter": f"tags.`{VERSION_TAG}` = '{announcement.version}'"}
        run_name = announcement.trained_by or announcement.version
        begun = {"experiment_id": experiment_id, "run_name": run_name, "start_time": time_ms, "tags": tagged}
        runs = api.ask("/runs/search", same).get("runs") or [api.ask("/runs/create", begun)["run"]]
        run_id = str(runs[0]["info"]["run_id"])
        measured = announcement.metrics.items()
        metrics = [{"key": key, "value": value, "timestamp": time_ms, "step": 0} for key, value in measured]
        params = [{"key": key, "value": getattr(announcement, key)} for key in ("method", "base", "dataset_uri")]
        api.ask("/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params})
        api.ask("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": time_ms})
        version = {"name": name, "source": announcement.version_uri, "run_id": run_id, "tags": tagged}
        numbered = [api.ask("/model-versions/create", version)["model_version"]]
    alias = {"name": name, "alias": announcement.alias, "version": str(numbered[0]["version"])}
    api.ask("/registered-models/alias", alias)


# Kubeflow's Model Registry, by its REST API (kubeflow/hub, api/openapi): its own Python client configures logging and
# patches asyncio for the whole process, and has no timeouts. The registry has no aliases: each is a property of the
# registered model, with the version as its value.

REGISTRY_TOKEN = "FINELOOP_MODEL_REGISTRY_TOKEN"


def notify_model_registry(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Register the adapter, the version and its address, each once, and point the alias at the version."""
    # The same requests. Servers from before 2026 know only the older API, which is to end with April 2027.
    newest, older = (
        HttpApi(f"{url.rstrip('/')}/api/model_registry/{version}", token=environment.get(REGISTRY_TOKEN, ""))
        for version in ("v1", "v1alpha3")
    )
    api = newest if newest.ask("/registered_models", may_lack=True, pageSize="1") else older
    name, author = announcement.adapter, "fineloop"
    model = api.ask("/registered_model", may_lack=True, name=name)
    model = model or api.ask("/registered_models", {"name": name, "owner": author})
    version = api.ask("/model_version", may_lack=True, name=announcement.version, parentResourceId=model["id"])
    if not version:
        keys = ("manifest_sha256", "method", "base", "dataset_uri")
        texts = {"run_id": announcement.trained_by, **{key: getattr(announcement, key) for key in keys}}
        properties: dict[str, Any] = {key: _text_property(value) for key, value in texts.items()}
        for key, value in announcement.metrics.items():
            properties[key] = {"metadataType": "MetadataDoubleValue", "double_value": value}
        new = {"name": announcement.version, "registeredModelId": model["id"], "author": author}
        version = api.ask("/model_versions", {**new, "customProperties": properties})
    artifacts = f"/model_versions/{version['id']}/artifacts"
    if not api.ask(artifacts).get("items"):
        artifact = {
            "artifactType": "model-artifact",
            "name": name,  # the model's, because the registry's client looks for it by that: get_model_artifact
            "uri": announcement.version_uri,
            "state": "LIVE",
            "modelFormatName": "peft",
            "modelFormatVersion": "1",
        }
        api.ask(artifacts, artifact)
    properties = {**model.get("customProperties", {}), announcement.alias: _text_property(announcement.version)}
    api.send("PATCH", f"/registered_models/{model['id']}", json={"customProperties": properties})


def _text_property(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}


# A webhook gets a move or a night as JSON, signed as GitHub signs its own, so that existing receivers can check it:
# https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries

WEBHOOK_SECRET = "FINELOOP_WEBHOOK_SECRET"


def notify_webhook(url: str, told: Announcement | Night, environment: Mapping[str, str]) -> None:
    """Post the move or the night, signed if the environment holds a secret. A receiver recognises a repeated
    notification by X-Fineloop-Delivery, the event's id."""
    body = json.dumps(asdict(told), sort_keys=True).encode()
    headers = {"Content-Type": "application/json", "X-Fineloop-Event": told.kind, "X-Fineloop-Delivery": told.event_id}
    if secret := environment.get(WEBHOOK_SECRET):
        headers["X-Hub-Signature-256"] = signature(body, secret)
    HttpApi(url).send("POST", data=body, headers=headers)


def signature(body: bytes, secret: str) -> str:
    """The HMAC-SHA256 of the body in hex, in the header's form."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


# People get a message: the title, the reason, what to run and where it lies. A reason may quote a training, so it goes
# where it is no markup and mentions nobody. What would let anybody else write there comes from the environment.

SLACK, TEAMS, SMTP = "FINELOOP_SLACK_WEBHOOK", "FINELOOP_TEAMS_WEBHOOK", "FINELOOP_SMTP_URL"


def _lines(told: Announcement | Night) -> list[str]:
    """The message, its first line the title."""
    if isinstance(told, Night):
        commands = [f"{step['command']} # {step['why']}" for step in told.commands]
        lines = [f"{told.title} ({told.kind})", told.reason, *commands, told.report_uri]
    else:
        title = f"{told.adapter}: {told.version} is in {told.alias} ({told.kind.replace('_', ' ')})"
        back = f"fineloop adapters rollback {told.adapter} --alias {told.alias} # go back to {told.previous}"
        lines = [title, told.reason, back if told.previous and told.kind != "rolled_back" else "", told.version_uri]
    return [printable(" ".join(line.split()))[:2000] for line in lines if line]


def _post(variable: str, body: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    address = environment.get(variable, "")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?/\S*", address):
        raise AnnounceError(f"{variable} holds no address")
    HttpApi(address, shown=variable).send("POST", json=body)


def notify_slack(_: str, told: Announcement | Night, environment: Mapping[str, str]) -> None:
    """Post to an incoming webhook (docs.slack.dev/messaging/sending-messages-using-incoming-webhooks)."""
    lines = _lines(told)
    blocks = [{"type": "section", "text": {"type": "plain_text", "text": line, "emoji": False}} for line in lines]
    _post(SLACK, {"text": f"{told.adapter}: {told.kind}", "blocks": blocks, "unfurl_links": False}, environment)


def notify_teams(_: str, told: Announcement | Night, environment: Mapping[str, str]) -> None:
    """Post an Adaptive Card to a workflow that begins "When a Teams webhook request is received"."""
    # A TextRun shows its text as it is; a TextBlock would read it as Markdown, links included.
    runs = [{"type": "TextRun", "text": line} for line in _lines(told)]
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": [{"type": "RichTextBlock", "inlines": [run]} for run in runs],
    }
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": card}
    _post(TEAMS, {"type": "message", "attachments": [attachment]}, environment)


def notify_email(address: str, told: Announcement | Night, environment: Mapping[str, str]) -> None:
    """Send an e-mail over TLS, from the user who logs in if that is an address, or else from the receiver."""
    place = re.fullmatch(r"smtp://(?:([^:@/]+):([^:@/]*)@)?([\w.-]+)(?::(\d+))?/?", environment.get(SMTP, ""))
    if place is None:  # no part of it is said: it may be of the password
        raise AnnounceError(f"{SMTP} is not smtp://USER:PASSWORD@HOST:PORT, each part escaped as in a URL")
    user, password, host, port = unquote(place[1] or ""), unquote(place[2] or ""), place[3], int(place[4] or 587)
    lines, mail = _lines(told), EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = lines[0], user if "@" in user else address, address
    mail["Date"] = format_datetime(datetime.fromisoformat(told.time))
    mail["Message-ID"] = f"<{hashlib.sha256(told.event_id.encode()).hexdigest()[:32]}@fineloop>"
    mail["Auto-Submitted"] = "auto-generated"  # no holiday notes in answer (RFC 3834)
    mail.set_content("\n\n".join(lines))
    server = None
    try:
        with smtplib.SMTP(host, port, timeout=15) as server:
            server.starttls(context=ssl.create_default_context())
            if user:
                server.login(user, password)
            server.send_message(mail)
    except OSError as exc:  # smtplib's errors are OSErrors
        raise (AnnounceError if server else NotTaken)(f"{host}: {exc}") from exc


NOTIFIED = "told"
"""The outcome of a notification that arrived; any other outcome is the reason why it failed."""


class Notifier(NamedTuple):
    """How one kind of server is notified."""

    notify: Callable[[str, Any, Mapping[str, str]], None]
    """Takes the address, the announcement or the night, and those of `secrets` that are set. Raises AnnounceError: the
    server cannot be reached, or refuses; NotTaken, if it may be asked again."""
    secrets: tuple[str, ...]
    """Names of environment variables. Only what moves an alias is given them, the step, on a cluster and here, and the
    commands; and the step that reports, if the server is told of nights."""
    of_nights: bool = False
    """Whether it is told of nights; a server that keeps versions and aliases has nothing to do then."""


NOTIFIERS: dict[str, Notifier] = {
    "model_registry": Notifier(notify_model_registry, (REGISTRY_TOKEN,)),
    "mlflow": Notifier(notify_mlflow, TRACKER_SECRETS["mlflow"]),
    "webhook": Notifier(notify_webhook, (WEBHOOK_SECRET,), of_nights=True),
    "slack": Notifier(notify_slack, (SLACK,), of_nights=True),
    "teams": Notifier(notify_teams, (TEAMS,), of_nights=True),
    "email": Notifier(notify_email, (SMTP,), of_nights=True),
}
"""The notifiers by the key of the config that holds the address, or by what is in `announce.people`."""


def secrets(*, of_nights: bool = False) -> tuple[str, ...]:
    """The secrets of all notifiers, or of those that are told of nights."""
    return tuple(name for kind in NOTIFIERS.values() if kind.of_nights or not of_nights for name in kind.secrets)


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """The text without what this environment keeps secret."""
    for name, value in environment.items():
        if len(value) >= 8 and (name in secrets() or re.search("KEY|TOKEN|SECRET|PASSWORD", name)):
            text = text.replace(value, "***")
    return text


def announce(
    config: AnnounceConfig, store: "Store", name: str, event: "Event", environment: Mapping[str, str]
) -> dict[str, str]:
    """Notify the servers that the config names; returns by their keys `NOTIFIED` or the reason for a failure."""
    moved = f"{name}@{event.body['alias']}"
    return _notify(config.servers, lambda: announcement_of(store, name, event), environment, moved)


def announce_night(
    config: AnnounceConfig, night: Night, environment: Mapping[str, str], *, notified: Iterable[str] = ()
) -> dict[str, str]:
    """Notify the servers that are told of nights, but those that are `notified` already; returns as `announce`."""
    servers = config.servers if night.kind in config.nights else {}
    before = dict.fromkeys(notified, NOTIFIED)
    left = {key: it for key, it in servers.items() if key not in before and _notifier(key, it).of_nights}
    return before | _notify(left, lambda: night, environment)


def reached(config: AnnounceConfig, environment: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the environment has the secrets without which people get no message; and who is notified, in words."""
    needed = (name for who in config.people for name in _notifier("", who).secrets)
    missing = [name for name in dict.fromkeys(needed) if not environment.get(name)]
    who = ", ".join(config.servers) or "nobody"
    who += "; the webhook unsigned" if config.webhook and not environment.get(WEBHOOK_SECRET) else ""
    return not missing, f"{who}; not set: {', '.join(missing)}" if missing else who


def _notifier(key: str, address: str) -> Notifier:
    return NOTIFIERS.get(key) or NOTIFIERS.get(address) or NOTIFIERS["email"]


def _notify(
    servers: Mapping[str, str],
    told: Callable[[], Announcement | Night],
    environment: Mapping[str, str],
    moved: str = "",
) -> dict[str, str]:
    outcomes = dict.fromkeys(servers, NOTIFIED)
    for key, address in servers.items():
        notifier = _notifier(key, address)
        own = {secret: environment[secret] for secret in notifier.secrets if secret in environment}
        try:
            _in_time(address, partial(notifier.notify, address, told(), own))
        except (FineloopError, LookupError, TypeError) as exc:  # the last two: not an answer of the API
            why = str(exc) if isinstance(exc, FineloopError) else f"{address} answers strangely: {exc!r}"
            outcomes[key] = without_secrets(why, own)
            logger.warning("%s", warning(key, outcomes[key], moved))
    return outcomes


PAUSE_S = 1
"""The pause before the third try; the second comes at once."""
PATIENCE_S = 30
"""Limit in seconds for all requests of one notification together."""


def _in_time(address: str, notify: Callable[[], None]) -> None:
    """Notify in a thread: a server that sends a byte now and then would never exceed a limit on a single wait."""
    outcome: Future[None] = Future()

    def run() -> None:
        for pause_s in (0, PAUSE_S, None):
            try:
                notify()
                return outcome.set_result(None)
            except NotTaken as exc:
                if pause_s is None or exc.wait_s > PATIENCE_S / 3:
                    return outcome.set_exception(exc)
                time.sleep(max(exc.wait_s, pause_s))
            except Exception as exc:  # passed to the thread that waits
                return outcome.set_exception(exc)

    Thread(target=run, daemon=True).start()
    try:
        outcome.result(PATIENCE_S)
    except TimeoutError as exc:
        raise AnnounceError(f"{address}: no whole answer after {PATIENCE_S} s") from exc


def failed_notifications(steps: Iterable[StepRecord]) -> dict[str, str]:
    """The reasons of a run's notifications that failed, by the key of the config."""
    outcomes = [pair for step in steps for pair in step.result.get("announced", {}).items()]
    return {key: why for key, why in outcomes if why != NOTIFIED}


def warning(key: str, why: str, moved: str = "") -> str:
    """The warning that a server could not be notified of a move, of `NAME@ALIAS`, or of a run that moved no alias."""
    again = f"; `fineloop adapters announce {moved}` notifies it again" if moved else ""
    return f"announce.{key} was not notified of {moved or 'how this run ended'}: {why}{again}"
