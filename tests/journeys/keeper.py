"""Somebody who looks after a registry: its config, its versions, and what boto3 says lies in it."""

import json
import subprocess
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import boto3

from components.config.schema import RegistryConfig
from components.registry.versions import publish_version
from components.store.store import Store
from pipelines.local.seaweedfs import Endpoint
from tests.doubles.jobs_api import TOKEN, JobsApi
from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Person
from tests.waiting import PATIENCE_S

CONFIG = """\
[adapter]
name = "sums"
[model]
base = "nobody/none"
[data]
source = {data}
eval_share = 0.3
[gate]
min_records = 2
[gate.approval]
always = true
[registry]
bucket = "{bucket}"
prefix = "{prefix}"
"""


@dataclass(frozen=True)
class Keeper(Person):
    """A person with a registry of their own on the session's S3 server, whose config is sums.toml."""

    bucket: str = ""
    prefix: str = ""

    @property
    def registry(self) -> Bucket:
        return Bucket(boto3.client("s3"), self.bucket, f"{self.prefix}/")

    def keys(self, folder: str = "") -> set[str]:
        """What lies in the registry, or in a folder of it."""
        return {*self.registry.keys(folder)}

    def files(self, version: str) -> set[str]:
        return self.keys(f"adapters/sums/versions/{version}/")

    def holder(self, alias: str = "production") -> str:
        return str(self.registry.json(f"adapters/sums/aliases/{alias}.json")["version"])

    @property
    def store(self) -> Store:
        return Store.open(RegistryConfig(bucket=self.bucket, prefix=self.prefix))

    def publishes(self, weights: str) -> str:
        """A version, by the product's own function; the stub of a Ray job takes its weights for its held-out loss."""
        files = {"adapter_model.safetensors": weights.encode(), "adapter_config.json": b"{}"}
        return publish_version(self.store, "sums", files, lineage={"run_id": ""}).version

    def on(self, cluster: JobsApi) -> "Keeper":
        """Their Ray jobs go to this cluster."""
        ray = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        return replace(self, variables={**self.variables, **ray})

    def begins(self, line: str, **variables: str) -> "subprocess.Popen[str]":
        """One line of shell that goes on beside others; `ended` waits for it."""
        told = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return self.starts(line, env={**self.environment, **variables}, **told)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def keeper_at(folder: Path, endpoint: Endpoint) -> Keeper:
    """A keeper in a folder of their own, with rows to train on."""
    folder.mkdir()
    keeper = Keeper(folder, endpoint.environment(), endpoint.bucket, f"tests/{uuid.uuid4().hex}")
    rows = [json.dumps({"prompt": f"How much is {n} + 1?", "completion": str(n + 1)}) + "\n" for n in range(60)]
    for name, chosen in (("rows.jsonl", rows), ("more.jsonl", rows[1:])):
        keeper.has(name, "".join(chosen))
    data = json.dumps(str(folder / "rows.jsonl"))
    keeper.has("sums.toml", CONFIG.format(data=data, bucket=keeper.bucket, prefix=keeper.prefix))
    return keeper
