"""The whole pipeline across both images: a Ray head in the one, the steps in the other, an S3 server between them.

What a cluster would add is Kubernetes, Kubeflow's server and a network; each of those has tests of its own.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.registry.aliases import read_alias
from components.registry.lineage import Code
from components.registry.versions import read_lineage, resolve, verify_version
from components.store.store import Store
from pipelines.local import seaweedfs
from tests.infra.images.containers import Done, on_loopback, podman, podman_tier
from tests.infra.images.locks import pins, text_of
from tests.infra.images.ray_head import ray_head
from tests.models.tiny import build_base, colour_rows

pytestmark = podman_tier

SETTINGS = {
    "model.max_length": 64,
    "data.max_records": 0,
    "adapter.name": "colours",
    "train.learning_rate": 0.01,
    "train.epochs": 4,
    "evaluate.records": 40,
    "evaluate.max_new_tokens": 8,
}


@dataclass(frozen=True)
class Ran:
    """One run of the pipeline, and the registry that it worked on."""

    done: Done
    store: Store

    @property
    def answer(self) -> dict[str, Any]:
        assert self.done.returncode == 0, self.done.stdout[-4000:] + self.done.stderr[-8000:]
        answer: dict[str, Any] = json.loads(self.done.stdout.splitlines()[-1])
        return answer


@pytest.fixture(scope="module")
def ran(
    step_image: str, train_image: str, s3_server: seaweedfs.Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    registry = RegistryConfig(bucket=s3_server.bucket, prefix="images")
    store = Store.open(registry)
    base = build_base(tmp_path_factory.mktemp("tiny") / "base")
    for path in base.iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    store.put("sources/colours.jsonl", "".join(json.dumps(row) + "\n" for row in colour_rows(400)).encode())
    settings = {
        **SETTINGS,
        "model.base": store.uri("bases/tiny"),
        "data.source": store.uri("sources/colours.jsonl"),
        "registry.bucket": registry.bucket,
        "registry.prefix": registry.prefix,
    }
    command = ["python", "-m", "pipelines.cli", "run", "--home", "/tmp/home", "--json", "--verbose"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with ray_head(train_image, s3_server.environment()) as client:
        environment = {**s3_server.environment(), **client}
        options = on_loopback(environment, scratch={"/tmp": "1g"})
        done = podman("run", "--rm", *options, step_image, *command, environment=environment, check=False)
    return Ran(done, store)


def test_the_adapter_is_trained_compared_and_promoted(ran: Ran) -> None:
    answer = ran.answer
    assert (answer["decision"], answer["promoted"]) == ("promote", True), answer["reasons"]
    assert answer["metrics"]["candidate"]["loss"] < answer["metrics"]["base"]["loss"] / 2
    steps = {name for name in answer["timings_s"] if name not in ("ground", "total")}
    assert steps == {"prepare", "finetune", "evaluate", "gate", "promote", "report"}


def test_the_alias_in_the_store_points_at_what_was_trained(ran: Ran) -> None:
    pointer = read_alias(ran.store, "colours", "production")
    assert pointer is not None
    assert (pointer.version, pointer.run_id) == (ran.answer["version"], ran.answer["run_id"])
    verify_version(ran.store, resolve(ran.store, "colours@production"))


def test_the_lineage_names_the_train_images_packages_and_commit(ran: Ran, train_image: str) -> None:
    lineage = read_lineage(ran.store, resolve(ran.store, "colours@production"))
    assert lineage["run_id"] == ran.answer["run_id"]
    assert lineage["training"]["world_size"] == 2
    assert lineage["base"]["identity"]["kind"] == "s3"
    packages = lineage["environment"]["packages"]
    assert {"deepspeed", "ray", "torch"} < packages.keys()
    locked = pins(text_of("train"))
    both = packages.keys() & locked.keys()
    assert {name: packages[name].partition("+")[0] for name in both} == {name: locked[name] for name in both}
    label = '{{index .Labels "org.opencontainers.image.revision"}}'
    revision = podman("image", "inspect", "--format", label, train_image).stdout.strip()
    assert lineage["environment"]["code"] == asdict(Code(revision.removesuffix("-dirty"), revision.endswith("-dirty")))
