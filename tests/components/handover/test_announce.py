"""Each server is a double, or a real one where FINELOOP_MLFLOW or FINELOOP_MODEL_REGISTRY is its address.

An MLflow is `mlflow server --backend-store-uri sqlite:///mlflow.db`, in an environment of its own.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import requests

from components.config.config_file import loads
from components.config.schema import AnnounceConfig
from components.handover import announce as announcing
from components.handover.announce import NOTIFIERS, Notifier, announce, signature
from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry import aliases, versions
from components.registry.event_log import Event
from components.shared.errors import ConfigError
from components.store.store import Store
from tests.doubles.http_server import Answer, serving
from tests.doubles.mlflow_server import Mlflow
from tests.doubles.model_registry import ModelRegistry

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
    lineage = {
        "run_id": run_id,
        "recipe": {"method": "qlora"},
        "base": {"reference": "org/base"},
        "dataset": {"uri": "s3://b/datasets/d/"},
    }
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    version = versions.publish_version(store, name, files, lineage=lineage).version
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


def test_the_model_registry_has_the_version_where_it_lies_and_the_alias(
    store: Store, model_registry: str, name: str
) -> None:
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


def test_a_notifier_is_given_its_own_secrets_and_no_others(
    store: Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []
    notifier = Notifier(lambda _url, _announcement, environment: given.append(dict(environment)), ("A", "B"))
    monkeypatch.setitem(NOTIFIERS, "webhook", notifier)
    environment = {"A": "a", "FINELOOP_SIGNING_KEY": "pem", "MLFLOW_TRACKING_TOKEN": "m"}
    announce(AnnounceConfig(webhook="http://127.0.0.1:9"), store, name, promoted(store, name), environment)
    assert given == [{"A": "a"}]


@pytest.mark.parametrize("environment", [{}, {"FINELOOP_WEBHOOK_SECRET": "hush"}])
def test_a_webhook_gets_the_move_once_it_is_no_longer_busy(
    store: Store, name: str, environment: Mapping[str, str]
) -> None:
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


def test_nothing_is_notified_by_default(store: Store, name: str) -> None:
    assert announce(AnnounceConfig(), store, name, promoted(store, name), {}) == {}


@pytest.mark.parametrize("address", ["mlflow:5000", "ftp://host", "https://user:secret@host/", "https://"])
def test_an_address_that_is_none_or_holds_a_password_is_refused(address: str) -> None:
    text = '[adapter]\nname = "a"\n[model]\nbase = "b"\n[data]\nsource = "c"\n'
    with pytest.raises(ConfigError, match=r"announce\.webhook"):
        loads(text, [f"announce.webhook={address}"])
