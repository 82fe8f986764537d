"""The pipeline for people, compiled and run as the UI would."""

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.config import config_file
from components.registry import event_log, signing
from components.registry.cache import LISTED
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.compile import compile_promotion
from tests.pipelines.command_line import ROOT, production, publish_sums

RUN = """
import json, sys
from kfp import local
from pipelines.promotion import promotion
local.init(local.SubprocessRunner(use_venv=False), pipeline_root="out")
promotion(**json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_person_moves_the_alias_and_back(store, s3_server, tmp_path, monkeypatch):
    first, second = (publish_sums(store, weights) for weights in ("one", "two"))
    for name, value in {**s3_server.environment(), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)

    def run(**parameters: Any) -> subprocess.CompletedProcess[str]:
        others = {"webhook": "http://127.0.0.1:9/"}  # a failed notification stops nothing
        where = {"bucket": store.bucket, "prefix": store.prefix, "announce": others}
        given = {"adapter_name": "sums", **where, **parameters}
        command = [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(given)]
        return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)

    def start(**parameters: str) -> str | None:
        done = run(**parameters)
        assert done.returncode == 0, done.stderr
        return production(store)

    store.put_json(LISTED, {"sums": {"in_production": "nothing"}, "other": {"in_production": "its own"}})
    assert start(version=first) == first
    assert store.get_json(LISTED).keys() == {"other"}  # the next run reads what is in production of sums
    assert start(reason="newer", person="ada") == second
    assert start(action="roll back") == first
    key = signing.public_text(Ed25519PrivateKey.generate())
    refused = run(version=second, trusted_keys=[key])
    assert refused.returncode != 0
    assert "is signed by none of registry.trusted_keys" in refused.stdout + refused.stderr
    assert production(store) == first
    promoted = [event for event in event_log.events(store, "sums") if event.kind == "promoted"]
    assert [event.body.get("actor") for event in promoted] == ["Kubeflow UI", "ada"]
    pages = [path.read_text() for path in (tmp_path / "out").rglob("summary")]
    assert sum(page.startswith("# sums@production is now") for page in pages) == 3


def test_the_form_offers_what_there_is() -> None:
    mine = {"adapter.alias": "staging", "registry.bucket": "mine", "registry.prefix": "team/a"}
    announced = ["announce.mlflow=https://mlflow.example", 'announce.people=["slack"]']
    config = config_file.load(DEFAULT_CONFIG, [*announced, *(f"{key}={value}" for key, value in mine.items())])
    spec, _ = yaml.safe_load_all(compile_promotion(config))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["action"]["literals"] == ["promote", "approve", "roll back"]
    assert parameters["adapter_name"]["defaultValue"] == config.adapter.name
    assert parameters["announce"]["defaultValue"] == {"mlflow": "https://mlflow.example", "people": ["slack"]}
    assert [parameters[name]["defaultValue"] for name in ("alias", "bucket", "prefix")] == [*mine.values()]
