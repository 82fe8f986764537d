"""Each server is a double, or a real one where FINELOOP_MLFLOW or FINELOOP_MODEL_REGISTRY is its address.

An MLflow is `mlflow server --backend-store-uri sqlite:///mlflow.db`, in an environment of its own.
"""

import json
import logging
import os
import socket
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from pydantic import ValidationError

from components.config.config_file import loads
from components.config.schema import AnnounceConfig
from components.handover import announce as announcing
from components.handover.announce import NOTIFIERS, Night, Notifier, announce, announce_night, signature
from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry import aliases, versions
from components.registry.event_log import Event
from components.shared.errors import ConfigError
from components.store.store import Store
from pipelines.local.seaweedfs import write_certificate
from tests.components.registry.adapters import published
from tests.doubles.http_server import Answer, Handle, serving
from tests.doubles.mlflow_server import Mlflow
from tests.doubles.model_registry import ModelRegistry
from tests.doubles.smtp_server import MailServer, mailing

TOKEN = {"MLFLOW_TRACKING_TOKEN": "m", "FINELOOP_MODEL_REGISTRY_TOKEN": "r"}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two tries."""
    monkeypatch.setattr(announcing, "PAUSE_S", 0)


@pytest.fixture
def name() -> str:
    """An adapter that no server knows yet."""
    return f"sums-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def mlflow() -> Iterator[str]:
    if real := os.environ.get("FINELOOP_MLFLOW"):
        yield real
        return
    with serving(Mlflow("m").handle) as url:
        yield url


@pytest.fixture(params=["v1", "v1alpha3"])
def model_registry(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of its API in the newest version that it serves."""
    api = f"/api/model_registry/{request.param}"
    if real := os.environ.get("FINELOOP_MODEL_REGISTRY"):
        yield real + api
        return
    with serving(ModelRegistry("r", versions=[request.param]).handle) as url:
        yield url + api


def promoted(store: Store, name: str, weights: bytes = b"one") -> Event:
    """Publish, evaluate and promote."""
    run_id = f"run-{weights.decode()}"
    made_from = {"base": {"reference": "org/base"}, "dataset": {"uri": "s3://b/datasets/d/"}}
    version = published(store, weights, name=name, run_id=run_id, recipe={"method": "qlora"}, **made_from).version
    measured = Measured(version=version, metrics={"loss": 0.25, "exact_match": None})
    runs.write(store, run_id, Evaluation(run_id=run_id, records=1, models={"candidate": measured}))
    return aliases.promote(store, name, version, cause=aliases.Cause(run_id, "ada", "better"))


def asked(url: str, path: str, **query: str) -> dict[str, Any]:
    token = "m" if "mlflow" in path else "r"
    answer = requests.get(url + path, params=query, headers={"Authorization": f"Bearer {token}"}, timeout=10)
    answer.raise_for_status()
    return dict(answer.json())


def test_mlflow_has_the_version_its_metrics_and_the_alias_that_moves_on(store: Store, mlflow: str, name: str) -> None:
    config, api = AnnounceConfig(mlflow=mlflow), "/api/2.0/mlflow"
    for weights in (b"one", b"two"):
        event = promoted(store, name, weights)
        assert announce(config, store, name, event, TOKEN) == {"mlflow": "told"}
        assert announce(config, store, name, event, TOKEN) == {"mlflow": "told"}  # which makes nothing twice
        version = asked(mlflow, f"{api}/registered-models/alias", name=name, alias="production")["model_version"]
        uri = f"s3://{store.bucket}/{store.prefix}/adapters/{name}/versions/{event.body['to']}"
        assert version["source"].rstrip("/") == uri
        run = asked(mlflow, f"{api}/runs/get", run_id=version["run_id"])["run"]
        assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", f"run-{weights.decode()}")
        assert [(each["key"], each["value"]) for each in run["data"]["metrics"]] == [("loss", 0.25)]
        params = {each["key"]: each["value"] for each in run["data"]["params"]}
        assert params == {"method": "qlora", "base": "org/base", "dataset_uri": "s3://b/datasets/d/"}
    assert version["version"] == "2"


def test_the_model_registry_has_the_version_and_the_alias(store: Store, model_registry: str, name: str) -> None:
    config = AnnounceConfig(model_registry=model_registry.partition("api/")[0])
    for weights in (b"one", b"two"):
        event = promoted(store, name, weights)
        assert announce(config, store, name, event, TOKEN) == {"model_registry": "told"}
        assert announce(config, store, name, event, TOKEN) == {"model_registry": "told"}
        model = asked(model_registry, "/registered_model", name=name)
        assert model["customProperties"]["production"]["string_value"] == event.body["to"]
        version = asked(model_registry, "/model_version", name=event.body["to"], parentResourceId=model["id"])
        properties = version["customProperties"]
        assert properties["loss"] == {"metadataType": "MetadataDoubleValue", "double_value": 0.25}
        assert properties["manifest_sha256"]["string_value"] == event.body["manifest_sha256"]
        (artifact,) = asked(model_registry, f"/model_versions/{version['id']}/artifacts")["items"]
        assert artifact["uri"].rstrip("/") == versions.resolve(store, f"{name}@{event.body['to']}").uri


def test_a_webhook_is_signed_as_github_signs() -> None:
    # The example of GitHub's own documentation, "Validating webhook deliveries".
    expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert signature(b"Hello, World!", "It's a Secret to Everybody") == expected


def test_a_notifier_is_given_its_own_secrets_alone(store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    notifier = Notifier(lambda _url, _announcement, environment: given.append(dict(environment)), ("A", "B"))
    monkeypatch.setitem(NOTIFIERS, "webhook", notifier)
    environment = {"A": "a", "FINELOOP_SIGNING_KEY": "pem", "MLFLOW_TRACKING_TOKEN": "m"}
    announce(AnnounceConfig(webhook="http://127.0.0.1:9"), store, name, promoted(store, name), environment)
    assert given == [{"A": "a"}]


@pytest.mark.parametrize("environment", [{}, {"FINELOOP_WEBHOOK_SECRET": "hush"}])
def test_a_busy_webhook_is_asked_again(store: Store, name: str, environment: Mapping[str, str]) -> None:
    got: list[tuple[bytes, Mapping[str, str]]] = []

    def handle(_verb: str, path: str, _query: Mapping[str, str], body: bytes, headers: Mapping[str, str]) -> Answer:
        assert path == "/hook"
        got.append((body, headers))
        return (503 if len(got) < 3 else 200), "busy"

    event = promoted(store, name)
    with serving(handle) as url:
        outcome = announce(AnnounceConfig(webhook=f"{url}/hook?a=b"), store, name, event, environment)
    assert (outcome, len(got)) == ({"webhook": "told"}, 3)
    body, headers = got[-1]
    sent = json.loads(body)
    assert (sent["adapter"], sent["alias"], sent["version"]) == (name, "production", event.body["to"])
    assert (sent["previous"], sent["actor"], sent["reason"]) == (None, "ada", "better")
    assert (sent["event_id"], sent["metrics"]) == (headers["X-Fineloop-Delivery"], {"loss": 0.25})
    signed = headers["X-Hub-Signature-256"]
    assert signed == (signature(body, "hush") if environment else None)


def test_a_failed_notification_is_a_warning_with_the_command_that_repeats_it(
    store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    event = promoted(store, name)
    strange: list[Answer] = [(200, "no object"), (302, {}), (200, {}), (403, {"message": "not yours"})]

    def handle(*_: Any) -> Answer:
        return strange[0]

    with serving(handle) as url, caplog.at_level(logging.WARNING):
        config = AnnounceConfig(mlflow=url, model_registry=url, webhook="http://127.0.0.1:9")
        while strange:
            outcomes = announce(config, store, name, event, {"FINELOOP_WEBHOOK_SECRET": "hush"})
            assert outcomes.keys() == {"mlflow", "model_registry", "webhook"}
            assert "told" not in outcomes.values()
            strange.pop(0)
    assert "not yours" in outcomes["mlflow"]
    assert f"`fineloop adapters announce {name}@production` notifies it again" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("address", ["mlflow:5000", "ftp://host", "https://user:secret@host/", "https://"])
def test_an_address_that_is_none_or_holds_a_password_is_refused(address: str) -> None:
    text = '[adapter]\nname = "a"\n[model]\nbase = "b"\n[data]\nsource = "c"\n'
    with pytest.raises(ConfigError, match=r"announce\.webhook"):
        loads(text, [f"announce.webhook={address}"])


# People.

MAIL = "ada@example.org"
NIGHT = Night(
    event_id="e1",
    kind="held",
    time="2026-12-02T00:30:00+00:00",
    adapter="sums",
    alias="production",
    run_id="run-1",
    candidate="v2",
    title="sums: production stays as it is",
    reason="the loss is worse by <!channel> & [more](http://evil.example)\x1b[2J\nTo: you",
    commands=[{"command": "fineloop chat sums@v2", "why": "talk to the candidate"}],
    report_uri="s3://b/runs/run-1/report.html",
)
REASON = r"the loss is worse by <!channel> & [more](http://evil.example)\x1b[2J To: you"
COMMAND = "fineloop chat sums@v2 # talk to the candidate"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusting(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The certificate of the servers, which this process trusts."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate[0]))
    return certificate


def over_tls(handle: Handle, certificate: tuple[Path, Path]) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return serving(handle, tls=context)


def outcome_of(who: str, **environment: str) -> str:
    """Of telling them about a night."""
    (outcome,) = announce_night(AnnounceConfig(people=[who]), NIGHT, environment).values()
    return outcome


def shown_by_slack(sent: Any) -> list[str]:
    """docs.slack.dev/messaging/sending-messages-using-incoming-webhooks"""
    assert sent["text"]
    assert not any(sign in sent["text"] for sign in "<>&")  # of which it would make links and mentions
    assert {block["text"]["type"] for block in sent["blocks"]} == {"plain_text"}
    return [block["text"]["text"] for block in sent["blocks"]]


def shown_by_teams(sent: Any) -> list[str]:
    (attachment,) = sent["attachments"]
    assert (sent["type"], attachment["content"]["type"]) == ("message", "AdaptiveCard")
    assert attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    runs = [run for block in attachment["content"]["body"] for run in block["inlines"]]
    assert {run["type"] for run in runs} == {"TextRun"}  # which is shown as it is
    return [run["text"] for run in runs]


CHANNELS: dict[str, tuple[str, str, Callable[[Any], list[str]]]] = {
    "slack": ("FINELOOP_SLACK_WEBHOOK", "/services/T0/B0/secret-part", shown_by_slack),
    "teams": ("FINELOOP_TEAMS_WEBHOOK", "/workflows/w/triggers/manual/paths/invoke", shown_by_teams),
}


@pytest.mark.parametrize("who", CHANNELS)
def test_a_channel_is_told_over_tls(store: Store, name: str, trusting: tuple[Path, Path], who: str) -> None:
    variable, channel, shown = CHANNELS[who]
    sent: list[Any] = []

    def handle(_verb: str, path: str, query: Mapping[str, str], body: bytes, _headers: Any) -> Answer:
        assert (path, query) == (channel, {"sig": "secret-part"})
        sent.append(json.loads(body))
        return 200, "ok"

    promoted(store, name)
    event, config = promoted(store, name, b"two"), AnnounceConfig(people=[who])
    with over_tls(handle, trusting) as url:
        environment = {variable: f"{url}{channel}?sig=secret-part"}
        assert announce_night(config, NIGHT, environment) == {f"people.{who}": "told"}
        assert announce(config, store, name, event, environment) == {f"people.{who}": "told"}
    night, move = map(shown, sent)
    assert night == ["sums: production stays as it is (held)", REASON, COMMAND, NIGHT.report_uri]
    assert move[0] == f"{name}: {event.body['to']} is in production (promoted)"
    back = f"fineloop adapters rollback {name} --alias production # go back to {event.body['from']}"
    assert move[1:3] == ["better", back]


def test_people_get_an_email_of_a_night_once_by_its_id(trusting: tuple[Path, Path]) -> None:
    server = MailServer(login=("bot@example.org", "p@ss:word"))
    with mailing(server, *trusting):
        url = f"smtp://bot%40example.org:p%40ss%3Aword@127.0.0.1:{server.port}"
        assert [outcome_of(MAIL, FINELOOP_SMTP_URL=url) for _ in range(2)] == ["told", "told"]
    first, second = server.taken
    assert (first["To"], first["From"], first["Subject"]) == (MAIL, "bot@example.org", f"{NIGHT.title} (held)")
    assert first.get_content().split() == " ".join([f"{NIGHT.title} (held)", REASON, COMMAND, NIGHT.report_uri]).split()
    assert first["Message-ID"] == second["Message-ID"]  # by which a mailbox knows the same mail again


def test_no_mail_goes_over_an_insecure_connection(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for server in (MailServer(login=("u", "hush-hush"), offers_tls=False), MailServer(login=("u", "hush-hush"))):
        with mailing(server, *certificate):  # which nobody here trusts
            outcomes.append(outcome_of(MAIL, FINELOOP_SMTP_URL=f"smtp://u:hush-hush@127.0.0.1:{server.port}"))
        assert (server.taken, server.connections) == ([], 1)
    assert "STARTTLS" in outcomes[0]
    assert "CERTIFICATE_VERIFY_FAILED" in outcomes[1]
    with over_tls(lambda *_: (200, "ok"), certificate) as url:
        assert "CERTIFICATE_VERIFY_FAILED" in outcome_of("slack", FINELOOP_SLACK_WEBHOOK=f"{url}/secret")


@pytest.mark.parametrize("url", ["", "smtp://user:pa/ss-word@host", "smtp://user:pass:word@host", "https://host"])
def test_a_mail_servers_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    outcome = outcome_of(MAIL, FINELOOP_SMTP_URL=url)
    assert "FINELOOP_SMTP_URL is not smtp://USER:PASSWORD@HOST:PORT" in outcome
    assert not any(part in outcome for part in ("pa/ss", "pass:", "word@"))


def test_a_mail_is_not_sent_again_where_the_server_may_have_it(trusting: tuple[Path, Path]) -> None:
    server = MailServer(login=("u", "p"), drops_after_data=True)
    with mailing(server, *trusting):
        outcome = outcome_of(MAIL, FINELOOP_SMTP_URL=f"smtp://u:p@127.0.0.1:{server.port}")
    assert "127.0.0.1: Connection unexpectedly closed" in outcome
    assert (len(server.taken), server.connections) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        ((429, "rate_limited", {"Retry-After": "0"}), 3),
        ((503, "busy"), 3),
        ((429, "come tomorrow", {"Retry-After": "86400"}), 1),
        ((502, "a gateway that may have passed it on"), 1),
    ],
)
def test_a_message_is_sent_again_only_where_it_was_not_taken(answer: Answer, tries: int) -> None:
    paths: list[str] = []

    def handle(_verb: str, path: str, *_: Any) -> Answer:
        paths.append(path)
        return answer

    with serving(handle) as url:
        outcome = outcome_of("slack", FINELOOP_SLACK_WEBHOOK=f"{url}/services/T0/B0/secret-part")
    assert len(paths) == tries
    assert outcome.startswith(f"POST FINELOOP_SLACK_WEBHOOK answered {answer[0]}: ")


def test_a_message_whose_answer_was_lost_is_not_sent_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(10)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/secret-part"
        notified = pool.submit(outcome_of, "slack", FINELOOP_SLACK_WEBHOOK=url)
        caller, _ = server.accept()
        with caller:
            caller.recv(65536)
        assert "Connection aborted" in notified.result()
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):  # nobody calls again
            server.accept()


def test_the_address_of_a_channel_is_in_no_outcome_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for url in ("http://127.0.0.1:9/secret-part?sig=secret-part", "https://[secret-part", "http://secret-part:-1/"):
            outcome = outcome_of("slack", FINELOOP_SLACK_WEBHOOK=url)
            assert "FINELOOP_SLACK_WEBHOOK" in outcome
            assert "secret-part" not in outcome + caplog.text
    assert outcome_of("teams") == "FINELOOP_TEAMS_WEBHOOK holds no address"


@pytest.mark.parametrize("who", ["slakc", "ada@", "https://hooks.slack.com/services/T0/B0/x", "a@b, c@d"])
def test_people_that_nobody_can_be_are_refused(who: str) -> None:
    with pytest.raises(ValidationError, match=r"people\.0"):
        AnnounceConfig(people=[who])
