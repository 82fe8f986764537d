"""The cluster that the options name, and an adapter of each test's own, of which nothing stays."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.step.step import IMAGE
from components.store.store import Store
from tests.cluster.kube import Kube
from tests.cluster.live import Live

SHORT = (
    "data.max_records=240",
    "train.max_steps=12",
    "train.checkpoint_every_steps=4",
    "evaluate.records=32",
    "evaluate.max_new_tokens=8",
    "gate.better_than_base_by=-100.0",
    "gate.worse_than_champion_by=100.0",
    "gate.limits=[]",
    "gate.min_records=2",
)
"""The example in a few steps, past a gate that lets everything through: the weights are not what is judged here."""


@pytest.fixture
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    option = request.config.getoption
    name = f"acceptance-{uuid.uuid4().hex[:8]}"
    prefix = f"registry.prefix=acceptance/{name}"
    given = Live(
        option("--host"), option("--namespace"), option("--step-image"), [*SHORT, *option("--set"), prefix], name
    )
    yield given
    try:
        given.clean_up()
    finally:
        _empty(option("--set"), f"acceptance/{name}")


@pytest.fixture
def step_image(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--step-image") or IMAGE)


@pytest.fixture
def kube(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kube]:
    """The kubeconfig's cluster, and a name of the test's own, of whose jobs none stays."""
    option, name = request.config.getoption, f"live-{uuid.uuid4().hex[:6]}"
    found = Kube(option("--namespace"), [*SHORT, *option("--set")], name, tmp_path)
    yield found
    found.clean_up()
    if found.has_trained:
        _empty(option("--set"), found.prefix)


def _empty(settings: list[str], prefix: str) -> None:
    keys = dict(each.split("=", 1) for each in settings)
    store = Store.open(RegistryConfig(bucket=keys.get("registry.bucket", "fineloop"), prefix=prefix))
    store.delete([entry.key for entry in store.list("")])
