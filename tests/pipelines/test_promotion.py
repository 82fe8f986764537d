"""The pipeline for people, compiled and run as the UI would."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.config import config_file
from components.registry import aliases, event_log, versions
from components.registry.store import Store
from pipelines.commands.arguments import DEFAULT_CONFIG
from pipelines.kubeflow.compile import compile_promotion
from pipelines.local.seaweedfs import Endpoint

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from kfp import local
from pipelines.promotion import promotion
local.init(local.SubprocessRunner(use_venv=False), pipeline_root="out")
promotion(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
"""


def test_a_person_moves_the_alias_and_back(
    store: Store, s3_server: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        versions.publish_version(
            store, "sums", {"adapter_model.safetensors": body, "adapter_config.json": b"{}"}, lineage={}
        ).version
        for body in (b"one", b"two")
    )
    for name, value in {**s3_server.environment(), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)

    def start(**parameters: str) -> str:
        given = {"adapter_name": "sums", "bucket": store.bucket, "prefix": store.prefix, **parameters}
        command = [sys.executable, "-W", "ignore", "-c", RUN, *[f"{name}={value}" for name, value in given.items()]]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        pointer = aliases.read_alias(store, "sums", "production")
        assert pointer is not None
        return pointer.version

    assert start(version=first) == first
    assert start(reason="newer", person="ada") == second
    assert start(action="roll back") == first
    assert [event.body.get("actor") for event in event_log.events(store, "sums") if event.kind == "promoted"] == [
        "Kubeflow UI",
        "ada",
    ]
    pages = [path.read_text() for path in (tmp_path / "out").rglob("summary")]
    assert sum(page.startswith("# sums@production is now") for page in pages) == 3


def test_the_form_offers_what_there_is() -> None:
    mine = {"adapter.alias": "staging", "registry.bucket": "mine", "registry.prefix": "team/a"}
    config = config_file.load(DEFAULT_CONFIG, [f"{key}={value}" for key, value in mine.items()])
    spec, _ = yaml.safe_load_all(compile_promotion(config))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) == 8
    assert parameters["action"]["literals"] == ["promote", "roll back"]
    assert parameters["adapter_name"]["defaultValue"] == config.adapter.name
    assert [parameters[name]["defaultValue"] for name in ("alias", "bucket", "prefix")] == [*mine.values()]
